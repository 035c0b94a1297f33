"""The fitted factors of a folder: what :func:`upriver.fit` writes, and everything after it reads.

FACTORS/key.json, manifest.json
FACTORS/eigen/unit-K.safetensors      layer K: Q_A, eig_A (when it leads its input's group), Q_S, eig_S; in diagonal blocks
                                      Q_A.0, Q_A.1, .. with eig_A of all of them;
                                      T_mean, clamped (the most negative eigenvalue over the largest)
FACTORS/correction/lam.safetensors    lam of every layer
FACTORS/diagonal/lam.safetensors      eigenvalues in the weights' own basis; made when first asked for
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upriver.curvature.blocks import BlockCurvature, Eigenblock, Moments
from upriver.errors import ConfigError, InputError, MismatchError, NumericalError
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.runtime.artifact import (
    FitManifest,
    Tensors,
    digest,
    opened,
    read_head,
    read_json,
    read_tensor,
    write_stream,
)
from upriver.runtime.config import CONVENTIONS, CURVATURES, FitOptions
from upriver.runtime.cost import LayerSize, Sized, diagonal
from upriver.tensors import Square, eigh, numbered, square
from upriver.text.batch import Sequences
from upriver.text.reading import Reading

ADVICE = "fit again with --overwrite"  # what to do about a damaged file


def _eigen(path: Path, unit: int) -> Path:
    return path / "eigen" / f"unit-{unit:06d}.safetensors"


def decomposed(layer: Layer, sums: Path, sequences: int, model: Model) -> Tensors:
    """The file of one layer in ``eigen``, from the sums of a covariance pass over so many sequences.

    Decomposed in float64, or in float32 where the model computes in half precision: that has moved the matrix by more than a
    decomposition in float32 does.

    Raises:
        NumericalError: the layer got no gradient at all, or the sums are not finite.
    """
    with opened(sums) as file:
        key, held = f"count:{layer.name}", file.keys()
        own = int(file.get_tensor(key)) if key in held else 0
        out, low = {"T_mean": torch.tensor(own / sequences, dtype=torch.float64)}, 0.0
        if layer.pool not in ("", layer.name):  # whose moments are with those of the first expert
            return out | {"clamped": torch.tensor(low)}
        blocks = {x: numbered(x, len(diagonal(n, layer.parts))) for x, n in (("S", layer.O), ("A", layer.I))}
        S = [f"{x}:{layer.name}" for x in blocks["S"]]
        if S[0] not in held or not any(file.get_tensor(x).any() for x in S):
            raise NumericalError(f"layer {layer.name!r} got no gradient on any sequence; leave it out with --layers")
        count = int(file.get_tensor(f"pairs:{layer.name}" if layer.pool else key))
        dtype = file.get_tensor(S[0]).dtype
        precise = torch.float32 if model.dtype.itemsize == 2 else torch.float64

        def mean(name: str) -> Tensor:
            return file.get_tensor(f"{name}:{layer.name}").to(model.device, precise, copy=True).div_(count)

        if layer.pool:
            out["T_pool"] = torch.tensor(count / sequences, dtype=torch.float64)
        for which in ("S", "A") if layer.A_of == layer.name else ("S",):
            values = []
            for x in blocks[which]:
                eig, Q, low_x = eigh(mean(x))
                out[f"Q_{x}"], low = Q.to(dtype), min(low, low_x)
                values.append(eig.to(dtype))
                del Q
            out[f"eig_{which}"] = torch.cat(values)
    return out | {"clamped": torch.tensor(low)}


def read_moments(
    path: Path, layers: Sequence[Sized], wanted: Sequence[Sized], like: Tensor | None = None
) -> dict[str, Moments]:
    """The moments of the layers ``wanted`` among ``layers``; those that share an input share its basis in memory too."""
    unit = {x.name: i for i, x in enumerate(layers)}
    leaders: dict[str, tuple[Square, Tensor]] = {}
    pools: dict[str, tuple[Square, Tensor]] = {}
    out = {}
    for x in wanted:
        if x.A_of not in leaders:
            leaders[x.A_of] = _read_side(path, unit[x.A_of], "A", like)
        if (first := x.pool or x.name) not in pools:
            pools = {first: _read_side(path, unit[first], "S", like)}
        (Q_A, eig_A), (Q_S, eig_S) = leaders[x.A_of], pools[first]
        T_mean = float(read_tensor(_eigen(path, unit[x.name]), "T_mean"))
        out[x.name] = Moments(Q_A, Q_S, eig_A, eig_S, T_mean)
    return out


def _read_side(path: Path, unit: int, which: str, like: Tensor | None) -> tuple[Square, Tensor]:
    """The basis of ``A`` or ``S``, and its eigenvalues."""
    with opened(_eigen(path, unit), ADVICE) as file:
        count = sum(name.startswith(f"Q_{which}") for name in file.keys())  # noqa: SIM118 - not a mapping
        Q = square([file.get_tensor(name) for name in numbered(f"Q_{which}", count)])
        eig = file.get_tensor(f"eig_{which}")
    return (Q, eig) if like is None else (Q.to(like), eig.to(like))


def _layer_size(told: dict[str, Any], parts: int) -> LayerSize:
    """A layer, from what the manifest tells of it."""
    O, I = told["shape"]
    return LayerSize(told["name"], O, I, told["A_of"], told["block"], parts, pool=told.get("pool", ""))


class Factors:
    """The fitted factors of a folder, read one layer at a time.

    Raises:
        InputError: the folder does not hold finished factors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        make = "make them with: upriver fit MODEL CORPUS --out FACTORS"
        try:
            there = self.path.is_dir()
            done, begun = ((self.path / name).exists() for name in ("manifest.json", "key.json"))
        except (OSError, ValueError) as error:  # a folder that may not be entered, or what can be no path at all
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the folder of factors cannot be read: got {self.path} ({reason}); {make}") from error
        if not there:
            raise InputError(f"no such folder of factors: got {self.path}; {make}")
        if begun and not done:
            raise InputError(
                f"the factors in {self.path} are not finished; give the same `upriver fit` command again, it goes on"
            )
        foreign = f"not a folder of factors: got {self.path}; {make}"
        if not done:
            raise InputError(foreign)
        self._last: tuple[str, Moments | None] = "", None
        self.manifest = read_head(self.path / "manifest.json", FitManifest, foreign, ADVICE)
        self.layers = [_layer_size(x, self.options.blocks) for x in self.manifest["layers"]]
        self._unit = {x.name: i for i, x in enumerate(self.layers)}  # a mixture has thousands of layers
        self._experts = Counter(x.pool for x in self.layers)

    @property
    def options(self) -> FitOptions:
        return FitOptions(**self.manifest["key"]["options"])

    @property
    def fingerprint(self) -> str:
        """What they were made from, and of how many tokens: ``until`` may end early."""
        return digest([self.manifest["key"], self.manifest["fit"]["tokens"]])

    def check(self, model: Model, data: Sequences | None = None) -> None:
        """Refuse factors of another model, attention kernel or corpus.

        Raises:
            MismatchError: with the first entry that differs.
        """
        key = self.manifest["key"]
        now = {"model": model.fingerprint, "kernel": model.attention, "conventions": CONVENTIONS}
        if data is not None:
            now["corpus"] = data.fingerprint
        for name, value in now.items():
            if key[name] != value:
                raise MismatchError(
                    f"the factors in {self.path} were fitted with another {name}: got {value!r} now, {key[name]!r} then; "
                    "fit again into another folder, or go back to the earlier one"
                )

    def check_unchanged(self) -> None:
        """Refuse what was fitted again into the folder since it was opened.

        Raises:
            MismatchError: what was read of it is of two fits.
        """
        file = self.path / "manifest.json"
        if not file.exists() or read_json(file) != self.manifest:
            raise MismatchError(
                f"the factors in {self.path} were replaced while they were in use, so that the results are of two fits: "
                "give the same command again with --overwrite"
            )

    @property
    def reading(self) -> dict[str, Any]:
        """How the corpus that they were fitted on is read: what `Reading` says.

        Raises:
            InputError: it was no corpus of text.
        """
        data, names = self.manifest["data"], Reading._fields
        if not set(names) <= data.keys():
            raise InputError(f"the factors in {self.path} were not fitted on text; trace with them from Python")
        return {name: data[name] for name in names}

    def moments(self, name: str) -> Moments:
        """Of a layer; one expert after the other is given the bases that all of a block have in common, read once."""
        layer, (pool, last) = self._layer(name), self._last
        if not layer.pool or layer.pool != pool:
            last = read_moments(self.path, self.layers, [layer])[name]
            self._last = layer.pool, last
            return last
        assert last is not None
        return last._replace(T_mean=float(read_tensor(_eigen(self.path, self._unit[name]), "T_mean")))

    def block(self, name: str, kind: str = "ekfac") -> Eigenblock:
        """One layer's curvature of a kind.

        Raises:
            ConfigError: ``kind`` is none of ``ekfac``, ``kfac``, ``diagonal``, ``identity``.
            InputError: there is no such layer.
        """
        match kind:
            case "identity":
                layer = self._layer(name)
                return Eigenblock.identity(layer.O, layer.I)
            case "diagonal":
                return Eigenblock(self._read("diagonal", name), None, self._mean("diagonal", name))
            case "kfac":
                return Eigenblock.kfac(self.moments(name))._replace(mean=self._mean("kfac", name))
            case "ekfac":
                return Eigenblock(self._read("correction", name), self.moments(name), self._mean("correction", name))
        raise ConfigError(f"no such curvature: got {kind!r}; give one of {', '.join(CURVATURES)}")

    def curvature(self, kind: str = "ekfac") -> BlockCurvature:
        """The curvature of all layers, of a kind as in :meth:`block`, each read when it is needed."""
        return BlockCurvature([x.name for x in self.layers], lambda name: self.block(name, kind))

    def _layer(self, name: str) -> LayerSize:
        if name in self._unit:
            return self.layers[self._unit[name]]
        raise InputError(
            f"no such layer: got {name!r}; these factors hold {len(self.layers)}, such as {self.layers[0].name!r}"
        )

    def _mean(self, stage: str, name: str) -> float | None:
        """The mean eigenvalue of all experts of a block, of which their relative damping is a multiple."""
        pool = self._layer(name).pool
        if not pool:
            return None
        if stage != "kfac":
            return float(self._read(stage, pool, "mean"))
        pairs, m = float(read_tensor(_eigen(self.path, self._unit[pool]), "T_pool")), self.moments(name)
        return pairs / self._experts[pool] * float(m.eig_S_O.double().mean() * m.eig_A_I.double().mean())

    def _read(self, stage: str, name: str, what: str = "lam") -> Tensor:
        with opened(self.path / stage / "lam.safetensors", ADVICE) as file:
            return file.get_tensor(name if what == "lam" else f"{what}:{name}")


def write_lam(path: Path, files: dict[str, Path], means: Tensors) -> None:
    """Write ``lam`` of every layer, the mean over sequences of both halves, from the file with the sums of each layer, and as
    ``mean:layer`` that of all experts of a block."""
    forms = {}
    for name, file in files.items():
        with opened(file) as held:
            sums = held.get_slice(f"lam:{name}")
            forms[name] = (sums.get_dtype(), sums.get_shape()[1:])

    forms |= {f"mean:{name}": ("F64", []) for name in means}

    def lam(name: str) -> Tensor:
        if (pool := name.removeprefix("mean:")) in means and pool != name:
            return means[pool].sum() / read_tensor(files[pool], "sequences").sum()
        return read_tensor(files[name], f"lam:{name}").sum(0) / read_tensor(files[name], "sequences").sum()

    write_stream(path, forms, lam)
