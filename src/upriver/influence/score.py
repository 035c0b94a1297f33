"""The training side: one pass over the corpus scores every sequence against every solved query.

    I_f(z) = - sum over layers of < v, sum_t g_t a_t^T >                                   eq. 25, 30

Three contractions give the same number.  Which is cheapest depends on the layer, the batch, the queries and the rank, and is
decided before the pass, by counting multiplications and bytes (:func:`upriver.runtime.cost.contraction`):

    tokens     sum_t (g_t U) . (V a_t)               M (O + I) Q R
    dense      form sum_t g_t a_t^T, times every v   M O I + N O I Q          and Q O I numbers held
    rebuilt    as dense, v = U V for every few batches, which wait until then with their M (O + I) numbers

Queries that are rebuilt are read again each time, so a scan holds those of one layer, however many there are; on an accelerator
they stay where they are multiplied.

Axes: N sequences, M tokens of a batch, Q queries, R rank, O outputs, I inputs; P = Q R columns; o and p some of the O rows at a
time; C parts of O.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.kernels import SIDES, aligned, matmul, side_by_side
from upriver.model.layers import Layer
from upriver.runtime.cost import Order, chunks, own_input
from upriver.tensors import LowRank, Scratch, accumulator_dtype, on_cpu, sequence_gradients
from upriver.text.batch import Batch

ROWS = 256  # of gradients that are formed at once, for queries that are multiplied out:
FEW_ROWS = 32  # as many of these, so that they meet in the caches
FEW, LONG = 1024, 4096  # pairs of a sequence and a query; numbers that one of them is multiplied along at once


class Route(NamedTuple):
    """How one layer is contracted with the queries."""

    order: Order
    U_OP: Tensor | None  # tokens: P = Q R columns
    V_IP: Tensor | None
    v_QOI: Tensor | None  # dense
    low: Callable[[], LowRank] | None  # rebuilt
    Q: int


Read = Callable[[], LowRank | Tensor]


def route(order: Order, read: Read, Q: int, like: Tensor) -> Route:
    """Lay one layer's ``Q`` solved queries, which ``read`` gives, out for its order, in the device and dtype of ``like``."""
    if order == "rebuilt":
        held = None if on_cpu(like) else _laid_out(read, like)
        return Route(order, None, None, None, lambda: held or _laid_out(read, like), Q)
    solved = read()
    if isinstance(solved, Tensor):
        return Route("dense", None, None, solved.to(like), None, Q)
    U_QOR, V_QRI = (x.to(like) for x in solved)
    if order == "dense":
        return Route(order, None, None, U_QOR @ V_QRI, None, Q)
    U_OP = U_QOR.permute(1, 0, 2).flatten(1).contiguous()
    return Route(order, U_OP, V_QRI.flatten(0, 1).T.contiguous(), None, None, Q)


def _laid_out(read: Read, like: Tensor) -> LowRank:
    U_QOR, V_QRI = read()
    return LowRank(U_QOR.to(like), V_QRI.to(like))


def contract(r: Route, a_NTI: Tensor, g_NTO: Tensor, scratch: Scratch) -> Tensor:
    """``< v_q, sum_t g_t a_t^T >`` for each sequence and query, ``[N, Q]``, by tokens or by dense queries."""
    if r.v_QOI is not None:
        return by_dense(r.v_QOI, a_NTI, g_NTO, scratch)
    assert r.U_OP is not None
    assert r.V_IP is not None
    return _by_tokens(r.U_OP, r.V_IP, r.Q, a_NTI, g_NTO)


def by_dense(v_QOI: Tensor, a_NTI: Tensor, g_NTO: Tensor, scratch: Scratch) -> Tensor:
    """Each sequence's gradient times every query, ``[N, Q]``, some sequences at a time."""

    def some(a_NTI: Tensor, g_NTO: Tensor) -> Tensor:
        G_NOI = scratch.take("gradients", (len(a_NTI), *v_QOI.shape[1:]), a_NTI)
        return dots(sequence_gradients(a_NTI, g_NTO, G_NOI), v_QOI)

    return torch.cat([some(*parts) for parts in _few(a_NTI, g_NTO, v_QOI[0].numel())])


def _by_tokens(U_OP: Tensor, V_IP: Tensor, Q: int, a_NTI: Tensor, g_NTO: Tensor) -> Tensor:
    """Every token times the factors of every query, ``[N, Q]``, some sequences at a time."""

    def some(a_NTI: Tensor, g_NTO: Tensor) -> Tensor:
        product_MP = matmul(g_NTO.flatten(0, 1), U_OP).mul_(matmul(a_NTI.flatten(0, 1), V_IP))
        product_NTQR = product_MP.view(*g_NTO.shape[:2], Q, -1)
        return product_NTQR.sum((1, 3), dtype=accumulator_dtype(product_MP.dtype))

    return torch.cat([some(*parts) for parts in _few(a_NTI, g_NTO, 2 * a_NTI.shape[1] * U_OP.shape[1])])


def _few(a_NTI: Tensor, g_NTO: Tensor, numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As many sequences at once as are worked on at once, of so many numbers each."""
    step = max(1, chunks(not on_cpu(a_NTI)).scored // (a_NTI.element_size() * numbers))
    return zip(a_NTI.split(step), g_NTO.split(step), strict=True)


def dots(G_NOI: Tensor, v_QOI: Tensor) -> Tensor:
    """``< v_q, G_n >``, ``[N, Q]``.

    On the CPU a float32 product of a few rows along many numbers keeps one thread busy; its parts, side by side, take a half to a
    third of the time (``benchmarks/kernels.py``).  In bfloat16 it is the other way round.
    """
    (N, O, I), Q = G_NOI.shape, len(v_QOI)
    if N * Q >= FEW or G_NOI.dtype == torch.bfloat16:
        return matmul(v_QOI.flatten(1), G_NOI.flatten(1).T).T  # the other way round takes longer with few queries
    if N > Q:  # few rows by many columns are faster than many by few (``benchmarks/kernels.py``)
        return dots(v_QOI, G_NOI).T
    rows = max(r for r in range(1, max(1, LONG // I) + 1) if O % r == 0)
    G_CNP = G_NOI.view(N, -1, rows * I).transpose(0, 1)
    v_CPQ = v_QOI.view(Q, -1, rows * I).permute(1, 2, 0)
    return torch.bmm(G_CNP, v_CPQ).sum(0, dtype=accumulator_dtype(G_NOI.dtype))


class Waiting(NamedTuple):
    """What one layer saw of a batch."""

    batch: int
    a_NTI: Tensor
    g_NTO: Tensor


class Score:
    """Consumer: raw influence of each sequence of a pass on every query, in total and layer by layer.

    Args:
        hold: how many batches wait, where queries are multiplied out for them.
        rebuild_bytes: of the rows of queries multiplied out at once in a layer, and of the gradients that meet them; None: what
            suits the device.
        scratch: memory to work in; one for all consumers of a scan.
    """

    def __init__(
        self,
        routes: dict[str, Route],
        Q: int,
        keep_layers: bool,
        hold: int = 1,
        rebuild_bytes: int | None = None,
        scratch: Scratch | None = None,
    ):
        self.routes, self.Q, self.keep_layers = routes, Q, keep_layers
        self.hold, self.rebuild_bytes = hold, rebuild_bytes
        self.place = {name: i for i, name in enumerate(routes)}
        self.rows: list[np.ndarray] = []
        self.scores_NQ: list[Tensor] = []
        self.layers_NQL: list[Tensor] = []
        self.scratch = scratch or Scratch()
        self.waiting: dict[str, list[Waiting]] = {}
        self.inputs: dict[str, Tensor] = {}  # of this batch, where several layers may share one

    def begin(self, batch: Batch) -> None:
        if len(self.rows) % self.hold == 0:
            self._flush()
        N = len(batch.rows_N)
        self.inputs = {}
        self.rows.append(batch.rows_N)
        self.scores_NQ.append(torch.zeros(N, self.Q, device=batch.device))
        if self.keep_layers:
            self.layers_NQL.append(torch.zeros(N, self.Q, len(self.routes), device=batch.device))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        route, batch = self.routes[layer.name], len(self.rows) - 1
        if route.order == "rebuilt":
            if self.hold > 1:
                a_NTI, g_NTO = self._kept(layer, a_NTI, g_NTO, batch % self.hold)
            self.waiting.setdefault(layer.name, []).append(Waiting(batch, a_NTI, g_NTO))
            if self.hold == 1:
                self._flush()
        else:
            self._add(batch, layer.name, contract(route, a_NTI, g_NTO, self.scratch))

    def _kept(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Padded copies in memory that later batches take over; an input that layers share waits once."""
        of = own_input(layer)
        if of not in self.inputs:
            self.inputs[of] = self.scratch.padded(f"a {place} {of}", a_NTI)
        return self.inputs[of], self.scratch.padded(f"g {place} {layer.name}", g_NTO)

    def _flush(self) -> None:
        """Score what waits, layer by layer."""
        for name in list(self.waiting):
            low, held = self.routes[name].low, self.waiting.pop(name)
            assert low is not None
            sizes = [len(x.a_NTI) for x in held]
            for x, found_NQ in zip(held, self._rebuilt(low(), held).split(sizes), strict=True):
                self._add(x.batch, name, found_NQ)

    def _rebuilt(self, low: LowRank, held: list[Waiting]) -> Tensor:
        """``< U_q V_q, G_n >``, ``[N, Q]``, some rows of the larger side and whole rows of the smaller at a time.

        Half of the rows on each half of the cores: the products are too small to keep all of them busy, and what both halves
        hold stays in the caches.
        """
        U_QOR, V_QRI = low
        left, right = [x.g_NTO for x in held], [x.a_NTI for x in held]
        if V_QRI.shape[2] > U_QOR.shape[1]:
            U_QOR, V_QRI, left, right = V_QRI.transpose(1, 2), U_QOR.transpose(1, 2), right, left
        if self.hold == 1 and right[0].shape[2] != aligned(right[0].shape[2]):
            right = [self.scratch.padded("a", x_NTI) for x_NTI in right]
        V_QRI = self.scratch.padded("V", V_QRI)
        (Q, O), I, N = U_QOR.shape[:2], V_QRI.shape[2], sum(map(len, right))
        room = (self.rebuild_bytes or chunks(not on_cpu(U_QOR)).rebuilt) // (2 * SIDES * U_QOR.element_size() * I)
        most = (ROWS, FEW_ROWS) if on_cpu(U_QOR) else (O, O)
        rows, few = max(1, min(most[0], room // N)), max(1, min(most[1], room // Q))
        middle = min(O, -(-O // (2 * FEW_ROWS)) * FEW_ROWS)
        halves = (range(0, middle, rows), range(middle, O, rows))

        def half(side: int) -> Tensor:
            sums_NQ = torch.zeros(N, Q, dtype=accumulator_dtype(U_QOR.dtype), device=U_QOR.device)
            for start in halves[side]:
                part = slice(start, min(start + rows, halves[side].stop))
                G_NoI = self.scratch.take(f"gradients {side}", (N, part.stop - start, I), U_QOR)
                outs = G_NoI.split([len(x) for x in right])
                for out_NoI, g_NTO, a_NTI in zip(outs, left, right, strict=True):
                    sequence_gradients(a_NTI, g_NTO[:, :, part], out_NoI)
                for G_NpI, U_QpR in zip(G_NoI.split(few, 1), U_QOR[:, part].split(few, 1), strict=True):
                    v_QpI = self.scratch.take(f"queries {side}", (Q, U_QpR.shape[1], I), U_QOR)
                    torch.bmm(U_QpR, V_QRI, out=v_QpI)
                    sums_NQ += matmul(G_NpI.flatten(1), v_QpI.flatten(1).T)
            return sums_NQ

        return torch.stack(list(side_by_side(half, range(SIDES), U_QOR.device))).sum(0)

    def _add(self, batch: int, name: str, products_NQ: Tensor) -> None:
        scores_NQ = -products_NQ.float()
        self.scores_NQ[batch] += scores_NQ
        if self.keep_layers:
            self.layers_NQL[batch][:, :, self.place[name]] = scores_NQ

    def result(self) -> dict[str, Tensor]:
        """``scores`` ``[N, Q]`` in the order of the rows and, where they are kept, ``layers`` ``[N, Q, L]``; on the host."""
        self._flush()
        order = torch.from_numpy(np.argsort(np.concatenate(self.rows), kind="stable"))
        out = {"scores": torch.cat(self.scores_NQ).cpu()[order]}
        return out | ({"layers": torch.cat(self.layers_NQL).cpu()[order]} if self.keep_layers else {})
