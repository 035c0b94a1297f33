"""The training side: one pass over the corpus scores every sequence against every solved query.

    I_f(z) = - sum over layers of < v, sum_t g_t a_t^T >                                   eq. 25, 30

Three contractions give the same number.  Which is cheapest depends on the layer, the batch, the queries and the rank, and is
decided before the pass, by counting multiplications and bytes:

    tokens     sum_t (g_t U) . (V a_t)               M (O + I) Q R
    dense      form sum_t g_t a_t^T, times every v   M O I + N O I Q          and Q O I numbers held
    rebuilt    as dense, v = U V in each batch       M O I + N O I Q + Q O I R
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.model.layers import Layer
from upriver.tensors import LowRank, sequence_gradients
from upriver.text.batch import Batch

DENSE_BYTES = 2 << 30  # rebuilt queries held through the pass, over all layers
CHUNK_BYTES = 256 << 20  # rebuilt queries held at once in one layer and batch
Order = Literal["tokens", "dense", "rebuilt"]


class Route(NamedTuple):
    """How one layer is contracted with the queries."""

    order: Order
    U_OP: Tensor | None  # tokens: P = Q R columns
    V_IP: Tensor | None
    v_PQ: Tensor | None  # dense: P = O I rows
    low: LowRank | None  # rebuilt
    Q: int


class Costs(NamedTuple):
    """Multiplications of one batch in one layer, by order."""

    tokens: float
    dense: float
    rebuilt: float


def count(O: int, I: int, M: int, N: int, Q: int, R: int) -> Costs:
    """Multiplications for a batch of ``M`` tokens in ``N`` sequences, ``Q`` queries of rank ``R``."""
    gradient = M * O * I + N * O * I * Q
    return Costs(M * (O + I) * Q * R, gradient, gradient + Q * O * I * R)


def choose_orders(
    layers: list[Layer], M: int, N: int, Q: int, R: int | None, budget: int = DENSE_BYTES
) -> dict[str, Order]:
    """The cheapest order of each layer, as long as all dense queries together stay within ``budget`` bytes."""
    orders: dict[str, Order] = {}
    for x in layers:
        costs = count(x.O, x.I, M, N, Q, R or 1)
        size = 4 * Q * x.O * x.I
        if R is None or (costs.dense < costs.tokens and size <= budget):
            orders[x.name], budget = "dense", budget - size
        else:
            orders[x.name] = "tokens" if costs.tokens <= costs.rebuilt else "rebuilt"
    return orders


def route(order: Order, solved: LowRank | Tensor, like: Tensor) -> Route:
    """Lay one layer's solved queries out for its order, in the device and dtype of ``like``."""
    if isinstance(solved, Tensor):
        return Route("dense", None, None, solved.flatten(1).T.contiguous().to(like), None, len(solved))
    U_QOR, V_QRI = (x.to(like) for x in solved)
    Q = len(U_QOR)
    if order == "tokens":
        U_OP = U_QOR.permute(1, 0, 2).flatten(1).contiguous()
        return Route(order, U_OP, V_QRI.flatten(0, 1).T.contiguous(), None, None, Q)
    if order == "dense":
        return Route(order, None, None, (U_QOR @ V_QRI).flatten(1).T.contiguous(), None, Q)
    return Route(order, None, None, None, LowRank(U_QOR, V_QRI), Q)


def contract(r: Route, a_NTI: Tensor, g_NTO: Tensor) -> Tensor:
    """``< v_q, sum_t g_t a_t^T >`` for each sequence and query, ``[N, Q]``."""
    if r.order == "tokens":
        assert r.U_OP is not None
        assert r.V_IP is not None
        product_NTP = (g_NTO @ r.U_OP).mul_(a_NTI @ r.V_IP)
        return product_NTP.unflatten(2, (r.Q, -1)).sum((1, 3), dtype=_sum_dtype(product_NTP))
    G_NP = sequence_gradients(a_NTI, g_NTO).flatten(1)
    if r.v_PQ is not None:
        return G_NP @ r.v_PQ
    assert r.low is not None
    chunk = max(1, CHUNK_BYTES // (4 * G_NP.shape[1]))
    parts = zip(r.low.U_QOR.split(chunk), r.low.V_QRI.split(chunk), strict=True)
    return torch.cat([G_NP @ (U @ V).flatten(1).T for U, V in parts], 1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Score:
    """Consumer: raw influence of each sequence of a pass on every query, in total and layer by layer."""

    def __init__(self, routes: dict[str, Route], Q: int, keep_layers: bool):
        self.routes, self.Q, self.keep_layers = routes, Q, keep_layers
        self.place = {name: i for i, name in enumerate(routes)}
        self.rows: list[np.ndarray] = []
        self.scores_NQ: list[Tensor] = []
        self.layers_NQL: list[Tensor] = []

    def begin(self, batch: Batch) -> None:
        N = len(batch.rows_N)
        self.rows.append(batch.rows_N)
        self.scores_NQ.append(torch.zeros(N, self.Q))
        if self.keep_layers:
            self.layers_NQL.append(torch.zeros(N, self.Q, len(self.routes)))

    def __call__(self, layer: Layer, a_NTI: Tensor, g_NTO: Tensor) -> None:
        scores_NQ = -contract(self.routes[layer.name], a_NTI, g_NTO).float().cpu()
        self.scores_NQ[-1] += scores_NQ
        if self.keep_layers:
            self.layers_NQL[-1][:, :, self.place[layer.name]] = scores_NQ

    def tensors(self) -> dict[str, Tensor]:
        out = {"rows": torch.from_numpy(np.concatenate(self.rows)), "scores": torch.cat(self.scores_NQ)}
        return out | ({"layers": torch.cat(self.layers_NQL)} if self.keep_layers else {})
