"""What is asked: measurements and their gradients, kept as the tokens that they are sums over.

Axes: N rows of a batch, M tokens, Q queries, O outputs, I inputs of a layer.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Grads
from upriver.curvature.blocks import TokenGradient
from upriver.errors import ModelError, QueryError
from upriver.model.capture import frozen
from upriver.model.check import check_token
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.model.sweep import Source, sweep
from upriver.runtime.artifact import digest
from upriver.runtime.config import BATCH_TOKENS
from upriver.runtime.cost import Asked, query_size
from upriver.text.asked import checked_id
from upriver.text.batch import Batch, plan
from upriver.text.examples import Examples
from upriver.text.queries import Part, Queries


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
    """Examples (or what these are made of) whose measurement, as the task defines it, is traced, one query each.

    Raises:
        QueryError: not one id for every example, one that comes twice, or the name of a column of the results.

    Example:
        >>> Measurements(up.Examples({"x": x, "y": y}), ids=["first", "second"])
    """

    def __init__(self, examples: Any, ids: list[str] | None = None):
        self.examples = examples = examples if isinstance(examples, Examples) else Examples(examples)
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


def check_queries(model: Model, queries: Queries) -> None:
    """Refuse what the model cannot be asked, before anything is made of it.

    Raises:
        QueryError: a direction of another width than the layer's, or there is no such layer.
        ModelError: a token past the rows of the embedding.
    """
    for row in queries.rows:
        check_token(model, int(row.encoded.tokens_T.max()), f"query {queries.records[row.record].id!r}")
    widths: list[int] = []
    for query in queries.records:
        if query.direction and not widths:
            with frozen(model.module), torch.no_grad():
                tokens_11 = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
                made = model.module(input_ids=tokens_11, use_cache=False, output_hidden_states=True).hidden_states
            widths = [h_NTH.shape[-1] for h_NTH in made]
        if query.direction and [len(query.direction.vector_H)] != widths[query.direction.layer :][:1]:
            raise QueryError(
                f"{query.where}: {query.direction.name} does not fit the model: got {len(query.direction.vector_H)} numbers for "
                f"layer {query.direction.layer}; the model has layers 1 to {len(widths) - 1} of {widths[-1]} numbers"
            )


def parts(queries: Measured, indices: Any) -> list[Part]:
    """The rows of queries, which need not be in one batch: of a set of many members they could not be."""
    if isinstance(queries, Queries):
        return queries.parts(indices)
    return [Part(queries.lengths, queries.batch, np.asarray(indices))]


def batches(queries: Measured, indices: Any, batch_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """All rows of queries, in batches of at most so many tokens, padding counted."""
    for part in parts(queries, indices):
        yield from map(part.batch, plan(part.lengths, batch_tokens, part.rows))


class TokenGradients:
    """Consumer: the gradient of each query, ``sum g a^T`` over the tokens of its rows times their weights, as tokens.

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
        real_M, counts_N = batch.real(a_NTI, layer.name, layer.at_NT)
        at_N = [None] * len(counts_N) if real_M is None else real_M.split(counts_N)
        new: dict[int, list[TokenGradient]] = {}
        for n, (query, at) in enumerate(zip(batch.query_N.tolist(), at_N, strict=True)):
            if at is None:
                tokens = TokenGradient(a_NTI[n].clone(), g_NTO[n].clone())
            else:
                tokens = TokenGradient(*(x.flatten(0, 1).index_select(0, at) for x in (a_NTI, g_NTO)))
            new.setdefault(query, [found[query]] if query in found else []).append(tokens)
        for query, some in new.items():
            found[query] = _joined(some)

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
    """``grad f`` of the queries ``indices`` for every layer: a pass over queries, whose loss is what they measure."""
    consumer = TokenGradients(layers)
    for part in parts(queries, indices):
        source = Source(part.lengths, part.batch, weighted_measurement, part.rows, batch_tokens)
        sweep(model, layers, source, source.rows, consumer)
    return consumer


def gradients(
    model: Model,
    layers: list[Layer],
    queries: Measured,
    indices: list[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Grads:
    """The gradient of each query's measurement in the weights of ``layers``: ``[Q, O, I]`` for every layer.

    A bias is the last column; a layer that a query does not reach has zeros.

    Args:
        indices: of the queries; None: all of them.

    Example:
        >>> up.gradients(model, up.tracked_layers(model, corpus, "mlp"), queries)["model.layers.0.mlp.up_proj"].shape
    """
    wanted = list(range(len(queries))) if indices is None else indices
    found = token_gradients(model, layers, queries, wanted, batch_tokens)
    return {x.name: torch.stack([q.dense() for q in found.pop(x, wanted, model.like)]) for x in layers}


def measured(model: Model, batch: Batch) -> Tensor:
    """``f`` of each row of a batch, ``[N]``.

    Raises:
        ModelError: the task gives another form.
    """
    f_N = model.task.measurement(model.module, batch)
    if f_N.shape != batch.rows_N.shape:
        raise ModelError(
            f"the measurement of {type(model.task).__name__} is not one number a row: got the shape {tuple(f_N.shape)} for "
            f"{len(batch.rows_N)} rows; return a tensor of shape [{len(batch.rows_N)}], such as values.flatten()"
        )
    return f_N


def weighted_measurement(model: Model, batch: Batch) -> Tensor:
    """The measurements of a batch's rows, each times its weight, added up."""
    f_N = measured(model, batch)
    return f_N.sum() if batch.weight_N is None else (batch.weight_N.to(f_N) * f_N).sum()


def measurements(model: Model, queries: Measured) -> np.ndarray:
    """``f`` of every query, float64 ``[Q]``."""
    f_Q = np.zeros(len(queries))
    with frozen(model.module), torch.no_grad():
        for batch in batches(queries, range(len(queries))):
            f_N = measured(model, batch.to(model.device)).double().cpu()
            assert batch.query_N is not None
            weighted_N = f_N if batch.weight_N is None else f_N * batch.weight_N
            np.add.at(f_Q, batch.query_N, weighted_N.numpy())
    return f_Q


def in_turn(count: int, at_once: int) -> list[list[int]]:
    """So many queries, some at a time."""
    return [list(range(i, min(i + at_once, count))) for i in range(0, count, at_once)]


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
