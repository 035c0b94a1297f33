"""How good a solution is, on sequences that played no part in making it.

``E(v) = q.v - 1/2 v.(G + lambda)v`` over held-out sequences is, on average, largest at the true solution, so it judges any ``v``
without knowing the truth.  Its first part is the query's own; what has to be measured is ``v.G v``, the mean over sequences of
``sum_m (J_m v)^T H_m (J_m v)``: for softmax ``sum_t Var_p(J_t v)``.  Axes: Q solutions, P tracked parameters, M outputs, C their
width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from upriver.curvature.base import Grads
from upriver.curvature.products import Linear, Tracked
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.text.batch import Sequences


class Judged(NamedTuple):
    """``energy_Q``, the factor ``best_scale_Q`` of ``v`` that would make it largest, and the energy there."""

    energy_Q: Tensor
    best_scale_Q: Tensor
    best_energy_Q: Tensor


def held_out(
    model: Model,
    layers: list[Layer],
    data: Sequences,
    rows: np.ndarray,
    solutions: list[Grads],
    batch_tokens: int = 4096,
    *,
    memory_bytes: int | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Tensor]:
    """``v.G v`` of every vector of each set of ``solutions``, float64 ``[Q]``, with ``G`` over the sequences ``rows``.

    Exact, by forward mode alone: about two thirds of a plain training step a vector and token.

    Args:
        memory_bytes: for what vectors hold while they go through a batch side by side; None: 1 GiB.
        advance: told the tokens of each batch.
    """
    function = Tracked(model, layers)
    v_QP = torch.cat([function.space.flatten(v) for v in solutions]).to(model.like)
    total_Q = torch.zeros(len(v_QP), dtype=torch.float64)
    with function.differentiable(), torch.no_grad():
        for batch in function.linear(data, rows, batch_tokens, memory_bytes):

            def square(v_P: Tensor, batch: Linear = batch) -> Tensor:
                Jv_MC = batch.along(v_P)
                return (Jv_MC * batch.curved(Jv_MC)).sum()

            total_Q += torch.cat([vmap(square)(few).double().cpu() for few in v_QP.split(batch.width)])
            advance(int(data.lengths_N[batch.rows].sum()))
    return list((total_Q / len(rows)).split([len(next(iter(v.values()))) for v in solutions]))


def judge(q: Grads, v: Grads, vGv_Q: Tensor, lambdas: Mapping[str, float]) -> Judged:
    """The energy of the solutions ``v`` of the queries ``q``, damped by ``lambdas`` (:meth:`Curvature.lambdas`)."""
    q_dot_v_Q = torch.stack([(q[name] * v[name]).double().sum((1, 2)) for name in v]).sum(0)
    damped_Q = torch.stack([lambdas[name] * v[name].double().square().sum((1, 2)) for name in v]).sum(0)
    return energy(q_dot_v_Q.cpu(), vGv_Q, damped_Q.cpu())


def energy(q_dot_v_Q: Tensor, vGv_Q: Tensor, damped_Q: Tensor) -> Judged:
    """From ``q.v``, ``v.G v`` and ``sum_l lambda_l |v_l|^2``; a vector of zeros has energy 0 at any scale."""
    length_Q = vGv_Q + damped_Q  # v.(G + lambda)v
    scale_Q = torch.where(length_Q > 0, q_dot_v_Q / length_Q, 0.0)
    return Judged(q_dot_v_Q - length_Q / 2, scale_Q, q_dot_v_Q * scale_Q / 2)
