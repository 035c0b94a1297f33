"""What passes over a corpus make of gradients: second moments, the eigenvalues in their bases, how far both have converged, and
the self-influence of every sequence.

Axes: N sequences, T positions, M real tokens, I inputs of a layer (+1 with a bias), O outputs, W = O I; P pairs, L layers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Damping
from upriver.curvature.blocks import Moments
from upriver.kernels import add_second_moment, aligned
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.model.planned import Probe
from upriver.model.sweep import Consumer, Source, sweep
from upriver.runtime.artifact import Tensors, read_tensor
from upriver.runtime.cost import COMPARED, CORRECTION, COVARIANCE, Spec, chunks, diagonal, own_input
from upriver.tensors import Scratch, accumulator_dtype, even_parts, numbered, on_cpu, rotated_gradients, square
from upriver.text.batch import Batch, Sequences


class Covariance:
    """Consumer: sums ``A`` over the real tokens of each input, ``S`` over the same tokens of each output (eq. 16).

    Into ``sums`` it adds the lower triangles of ``A:layer`` ``[I, I]`` and ``S:layer`` ``[O, O]`` (or of their diagonal blocks
    ``A.0:layer``, ``A.1:layer`` and so on), and ``count:layer``, the number of tokens in them.  Experts of a block have these
    moments in common, of ``pairs:layer`` tokens.
    """

    def __init__(self, sums: Tensors, dtype: torch.dtype):
        self.sums, self.dtype = sums, dtype

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        moment = layer.pool or layer.name
        for which, x_NTI in {"S": g_NTO, **({"A": a_NTI} if layer.A_of == moment else {})}.items():
            x_MI, (real_M, _) = x_NTI.flatten(0, 1), self.batch.real(x_NTI, layer.name, layer.at_NT)
            if real_M is not None:
                x_MI = x_MI.index_select(0, real_M)
            parts = x_MI.split(diagonal(x_MI.shape[1], layer.parts), 1)
            for at, x_Mi in zip(numbered(which, len(parts)), parts, strict=True):
                name = f"{at}:{moment}"
                if name not in self.sums:
                    self.sums[name] = x_Mi.new_zeros(x_Mi.shape[1], x_Mi.shape[1], dtype=self.dtype)
                add_second_moment(self.sums[name], x_MI if len(parts) == 1 else x_Mi.contiguous())
            for count in [f"count:{layer.name}", *([f"pairs:{moment}"] if layer.pool else [])] if which == "S" else ():
                self.sums[count] = self.sums.get(count, torch.zeros(1, dtype=torch.int64)) + len(x_MI)


class Rotation:
    """The gradients of the sequences of a batch in the eigenbases, some at a time; tokens are summed before anything is squared.

    A rotated input is wider than I, with zeros at its end: a product into rows that do not start at multiples of 64 bytes takes
    up to a third longer, and those of a layer with a bias, with its column of ones, never do.

    Args:
        moments: the eigenbases; None for the weights' own basis.
    """

    def __init__(self, moments: dict[str, Moments] | None):
        self.moments = moments
        self._scratch = Scratch()
        self.begin()

    def begin(self) -> None:
        """Another batch: forget the last input, which the next layer may share."""
        self._rotated: tuple[str, Tensor] = ("", torch.empty(0))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some of the sequences, and their rotated gradients ``[n, O, I]``."""
        (N, T, I), O = a_NTI.shape, g_NTO.shape[2]
        Q_A_II, Q_S_OO = None, None
        if self.moments is not None:
            Q_A_II, Q_S_OO = self.moments[layer.name].Q_A_II, self.moments[layer.name].Q_S_OO
            if T <= O:  # the input is rotated token by token, once for the layers that share it
                if self._rotated[0] != own_input(layer):
                    self._rotated = (own_input(layer), self._scratch.product("input", a_NTI, Q_A_II, aligned(I)))
                a_NTI, Q_A_II = self._rotated[1], None
            if T <= I:
                g_NTO, Q_S_OO = self._scratch.product("g", g_NTO, Q_S_OO), None
        at_once = chunks(not on_cpu(g_NTO)).gradients
        for part in even_parts(N, max(1, at_once // (g_NTO.element_size() * O * a_NTI.shape[2]))):
            G_NOI = rotated_gradients(a_NTI[part], g_NTO[part], Q_A_II, Q_S_OO, self._scratch)
            yield part, G_NOI[..., :I]


class Correction:
    """Consumer: sums squared rotated sequence gradients (eq. 20), in two halves by the parity of the sequences' keys.

    Into ``sums`` it adds ``lam:layer`` ``[2, O, I]``, and ``sequences`` ``[2]``, how many are in each half.

    Args:
        moments: the eigenbases; None for the weights' own basis.
    """

    def __init__(self, sums: Tensors, dtype: torch.dtype, moments: dict[str, Moments] | None):
        self.sums, self.dtype, self._rotate = sums, dtype, Rotation(moments)
        if "sequences" in sums:  # counted on the host, whatever device the sums of an earlier run were read onto
            sums["sequences"] = sums["sequences"].cpu()
        self._half_N: list[int] = []

    def begin(self, batch: Batch) -> None:
        half_N = (batch.keys_N & np.uint64(1)).astype(np.int64)
        both_2 = torch.from_numpy(np.bincount(half_N, minlength=2))
        self.sums["sequences"] = self.sums["sequences"] + both_2 if "sequences" in self.sums else both_2
        self._half_N = half_N.tolist()
        self._rotate.begin()

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        name = f"lam:{layer.name}"
        if name not in self.sums:
            self.sums[name] = g_NTO.new_zeros(2, g_NTO.shape[2], a_NTI.shape[2], dtype=self.dtype)
        for part, G_NOI in self._rotate(layer, a_NTI, g_NTO):
            for half, G_OI in zip(self._half_N[part], G_NOI.to(self.dtype), strict=True):
                self.sums[name][half].addcmul_(G_OI, G_OI)


class SelfInfluence:
    """Consumer, and loss of its own source: what each sequence, trained on, changes of its own loss, and two simpler measures.

    In the eigenbases ``grad L(z)^T (G + lambda I)^-1 grad L(z) = sum G_OI^2 / (lam_OI + lambda)``.

    Args:
        moments: the eigenbases; None for the weights' own basis.
        inverse: ``1 / (lam_OI + lambda)`` of each layer.
        told: whether the task tells the loss of each sequence; otherwise a batch has to be one.
    """

    def __init__(self, moments: dict[str, Moments] | None, inverse: Tensors, told: bool = True):
        self._rotate, self.inverse, self.told = Rotation(moments), inverse, told
        self.rows: list[np.ndarray] = []
        self.losses_N: list[Tensor] = []
        self.found_N2: list[Tensor] = []  # self-influence, squared norm of the gradient

    def begin(self, batch: Batch) -> None:
        self._rotate.begin()
        self.rows.append(batch.rows_N)
        self.found_N2.append(torch.zeros(len(batch.rows_N), 2, dtype=torch.float64, device=batch.device))

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The loss of the batch, summed; that of each sequence is noted."""
        task = model.task
        losses_N = task.losses(model.module, batch) if self.told else task.loss(model.module, batch).reshape(1)
        assert losses_N is not None
        self.losses_N.append(losses_N.detach().double())
        return losses_N.sum()

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        inverse_W = self.inverse[layer.name].flatten()
        for part, G_NOI in self._rotate(layer, a_NTI, g_NTO):
            squares_NW = G_NOI.to(inverse_W.dtype).square().flatten(1)
            self.found_N2[-1][part, 0] += squares_NW @ inverse_W
            self.found_N2[-1][part, 1] += squares_NW.sum(1)

    def result(self) -> Tensors:
        """``found`` ``[N, 2]`` and ``loss`` ``[N]`` in the order of the rows, float64, on the host."""
        order = torch.from_numpy(np.argsort(np.concatenate(self.rows), kind="stable"))
        return {"found": torch.cat(self.found_N2).cpu()[order], "loss": torch.cat(self.losses_N).cpu()[order]}


def _probe(
    spec: Spec,
    make: Callable[[Model, list[Layer]], Any],
    model: Model,
    layers: list[Layer],
    source: Source,
    rows: np.ndarray,
) -> tuple[Consumer, float]:
    T = float(np.mean(np.asarray(source.lengths_N)[rows]))
    return make(model, layers), 2 * source.tokens(rows) * sum(spec.multiplications(x, T) for x in layers)


def _correction(model: Model, layers: list[Layer]) -> Correction:
    """Bases of zeros take as long as any."""
    like, shared, moments = model.like, {}, {}
    for x in layers:
        Q_A, Q_S = (square([like.new_zeros(k, k) for k in diagonal(n, x.parts)]) for n in (x.I, x.O))
        Q_S = shared.setdefault(f"S {x.pool}", Q_S) if x.pool else Q_S
        moments[x.name] = Moments(shared.setdefault(x.A_of, Q_A), Q_S, torch.zeros(0), torch.zeros(0), 1.0)
    return Correction({}, accumulator_dtype(like.dtype), moments)


FIT_PROBES: dict[str, Probe] = {
    "covariance": partial(
        _probe, COVARIANCE, lambda model, layers: Covariance({}, accumulator_dtype(model.like.dtype))
    ),
    "correction": partial(_probe, CORRECTION, _correction),
}


PROBES, SHARE = 64, 16  # sequences that are looked at, and at most one for so many that were fitted on, but 8 at least


class Agreement:
    """Consumer: the scores of the sequences of a batch on each other, by the eigenvalues of either half of the sample.

    Every two of a batch's first ``COMPARED`` sequences are a pair; ``parts`` holds ``[2, L, P]`` of each batch, on its device:
    for each half and layer the scores of its pairs.
    """

    def __init__(self, moments: dict[str, Moments], denominators: Tensors):
        self.moments, self.denominators = moments, denominators  # lam + lambda: [2, O, I] of each layer
        self.parts: list[Tensor] = []
        self.place = {name: i for i, name in enumerate(moments)}

    def begin(self, batch: Batch) -> None:
        N = min(COMPARED, len(batch.rows_N))
        self.upper = torch.triu_indices(N, N, 1, device=batch.device)
        self.parts.append(torch.zeros(2, len(self.place), self.upper.shape[1], device=batch.device))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        m = self.moments[layer.name]
        G_NW = rotated_gradients(a_NTI[:COMPARED], g_NTO[:COMPARED], m.Q_A_II, m.Q_S_OO).flatten(1)
        for half, denominator_OI in enumerate(self.denominators[layer.name]):
            scores_NN = (G_NW / denominator_OI.flatten().to(G_NW)) @ G_NW.T
            self.parts[-1][half, self.place[layer.name]] = scores_NN[self.upper[0], self.upper[1]].float()


def begun(sums: Tensors, layers: list[Layer], model: Model) -> Tensors:
    """The sums of a correction pass, with zeros for experts that no sequence may visit."""
    for x in layers:
        if x.pool and f"lam:{x.name}" not in sums:
            sums[f"lam:{x.name}"] = torch.zeros(2, x.O, x.I, dtype=accumulator_dtype(model.dtype), device=model.device)
    return sums


def pool_means(layers: list[Layer], files: dict[str, Path]) -> Tensors:
    """The mean over all experts of a block of what the sums of ``lam`` hold, ``[2]`` for each pool: experts are damped alike,
    whether a sequence of the sample visits them or not."""
    found: dict[str, list[Tensor]] = {}
    for x in layers:
        if x.pool:
            found.setdefault(x.pool, []).append(read_tensor(files[x.name], f"lam:{x.name}").double().mean((1, 2)))
    return {pool: torch.stack(each).mean(0) for pool, each in found.items()}


def compare(
    model: Model,
    group: list[Layer],
    data: Sequences,
    fitted: int,
    moments: dict[str, Moments],
    files: dict[str, Path],
    means: Tensors,
    batch_tokens: int,
) -> Tensor | None:
    """Scores of a few random sequences on each other in a group of layers, ``[2, L, P]``; None when a half is empty.

    Args:
        fitted: how many sequences the eigenvalues were measured on.
        files: of a correction pass, with the sums of each layer.
        means: as :func:`pool_means` gives them.
    """
    n_2, denominators = read_tensor(files[group[0].name], "sequences"), {}
    if not int(n_2.min()):
        return None
    for x in group:
        lam_2OI = read_tensor(files[x.name], f"lam:{x.name}") / n_2[:, None, None]
        mean_2 = means[x.pool] / n_2 if x.pool else lam_2OI.double().mean((1, 2))
        lam_2OI.add_(torch.tensor([Damping().of(float(mean)) for mean in mean_2])[:, None, None])
        denominators[x.name] = lam_2OI.to(model.like)
    count = max(COMPARED, min(PROBES, fitted // SHARE))
    rows = np.random.default_rng(0).permutation(len(data))[:count]
    source = Source.of(data, rows, max(batch_tokens, 2 * int(np.max(data.lengths_N))))  # two are a pair
    consumer = Agreement(moments, denominators)
    sweep(model, group, source, rows, consumer)
    return torch.cat(consumer.parts, 2).cpu()


def agreement(pairs: list[Tensor | None]) -> dict[str, Any]:
    """The correlation between the halves' scores, of the sums over layers and of the worst layer."""
    what = "correlation of the scores of random sequences on each other between the two halves of the sample"
    known = [p for p in pairs if p is not None]
    if len(known) < len(pairs) or known[0].shape[2] < 2:
        return {"mean": None, "worst": None, "what": what}
    pairs_2LP = torch.cat(known, 1).double()
    layers = [_correlation(pairs_2LP[:, i]) for i in range(pairs_2LP.shape[1])]
    numbers = [x for x in layers if x is not None]
    return {"mean": _correlation(pairs_2LP.sum(1)), "worst": min(numbers, default=None), "what": what}


def _correlation(pairs_2P: Tensor) -> float | None:
    value = float(torch.corrcoef(pairs_2P)[0, 1])
    return value if value == value else None  # not a number where all scores of a half are the same
