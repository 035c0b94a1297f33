"""The training side: one pass over the corpus scores every sequence against every solved query.

    I_f(z) = - sum over layers of < v, sum_t g_t a_t^T >                                   eq. 25, 30

Three contractions give the same number.  Which is cheapest depends on the layer, the batch, the queries and the rank, and is
decided before the pass, by counting multiplications and bytes (:func:`upriver.runtime.counts.contraction`):

    tokens     sum_t (g_t U) . (V a_t)               M (O + I) Q R
    dense      form sum_t g_t a_t^T, times every v   M O I + N O I Q          and Q O I numbers held
    rebuilt    as dense, v = U V for every few batches, which wait until then with their M (O + I) numbers
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.model.layers import Layer
from upriver.runtime import counts
from upriver.tensors import LowRank, accumulator_dtype, sequence_gradients
from upriver.text.batch import Batch

GRADIENT_BYTES = 256 << 20  # sequence gradients held at once
REBUILD_BYTES = 256 << 20  # multiplied-out queries of one layer held at once
Order = counts.Order


class Route(NamedTuple):
    """How one layer is contracted with the queries."""

    order: Order
    U_OP: Tensor | None  # tokens: P = Q R columns
    V_IP: Tensor | None
    v_PQ: Tensor | None  # dense: P = O I rows
    low: LowRank | None  # rebuilt
    Q: int


def route(order: Order, solved: LowRank | Tensor, like: Tensor) -> Route:
    """Lay one layer's solved queries out for its order, in the device and dtype of ``like``."""
    if isinstance(solved, Tensor):
        return Route("dense", None, None, solved.to(like).flatten(1).T, None, len(solved))
    U_QOR, V_QRI = (x.to(like) for x in solved)
    Q = len(U_QOR)
    if order == "tokens":
        U_OP = U_QOR.permute(1, 0, 2).flatten(1).contiguous()
        return Route(order, U_OP, V_QRI.flatten(0, 1).T.contiguous(), None, None, Q)
    if order == "dense":
        return Route(
            order, None, None, (U_QOR @ V_QRI).flatten(1).T, None, Q
        )  # not copied: the product takes it turned
    return Route(order, None, None, None, LowRank(U_QOR, V_QRI), Q)


def contract(r: Route, a_NTI: Tensor, g_NTO: Tensor) -> Tensor:
    """``< v_q, sum_t g_t a_t^T >`` for each sequence and query, ``[N, Q]``, by tokens or by dense queries."""
    if r.order == "tokens":
        assert r.U_OP is not None
        assert r.V_IP is not None
        product_NTP = (g_NTO @ r.U_OP).mul_(a_NTI @ r.V_IP)
        return product_NTP.unflatten(2, (r.Q, -1)).sum((1, 3), dtype=accumulator_dtype(product_NTP.dtype))
    assert r.v_PQ is not None
    step = max(1, GRADIENT_BYTES // (g_NTO.element_size() * len(r.v_PQ)))
    parts = zip(a_NTI.split(step), g_NTO.split(step), strict=True)
    return torch.cat([sequence_gradients(a, g).flatten(1) @ r.v_PQ for a, g in parts])


class Score:
    """Consumer: raw influence of each sequence of a pass on every query, in total and layer by layer.

    Args:
        hold: how many batches wait, where queries are multiplied out for them.
        rebuild_bytes: of the queries multiplied out at once in a layer, and again of the gradients that meet them.
    """

    def __init__(
        self, routes: dict[str, Route], Q: int, keep_layers: bool, hold: int = 1, rebuild_bytes: int = REBUILD_BYTES
    ):
        self.routes, self.Q, self.keep_layers = routes, Q, keep_layers
        self.hold, self.rebuild_bytes = hold, rebuild_bytes
        self.place = {name: i for i, name in enumerate(routes)}
        self.rows: list[np.ndarray] = []
        self.scores_NQ: list[Tensor] = []
        self.layers_NQL: list[Tensor] = []
        self.waiting: dict[str, list[tuple[int, Tensor, Tensor]]] = {}  # batch, a, g

    def begin(self, batch: Batch) -> None:
        if len(self.rows) % self.hold == 0:
            self._flush()
        N = len(batch.rows_N)
        self.rows.append(batch.rows_N)
        self.scores_NQ.append(torch.zeros(N, self.Q))
        if self.keep_layers:
            self.layers_NQL.append(torch.zeros(N, self.Q, len(self.routes)))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        route, batch = self.routes[layer.name], len(self.rows) - 1
        if route.order == "rebuilt":
            self.waiting.setdefault(layer.name, []).append((batch, a_NTI, g_NTO))
            if self.hold == 1:
                self._flush()
        else:
            self._add(batch, layer.name, contract(route, a_NTI, g_NTO))

    def _flush(self) -> None:
        """Score what waits, layer by layer: the gradients of some sequences, met by some multiplied-out queries at a time."""
        for name in list(self.waiting):
            low, held = self.routes[name].low, self.waiting.pop(name)
            assert low is not None
            size = low.U_QOR.element_size() * low.U_QOR.shape[1] * low.V_QRI.shape[2]
            at_once = max(1, self.rebuild_bytes // size)
            pieces = [
                (batch, slice(n, n + at_once), a_NTI, g_NTO)
                for batch, a_NTI, g_NTO in held
                for n in range(0, len(a_NTI), at_once)
            ]
            for group in _packed(pieces, at_once):
                G_NP = torch.cat([sequence_gradients(a[rows], g[rows]).flatten(1) for _, rows, a, g in group])
                for q in range(0, len(low.U_QOR), at_once):
                    part = slice(q, q + at_once)
                    products_NQ = G_NP @ (low.U_QOR[part] @ low.V_QRI[part]).flatten(1).T
                    sizes = [len(a[rows]) for _, rows, a, _ in group]
                    for (batch, rows, _, _), found in zip(group, products_NQ.split(sizes), strict=True):
                        self._add(batch, name, found, rows, part)

    def _add(
        self, batch: int, name: str, products_NQ: Tensor, rows: slice = slice(None), queries: slice = slice(None)
    ) -> None:
        scores_NQ = -products_NQ.float().cpu()
        self.scores_NQ[batch][rows, queries] += scores_NQ
        if self.keep_layers:
            self.layers_NQL[batch][rows, queries, self.place[name]] = scores_NQ

    def tensors(self) -> dict[str, Tensor]:
        """``rows`` ``[N]``, ``scores`` ``[N, Q]`` and, where they are kept, ``layers`` ``[N, Q, L]``."""
        self._flush()
        out = {"rows": torch.from_numpy(np.concatenate(self.rows)), "scores": torch.cat(self.scores_NQ)}
        return out | ({"layers": torch.cat(self.layers_NQL)} if self.keep_layers else {})


def _packed(pieces: list[Any], most: int) -> Iterator[list[Any]]:
    """Pieces of several batches in groups of at most ``most`` sequences."""
    group, room = [], most
    for piece in pieces:
        size = len(piece[2][piece[1]])
        if group and size > room:
            yield group
            group, room = [], most
        group.append(piece)
        room -= size
    if group:
        yield group
