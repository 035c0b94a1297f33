"""The query side: each measurement's gradient, solved and compressed once; the corpus only streams past it.

Axes: N sequences of a batch, T positions, Q queries, R rank, O outputs, I inputs of a layer.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Damping, Grads
from upriver.curvature.blocks import TokenGradient
from upriver.curvature.factors import Factors
from upriver.errors import ModelError, NumericalError, QueryError
from upriver.kernels import side_by_side
from upriver.model.capture import capture, frozen
from upriver.model.layers import Layer
from upriver.model.load import Model
from upriver.runtime.artifact import Tensors, digest, opened
from upriver.runtime.config import BATCH_TOKENS
from upriver.runtime.split import Asked, query_size
from upriver.tensors import LowRank
from upriver.text.batch import Batch, Examples, plan, real_calls
from upriver.text.queries import checked_id


class Measured(Protocol):
    """What is asked: :class:`upriver.Queries`, or :class:`Measurements` for any other task."""

    @property
    def ids(self) -> list[str]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def lengths(self) -> np.ndarray: ...  # tokens of each query, all its rows together
    def __len__(self) -> int: ...
    def batch(self, indices: Any, /) -> Batch: ...


class Measurements:
    """Examples whose measurement (as the task defines it) is traced, one query each.

    Raises:
        QueryError: not one id for every example, one that comes twice, or the name of a column of the results.

    Example:
        >>> Measurements(up.Examples({"x": x, "y": y}), ids=["first", "second"])
    """

    def __init__(self, examples: Examples, ids: list[str] | None = None):
        self.examples = examples
        self.ids = [checked_id(x, "ids") for x in ids or (f"q{i}" for i in range(len(examples)))]
        if len(set(self.ids)) != len(examples) or len(self.ids) != len(examples):
            raise QueryError(
                f"every example is a query with an id of its own: got {len(set(self.ids))} different ids "
                f"for {len(examples)} examples"
            )
        self.fingerprint = digest([examples.fingerprint, self.ids])
        self.lengths = examples.lengths_N

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Any) -> Batch:
        b = self.examples.batch(np.asarray(indices))
        return Batch(b.rows_N, b.keys_N, b.inputs, b.real_NT, torch.ones(len(b.rows_N)), np.asarray(indices))


class TokenGradients:
    """Consumer: the gradient of each query, ``sum g a^T`` over the tokens of its rows (completion +1, contrast -1), as tokens.

    A query with more tokens than the smaller side of a layer is kept as the rows or columns of its gradient instead: as many
    "tokens" as that side has, with the same sum.
    """

    def __init__(self, layers: list[Layer]):
        self.parts: dict[str, dict[int, TokenGradient]] = {x.name: {} for x in layers}
        self.batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        batch, found = self.batch, self.parts[layer.name]
        assert batch is not None
        assert batch.query_N is not None
        real_NM = None if batch.real_NT is None else real_calls(batch.real_NT, a_NTI, layer.name)
        for n, query in enumerate(batch.query_N.tolist()):
            if real_NM is None:
                tokens = TokenGradient(a_NTI[n].clone(), g_NTO[n].clone())
            else:
                tokens = TokenGradient(a_NTI[n, real_NM[n]], g_NTO[n, real_NM[n]])
            found[query] = _joined([found[query], tokens] if query in found else [tokens])

    def pop(self, layer: Layer, indices: list[int], like: Tensor) -> list[TokenGradient]:
        """The queries ``indices`` in one layer, which is forgotten; a query that does not reach it has no tokens."""
        found = self.parts.pop(layer.name)
        nothing = TokenGradient(like.new_zeros(0, layer.I), like.new_zeros(0, layer.O))
        return [found.get(query, nothing) for query in indices]


def _joined(parts: list[TokenGradient]) -> TokenGradient:
    whole = parts[0] if len(parts) == 1 else TokenGradient(*(torch.cat(x) for x in zip(*parts, strict=True)))
    M, I, O = *whole.a_MI.shape, whole.g_MO.shape[1]
    if min(O, I) >= M:
        return whole
    q_OI = whole.dense()
    eye = torch.eye(min(O, I), dtype=q_OI.dtype, device=q_OI.device)
    return TokenGradient(q_OI, eye) if O <= I else TokenGradient(eye, q_OI.T.contiguous())


def token_gradients(
    model: Model, layers: list[Layer], queries: Measured, indices: list[int], batch_tokens: int = BATCH_TOKENS
) -> TokenGradients:
    """``grad f`` of the queries ``indices`` for every layer, in batches of about equal length."""
    consumer = TokenGradients(layers)
    with capture(model.module, layers, consumer) as run:
        for part in plan(queries.lengths, batch_tokens, np.asarray(indices)):
            batch = queries.batch(part).to(model.device)
            consumer.begin(batch)
            run(len(batch.rows_N), model.task.positions(batch), lambda b=batch: weighted_measurement(model, b))
    return consumer


def query_gradients(model: Model, layers: list[Layer], queries: Measured, indices: list[int]) -> Grads:
    """``grad f`` of the queries ``indices`` for every layer, ``[len(indices), O, I]``; zero where a query does not reach."""
    found, like = token_gradients(model, layers, queries, indices), model.like
    return {x.name: torch.stack([q.dense() for q in found.pop(x, indices, like)]) for x in layers}


def weighted_measurement(model: Model, batch: Batch) -> Tensor:
    f_N = model.task.measurement(model.module, batch)
    if f_N.shape != batch.rows_N.shape:
        raise ModelError(
            f"the measurement of {type(model.task).__name__} is not one number a row: got the shape {tuple(f_N.shape)} for "
            f"{len(batch.rows_N)} rows; return a tensor of shape [{len(batch.rows_N)}], such as values.flatten()"
        )
    return f_N.sum() if batch.weight_N is None else (batch.weight_N.to(f_N) * f_N).sum()


def measurements(model: Model, queries: Measured) -> np.ndarray:
    """``f`` of every query, float64 ``[Q]``."""
    with frozen(model.module), torch.no_grad():
        rows = (queries.batch([i]).to(model.device) for i in range(len(queries)))
        return np.array([float(weighted_measurement(model, batch)) for batch in rows])


def query_chunks(layers: list[Layer], queries: Measured, rank: int | None, budget: int) -> list[list[int]]:
    """Consecutive queries whose gradients and solutions at ``rank`` (None: full) fit in ``budget`` bytes, one at least."""
    chunks: list[list[int]] = []
    room = 0
    for query, tokens in enumerate(queries.lengths.tolist()):
        size = query_size(layers, Asked(1, tokens, rank))
        if size > room or not chunks:
            chunks.append([])
            room = budget
        chunks[-1].append(query)
        room -= size
    return chunks


class Solver(NamedTuple):
    """``(G + lambda I)^-1 grad f`` for queries of ``queries``, in ``layers``, with the curvature ``kind`` of ``factors``."""

    model: Model
    layers: list[Layer]
    factors: Factors
    queries: Measured
    kind: str
    damping: Damping
    batch_tokens: int = BATCH_TOKENS  # of the pass that measures their gradients

    def full(self, indices: list[int]) -> Grads:
        """At full rank: ``[len(indices), O, I]`` for every layer."""
        found, like = self._gradients(indices), self.model.like
        out: Grads = {}
        for x in self.layers:
            block = self.factors.block(x.name, self.kind).to(like)
            out[x.name] = _finite(x.name, block.solve_tokens(found.pop(x, indices, like), self.damping))
        return out

    def low_rank(self, indices: list[int], rank: int) -> Tensors:
        """At rank ``rank``: ``U:layer`` ``[len(indices), O, R]`` and ``V:layer`` ``[len(indices), R, I]``."""
        found, like = self._gradients(indices), self.model.like

        def solve(x: Layer) -> Tensors:
            block = self.factors.block(x.name, self.kind).to(like)
            metric = block.basis or self.factors.moments(x.name).to(like)
            low = block.solve_low_rank(found.pop(x, indices, like), self.damping, min(rank, x.O, x.I), metric)
            return {f"U:{x.name}": _finite(x.name, low.U_QOR), f"V:{x.name}": _finite(x.name, low.V_QRI)}

        out: Tensors = {}
        for solved in side_by_side(solve, self.layers, like.device):
            out |= solved
        return out

    def _gradients(self, indices: list[int]) -> TokenGradients:
        return token_gradients(self.model, self.layers, self.queries, indices, self.batch_tokens)


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"the solved query of layer {name!r} holds NaN or infinity; give a larger --damping")
    return tensor


def read_solved(paths: list[Path], layer: str, queries: slice = slice(None)) -> LowRank | Tensor:
    """One layer's solved ``queries`` from the files of all chunks: low-rank factors, or ``v_QOI`` at full rank."""
    with ExitStack() as stack:
        files = [stack.enter_context(opened(path)) for path in paths]

        def wanted(part: str) -> Tensor:
            found = [_rows(file, f"{part}:{layer}", *at) for file, *at in zip(files, starts, ends, strict=True)]
            held = [rows for rows in found if len(rows)]
            return held[0] if len(held) == 1 else torch.cat(held)

        full = f"v:{layer}" in files[0].keys()  # noqa: SIM118 - not a mapping
        sizes = [file.get_slice(f"{'v' if full else 'U'}:{layer}").get_shape()[0] for file in files]
        first, last, _ = queries.indices(sum(sizes))
        before = np.cumsum([0, *sizes])[:-1]
        starts, ends = np.clip(first - before, 0, sizes).tolist(), np.clip(last - before, 0, sizes).tolist()
        return wanted("v") if full else LowRank(wanted("U"), wanted("V"))


def _rows(file: Any, name: str, start: int, end: int) -> Tensor:
    """Some rows of a tensor in an open file: only they are read."""
    rows = file.get_slice(name)
    return file.get_tensor(name) if end - start == rows.get_shape()[0] else rows[start:end]
