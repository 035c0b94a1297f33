"""The query side: each measurement's gradient, solved and compressed once; the corpus only streams past it."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Damping, Grads
from upriver.curvature.fit import Factors
from upriver.errors import NumericalError
from upriver.model.capture import capture, frozen
from upriver.model.layers import Layer
from upriver.model.load import Model
from upriver.runtime.store import Tensors, read_tensors
from upriver.tensors import LowRank, sequence_gradients
from upriver.text.batch import Batch, Examples

QUERY_BYTES = 1 << 30  # full-rank query gradients held at once


class Measured(Protocol):
    """What is asked: :class:`upriver.Queries`, or :class:`Measurements` for any other task."""

    @property
    def ids(self) -> list[str]: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def batch(self, indices: Any, /) -> Batch: ...


class Measurements:
    """Examples whose measurement (as the task defines it) is traced, one query each.

    Example:
        >>> Measurements(up.Examples({"x": x, "y": y}), ids=["first", "second"])
    """

    def __init__(self, examples: Examples, ids: list[str] | None = None):
        self.examples = examples
        self.ids = ids or [f"q{i}" for i in range(len(examples))]
        self.fingerprint = examples.fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> Batch:
        b = self.examples.batch(np.asarray(indices))
        return Batch(b.rows_N, b.keys_N, b.inputs, b.real_NT, torch.ones(len(b.rows_N)), np.asarray(indices))


class Gradients:
    """Consumer: each query's gradient, summed over its rows with their weights (+1 completion, -1 contrast)."""

    def __init__(self, queries: int):
        self.queries, self.grads, self.slot_N = queries, {}, torch.empty(0)

    def begin(self, slot_N: Tensor) -> None:
        self.slot_N = slot_N

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        G_NOI = sequence_gradients(a_NTI, g_NTO)
        if layer.name not in self.grads:
            self.grads[layer.name] = G_NOI.new_zeros(self.queries, *G_NOI.shape[1:])
        self.grads[layer.name].index_add_(0, self.slot_N, G_NOI)


def query_gradients(model: Model, layers: list[Layer], queries: Measured, indices: list[int]) -> Grads:
    """``grad f`` of the queries ``indices`` for every layer, ``[len(indices), O, I]``; zero where a query does not reach."""
    consumer = Gradients(len(indices))
    with capture(model.module, layers, consumer) as run:
        for slot, index in enumerate(indices):  # one by one: a query is short, and padding costs nothing then
            batch = queries.batch([index]).to(model.device)
            consumer.begin(torch.full((len(batch.rows_N),), slot, device=model.device))
            run(len(batch.rows_N), model.task.positions(batch), lambda b=batch: weighted_measurement(model, b))
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    return {x.name: consumer.grads.get(x.name, like.new_zeros(len(indices), x.O, x.I)) for x in layers}


def weighted_measurement(model: Model, batch: Batch) -> Tensor:
    f_N = model.task.measurement(model.module, batch)
    return f_N.sum() if batch.weight_N is None else (batch.weight_N.to(f_N) * f_N).sum()


def measurements(model: Model, queries: Measured) -> np.ndarray:
    """``f`` of every query, float64 ``[Q]``."""
    with frozen(model.module), torch.no_grad():
        rows = (queries.batch([i]).to(model.device) for i in range(len(queries)))
        return np.array([float(weighted_measurement(model, batch)) for batch in rows])


def query_chunks(layers: list[Layer], n_queries: int, budget: int = QUERY_BYTES) -> list[list[int]]:
    """Spans of queries whose full-rank gradients fit in ``budget`` bytes."""
    size = max(1, budget // (4 * sum(x.parameters for x in layers)))
    return [list(range(i, min(i + size, n_queries))) for i in range(0, n_queries, size)]


def solve(
    model: Model,
    layers: list[Layer],
    factors: Factors,
    queries: Measured,
    indices: list[int],
    kind: str,
    damping: Damping,
) -> Grads:
    """``v = (G + lambda I)^-1 grad f`` at full rank, ``[len(indices), O, I]`` for every layer."""
    grads = query_gradients(model, layers, queries, indices)
    for x in layers:
        block = factors.block(x.name, kind).to(grads[x.name])
        grads[x.name] = _finite(x.name, block.solve(grads[x.name], damping))
    return grads


def solve_low_rank(
    model: Model,
    layers: list[Layer],
    factors: Factors,
    queries: Measured,
    indices: list[int],
    kind: str,
    damping: Damping,
    rank: int,
) -> Tensors:
    """The solved queries at rank ``rank``: ``U:layer`` ``[Q, O, R]`` and ``V:layer`` ``[Q, R, I]``."""
    grads = query_gradients(model, layers, queries, indices)
    out: Tensors = {}
    for x in layers:
        q_QOI = grads.pop(x.name)
        block = factors.block(x.name, kind).to(q_QOI)
        metric = block.basis or factors.moments(x.name).to(q_QOI)
        low = block.solve_low_rank(q_QOI, damping, min(rank, x.O, x.I), metric)
        out[f"U:{x.name}"], out[f"V:{x.name}"] = _finite(x.name, low.U_QOR), _finite(x.name, low.V_QRI)
    return out


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"the solved query of layer {name!r} holds NaN or infinity; give a larger --damping")
    return tensor


def read_solved(paths: list[Path], layer: str) -> LowRank | Tensor:
    """One layer's solved queries over all chunks: low-rank factors, or ``v_QOI`` at full rank."""
    parts = [read_tensors(path) for path in paths]
    if f"v:{layer}" in parts[0]:
        return torch.cat([p[f"v:{layer}"] for p in parts])
    return LowRank(torch.cat([p[f"U:{layer}"] for p in parts]), torch.cat([p[f"V:{layer}"] for p in parts]))
