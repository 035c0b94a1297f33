"""Exact metagradients: the derivative of ``f`` after training by the weight of every example, by replaying it backwards.

    d f(theta_T) / d w_n = sum over the steps t of <adjoint of the gradient at t, grad L(z_n) at theta_t> / B

Every ``sqrt(steps)``-th state of the run is kept, and the ones between are computed again.  Axes: N sequences, Q queries,
B sequences of a batch, P parameters.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp, vmap

from upriver.evaluate.training import State, Trainer, Whole
from upriver.influence.queries import Measured, batches, measurements, weighted_measurement
from upriver.model.model import Model


class Metagradients(NamedTuple):
    """``nats_NQ`` is what one more copy of each sequence adds to each ``f``, to first order; ``f_Q`` that after training."""

    nats_NQ: np.ndarray
    f_Q: np.ndarray
    model: Model  # as trained


def metagradients(trainer: Trainer, queries: Measured, seed: int = 0) -> Metagradients:
    """The derivative of every query's ``f`` after ``trainer`` has trained on all of its data, by each sequence's weight.

    The weight is 1 for all of them, and a batch is divided by its sequences whatever they weigh.  Where SGD has converged this is
    the influence per copy, ``I_f / N`` (eq. 6), with ``weight_decay`` for the damping.

    It takes about three plain trainings and, for each query, twice that; memory for ``2 sqrt(steps)`` states and, for each query,
    a few of them: models of up to about a million weights.  Train in float64 (``Recipe(dtype="float64")``) to
    compare it with differences of retrained models.

    Raises:
        NumericalError: the training diverged.

    Example:
        >>> up.metagradients(up.Trainer(model, examples, up.Recipe(dtype="float64")), queries).nats_NQ.shape
    """
    whole, plan = trainer.begun(seed), trainer.recipe.batches(len(trainer.data), seed)
    every = int(np.ceil(np.sqrt(len(plan))))
    nats_NQ = torch.zeros(len(trainer.data), len(queries), dtype=whole.theta_P.dtype, device=whole.theta_P.device)

    def step(state: State, w_B: Tensor, at: int) -> State:
        return trainer.step(whole, state, w_B, plan[at], at, len(plan[at]))

    def plain(state: State, at: int) -> State:
        return step(state, whole.theta_P.new_ones(len(plan[at])), at)

    with whole.differentiable():
        state = State.start(whole.theta_P)
        kept = {}
        for at in range(len(plan)):
            if at % every == 0:
                kept[at] = state
            state = plain(state, at)
        adjoint = State.start(_slopes(whole, state.theta_P, queries))
        for start in sorted(kept, reverse=True):
            between = [kept.pop(start)]
            for at in range(start, min(start + every, len(plan)) - 1):
                between.append(plain(between[-1], at))
            for at in range(start + len(between) - 1, start - 1, -1):
                ones_B = whole.theta_P.new_ones(len(plan[at]))
                pull = vjp(lambda state, w_B, at=at: step(state, w_B, at), between.pop(), ones_B)[1]
                adjoint, w_QB = vmap(pull)(adjoint)
                nats_NQ[torch.from_numpy(plan[at])] += w_QB.T
    model = trainer.ended(whole, state)
    return Metagradients(nats_NQ.cpu().double().numpy(), measurements(model, queries), model)


def _slopes(whole: Whole, theta_P: Tensor, queries: Measured) -> Tensor:
    """The gradient of every query's measurement in all weights, ``[Q, P]``."""
    found = []
    for query in range(len(queries)):
        with torch.enable_grad():
            at_P = theta_P.detach().clone().requires_grad_()
            model = whole.at(at_P)
            f = torch.stack([weighted_measurement(model, b.to(at_P.device)) for b in batches(queries, [query])]).sum()
            found.append(torch.autograd.grad(f, at_P)[0])
    return torch.stack(found)
