"""Fit EK-FAC: covariances, their eigenbases, and the eigenvalues measured in them.

FACTORS/key.json, manifest.json
FACTORS/eigen/unit-K.safetensors      layer K: Q_A, eig_A (when it leads its input's group), Q_S, eig_S
FACTORS/correction/lam.safetensors    lam of every layer
FACTORS/covariance/                   sums of A and S; removed when the fit is done
FACTORS/diagonal/                     eigenvalues in the weights' own basis; made when first asked for
"""

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from threadpoolctl import threadpool_limits
from torch import Tensor

from upriver.curvature.base import Damping
from upriver.curvature.blocks import BlockCurvature, Eigenblock, Moments
from upriver.errors import InputError, MismatchError, NumericalError, StorageError
from upriver.model.layers import Layer, coverage
from upriver.model.load import Model
from upriver.model.sweep import Labels, split_units, sweep, tracked_layers
from upriver.runtime import dist
from upriver.runtime.config import CONVENTIONS, FitOptions, options
from upriver.runtime.progress import Progress, Say, mute, silent
from upriver.runtime.store import Stage, Tensors, accumulate, locked, read_json, read_tensors, write_tensors
from upriver.tensors import accumulator_dtype, eigh, rotated_gradients, second_moment, sequence_gradients
from upriver.text.batch import Batch, Sequences

COVARIANCE_STREAM, CORRECTION_STREAM = 1, 2  # the two passes draw different labels


class Covariance:
    """Consumer: sums ``A`` over the real tokens of each input, ``S`` over the same tokens of each output (eq. 16)."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.sums, self.real_NT = dtype, {}, None

    def begin(self, batch: Batch) -> None:
        self.real_NT = None if batch.real_NT is None or bool(batch.real_NT.all()) else batch.real_NT

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        g_MO = self._real(g_NTO)
        self._add(f"S:{layer.name}", second_moment(g_MO, self.dtype))
        self._add(f"count:{layer.name}", torch.tensor([len(g_MO)], dtype=torch.int64))
        if layer.A_of == layer.name:
            self._add(f"A:{layer.name}", second_moment(self._real(a_NTI), self.dtype))

    def _real(self, x_NTI: Tensor) -> Tensor:
        if self.real_NT is None:
            return x_NTI.flatten(0, 1)
        calls = x_NTI.shape[1] // self.real_NT.shape[1]
        return x_NTI[self.real_NT.repeat(1, calls)]

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value


class Correction:
    """Consumer: sums squared rotated sequence gradients (eq. 20), in two halves by the parity of the sequences' keys."""

    def __init__(self, dtype: torch.dtype, moments: dict[str, Moments] | None):
        self.dtype, self.moments = dtype, moments
        self.sums: Tensors = {"sequences": torch.zeros(2, dtype=torch.int64)}
        self.half_2N = torch.empty(0)

    def begin(self, batch: Batch) -> None:
        half_N = torch.from_numpy((batch.keys_N & np.uint64(1)).astype(np.int64))
        half_2N = torch.nn.functional.one_hot(half_N, 2).T
        self.sums["sequences"] += half_2N.sum(1)
        self.half_2N = half_2N.to(self.dtype)

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        if self.moments is None:
            G_NOI = sequence_gradients(a_NTI, g_NTO)
        else:
            m = self.moments[layer.name]
            G_NOI = rotated_gradients(a_NTI, g_NTO, m.Q_A_II, m.Q_S_OO)
        square_NP = G_NOI.to(self.dtype).square_().flatten(1)
        sums_2OI = (self.half_2N.to(square_NP.device) @ square_NP).unflatten(1, G_NOI.shape[1:])
        name = f"lam:{layer.name}"
        self.sums[name] = self.sums[name].add_(sums_2OI) if name in self.sums else sums_2OI


class Plan(NamedTuple):
    """What a fit goes over, decided before it starts."""

    model: Model
    data: Sequences
    layers: list[Layer]
    units: list[list[np.ndarray]]
    labels: tuple[Labels, Labels]
    progress: Progress

    @property
    def tokens(self) -> int:
        return sum(int(self.data.lengths_N[rows].sum()) for unit in self.units for rows in unit)


def fit(
    model: Model,
    data: Sequences,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    say: Say = mute,
    **given: Any,
) -> "Factors":
    """Fit the EK-FAC factors of ``model`` on ``data`` into the folder ``out``; reuse what is there when it is the same.

    Args:
        given: ``layers``, ``fisher``, ``max_tokens``, ``dtype``, ``batch_tokens``, ``seed``; see :class:`FitOptions`.

    Raises:
        InputError: an option, the model, or the folder cannot be used.
        NumericalError: a NaN or an infinity on the way.

    Example:
        >>> factors = up.fit(model, corpus, out="factors", layers="mlp", max_tokens=500_000)
    """
    opts, out = options(FitOptions, given), Path(out)
    key = {
        "model": model.fingerprint,
        "corpus": data.fingerprint,
        "kernel": model.info.get("attention"),
        "options": opts.model_dump(),
        "conventions": CONVENTIONS,
    }
    with locked(out):
        stage = Stage.open(out, "fit", key, overwrite)
        if stage.done:
            dist.lead(lambda: _tidy(out))  # a kill may have come between the two
            say(f"factors: {out} is complete and was made from the same inputs; used as it is")
        else:
            with model.computing_in(opts.dtype) as computing:
                _run(stage, _plan(computing, data, opts, progress), opts, say)
    return Factors(out)


def _plan(model: Model, data: Sequences, opts: FitOptions, progress: Progress) -> Plan:
    rows = data.sample(opts.max_tokens or int(data.lengths_N.sum(dtype=np.int64)), opts.seed)
    units = split_units(data.plan(opts.batch_tokens, rows), data.lengths_N)
    drawn = opts.fisher == "sampled"
    labels = [Labels(opts.seed, stream if drawn else None) for stream in (COVARIANCE_STREAM, CORRECTION_STREAM)]
    return Plan(model, data, tracked_layers(model, data, opts.layers), units, (labels[0], labels[1]), progress)


def _run(stage: Stage, plan: Plan, opts: FitOptions, say: Say) -> None:
    started = time.perf_counter()
    cover = coverage(plan.model.module, plan.layers)
    sequences = sum(len(rows) for unit in plan.units for rows in unit)
    say(f"layers: {cover.line()}")
    say(
        f"fit: {plan.tokens:,} tokens in {sequences:,} of {len(plan.data):,} sequences, {opts.fisher} labels, seed {opts.seed}"
    )
    times: dict[str, float] = {}
    dtype = accumulator_dtype(plan.model.dtype)

    sums = _timed(
        times, "covariance", lambda: _pass(stage, "covariance", plan, plan.labels[0], lambda: Covariance(dtype))
    )
    clamped = _timed(times, "eigendecomposition", lambda: _decompose(stage, plan, sums, sequences))
    del sums
    moments = {x.name: read_moments(stage.path, plan.layers, x).to(_like(plan.model)) for x in plan.layers}
    make = lambda: Correction(dtype, moments)  # noqa: E731 - a thunk beside its use
    sums = _timed(times, "correction", lambda: _pass(stage, "correction", plan, plan.labels[1], make))
    halves = _finish_lam(stage.path / "correction", plan.layers, sums)

    if dist.rank() == 0:
        say(f"convergence: {halves['what']}: mean {_text(halves['mean'])}, worst layer {_text(halves['worst'])}")
        if clamped < -1e-6:
            say(
                f"rank-deficient covariance: negative eigenvalues down to {clamped:.1e} of the largest were set to zero"
            )
        stage.finish(
            {
                "layers": [_describe(x) for x in plan.layers],
                "coverage": cover._asdict() | {"share": cover.share},
                "fit": {"sequences": sequences, "tokens": plan.tokens, "halves": halves, "clamped": clamped},
                "data": getattr(plan.data, "info", {}),
                "timings": times | {"total": time.perf_counter() - started},
            }
        )
        _tidy(stage.path)
    dist.barrier()


def _tidy(folder: Path) -> None:
    """Remove the sums of finished passes: all that counts of them is in ``eigen`` and ``lam``."""
    shutil.rmtree(folder / "covariance", ignore_errors=True)
    Stage(folder / "correction", {}).drop_parts()


def _text(value: float | None) -> str:
    return "not known (one half is empty)" if value is None else f"{value:.3f}"


def _timed(times: dict[str, float], name: str, work: Any) -> Any:
    start = time.perf_counter()
    result = work()
    times[name] = time.perf_counter() - start
    return result


def _like(model: Model) -> Tensor:
    return torch.empty(0, dtype=model.dtype, device=model.device)


def _pass(top: Stage, name: str, plan: Plan, labels: Labels, make: Any) -> Tensors:
    """One accumulating pass over the units of ``plan``, committed unit by unit."""
    stage = Stage.open(top.path / name, name, top.key)

    with plan.progress(name, plan.tokens) as advance:

        def compute(unit: int) -> Tensors:
            consumer = make()
            sweep(plan.model, plan.layers, plan.data, plan.units[unit], consumer, labels, advance)
            return {key: value.cpu() for key, value in consumer.sums.items()}

        return accumulate(stage, dist.share(len(plan.units)), len(plan.units), compute, dist.barrier)


def _decompose(top: Stage, plan: Plan, sums: Tensors, sequences: int) -> float:
    """Eigendecompose ``A`` and ``S`` of every layer, one at a time with one thread; returns the most negative share."""
    stage = Stage.open(top.path / "eigen", "eigen", top.key)
    with plan.progress("eigendecomposition", len(plan.layers)) as advance, threadpool_limits(1):
        for unit in dist.share(len(plan.layers)):
            if not stage.has(unit):
                stage.commit(unit, _eigen(plan.layers[unit], sums, sequences, plan.model.device))
            advance(1)
    dist.barrier()
    return min(float(stage.read(unit)["clamped"]) for unit in range(len(plan.layers)))


def _eigen(layer: Layer, sums: Tensors, sequences: int, device: torch.device) -> Tensors:
    if f"S:{layer.name}" not in sums:
        raise NumericalError(f"layer {layer.name!r} got no gradient on any sequence; leave it out with --layers")
    count = int(sums[f"count:{layer.name}"])
    eig_S_O, Q_S_OO, low = eigh((sums[f"S:{layer.name}"] / count).to(device))
    out = {"Q_S": Q_S_OO, "eig_S": eig_S_O}
    if layer.A_of == layer.name:
        out["eig_A"], out["Q_A"], low_A = eigh((sums[f"A:{layer.name}"] / count).to(device))
        low = min(low, low_A)
    dtype = sums[f"S:{layer.name}"].dtype
    extra = {"T_mean": torch.tensor(count / sequences, dtype=torch.float64), "clamped": torch.tensor(low)}
    return {name: value.to(dtype) for name, value in out.items()} | extra


def _finish_lam(folder: Path, layers: list[Layer], sums: Tensors) -> dict[str, Any]:
    """Write ``lam`` of every layer; returns how well the two halves of the sample agree."""
    n_2 = sums["sequences"]
    lam = {x.name: sums[f"lam:{x.name}"].sum(0) / n_2.sum() for x in layers}
    if dist.rank() == 0:
        write_tensors(folder / "lam.safetensors", lam)
    found = [_agreement(sums[f"lam:{x.name}"], n_2, lam[x.name]) for x in layers] if int(n_2.min()) else []
    agreement = [a for a in found if a == a]  # not a number where a layer's eigenvalues are all the same
    what = "correlation over all eigenvalues of log(lam + 0.1 mean lam) between the two halves of the sample"
    worst, mean = (min(agreement), sum(agreement) / len(agreement)) if agreement else (None, None)
    return {"mean": mean, "worst": worst, "what": what}


def _agreement(lam_2OI: Tensor, n_2: Tensor, lam_OI: Tensor) -> float:
    shift = Damping().of(lam_OI)
    logs_2P = torch.log(lam_2OI / n_2[:, None, None] + shift).flatten(1).double()
    return float(torch.corrcoef(logs_2P)[0, 1])


def _describe(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": [layer.O, layer.I],
        "block": layer.block,
        "kind": layer.kind,
        "A_of": layer.A_of,
    }


def read_moments(path: Path, layers: list[Layer] | list[Any], layer: Any) -> Moments:
    names = [x.name for x in layers]
    own = read_tensors(path / "eigen" / f"unit-{names.index(layer.name):06d}.safetensors")
    leader = own
    if layer.A_of != layer.name:
        leader = read_tensors(path / "eigen" / f"unit-{names.index(layer.A_of):06d}.safetensors")
    return Moments(leader["Q_A"], own["Q_S"], leader["eig_A"], own["eig_S"], float(own["T_mean"]))


class FactorLayer(NamedTuple):
    name: str
    shape: tuple[int, int]
    block: int | None
    kind: str
    A_of: str


class Factors:
    """The fitted factors of a folder, read one layer at a time.

    Raises:
        InputError: the folder does not hold finished factors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        make = "make them with: upriver fit MODEL CORPUS --out FACTORS"
        if not self.path.is_dir():
            raise InputError(f"no such folder of factors: got {self.path}; {make}")
        done = (self.path / "manifest.json").exists()
        if not done and (self.path / "key.json").exists():
            raise InputError(
                f"the factors in {self.path} are not finished; give the same `upriver fit` command again, it goes on"
            )
        self.manifest = read_json(self.path / "manifest.json") if done else {}
        if not isinstance(self.manifest, dict) or (self.manifest.get("key") or {}).get("stage") != "fit":
            raise InputError(f"not a folder of factors: got {self.path}; {make}")
        self.layers = [FactorLayer(**{**x, "shape": tuple(x["shape"])}) for x in self.manifest["layers"]]

    @property
    def options(self) -> FitOptions:
        return FitOptions(**self.manifest["key"]["options"])

    def check(self, model: Model, data: Sequences | None = None) -> None:
        """Refuse factors of another model, attention kernel or corpus.

        Raises:
            MismatchError: with the first entry that differs.
        """
        key = self.manifest["key"]
        now = {"model": model.fingerprint, "kernel": model.info.get("attention"), "conventions": CONVENTIONS}
        if data is not None:
            now["corpus"] = data.fingerprint
        for name, value in now.items():
            if key[name] != value:
                raise MismatchError(
                    f"the factors in {self.path} were fitted with another {name}: got {value!r} now, {key[name]!r} then; "
                    "fit again into another folder, or go back to the earlier one"
                )

    def moments(self, name: str) -> Moments:
        return read_moments(self.path, self.layers, self._layer(name))

    def block(self, name: str, kind: str = "ekfac") -> Eigenblock:
        """One layer's curvature of a kind: ``ekfac``, ``kfac``, ``diagonal`` or ``identity``."""
        if kind == "identity":
            return Eigenblock.identity(*self._layer(name).shape)
        if kind == "diagonal":
            return Eigenblock.diagonal(self._read("diagonal", name))
        moments = self.moments(name)
        return Eigenblock.kfac(moments) if kind == "kfac" else Eigenblock.ekfac(moments, self._read("correction", name))

    def curvature(self, kind: str = "ekfac") -> BlockCurvature:
        return BlockCurvature([x.name for x in self.layers], lambda name: self.block(name, kind))

    def _layer(self, name: str) -> FactorLayer:
        return next(x for x in self.layers if x.name == name)

    def _read(self, stage: str, name: str) -> Tensor:
        path = self.path / stage / "lam.safetensors"
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot read {path}: {error}; fit again with --overwrite") from error


def fit_diagonal(model: Model, data: Sequences, factors: Factors, progress: Progress = silent) -> None:
    """Measure the diagonal of the Fisher in the weights' own basis, on the sample that the factors were fitted on."""
    factors.check(model, data)
    top = Stage(factors.path, factors.manifest["key"])
    if (top.path / "diagonal" / "lam.safetensors").exists():
        return
    opts = factors.options
    with locked(top.path), model.computing_in(opts.dtype) as computing:
        plan = _plan(computing, data, opts, progress)
        dtype = accumulator_dtype(computing.dtype)
        sums = _pass(top, "diagonal", plan, plan.labels[1], lambda: Correction(dtype, None))
        _finish_lam(top.path / "diagonal", plan.layers, sums)
        if dist.rank() == 0:
            Stage(top.path / "diagonal", {}).drop_parts()
        dist.barrier()
