"""The proximal Bregman response function: what influence functions approximate, computed by minimising it.

    theta(eps) = argmin (1/N) sum_i D(h(x_i), h_s(x_i)) + eps L(z) + (lambda/2) ||theta - theta_s||^2          eq. 7, 8

``D`` is the Bregman divergence of the loss as a function of the outputs: KL(old || new) summed over tokens for softmax
cross-entropy, half the squared difference for (half) squared error.  The derivative at ``eps = 0`` is
``-(G + lambda I)^-1 grad L(z)`` (eq. 9); here neither ``G`` nor its inverse is used, so the two can be compared.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vjp

from upriver.curvature.base import Grads, Solution
from upriver.curvature.iterative import conjugate_gradient
from upriver.curvature.products import Tracked
from upriver.errors import ConfigError
from upriver.influence.queries import Measured, measurements
from upriver.model.layers import Layer
from upriver.model.losses import Task
from upriver.model.model import Model
from upriver.text.batch import Batch, Sequences

NEWTON_STEPS, HALVINGS = 50, 30
INNER_TOLERANCE, INNER_STEPS = 1e-3, 1000


class Anchor(NamedTuple):
    """A batch of the data with its outputs ``h_s`` at the trained weights."""

    batch: Batch
    h_MC: Tensor


class Response(NamedTuple):
    """The influence of one sequence on each query, ``[Q]``; when ``converged`` is False, ``stats["why"]`` says why."""

    value_Q: np.ndarray
    converged: bool
    stats: dict[str, Any]


def bregman(task: Task, h_MC: Tensor, anchor: Anchor) -> Tensor:
    """``L(h) - L(h_s) - <grad L(h_s), h - h_s>``, summed over the batch; the labels cancel."""
    slope_MC = grad(lambda h: task.loss_of(h, anchor.batch))(anchor.h_MC)
    rise = task.loss_of(h_MC, anchor.batch) - task.loss_of(anchor.h_MC, anchor.batch)
    return rise - (slope_MC * (h_MC - anchor.h_MC)).sum()


class ProximalBregman:
    """The objective over the tracked layers of a small model, best in float64, and its minimisers.

    Memory: what differentiating twice keeps of one pass over all of the data.

    Example:
        >>> pbrf = ProximalBregman(model, layers, data, damping=1e-3)
        >>> pbrf.influence(data.batch(np.array([7])), queries)  # of sequence 7 on every query
    """

    def __init__(
        self,
        model: Model,
        layers: list[Layer],
        data: Sequences,
        damping: float,
        *,
        batch_tokens: int = 4096,
        tolerance: float = 1e-9,
    ):
        if not damping > 0:
            raise ConfigError(f"the proximity term needs a positive damping: got {damping}")
        self.function, self.damping, self.N = Tracked(model, layers), damping, len(data)
        self.tolerance, self.theta_P = tolerance, self.function.theta_P
        batches = [data.batch(rows).to(model.device) for rows in data.plan(batch_tokens)]
        with self.function.differentiable(), torch.no_grad():
            self.anchors = [Anchor(b, self.function.outputs(self.theta_P, b)) for b in batches]

    def objective(self, moved_P: Tensor, z: Batch, epsilon: float) -> Tensor:
        """The objective at ``theta_s + moved``."""
        with self.function.differentiable():
            return torch.stack([term(moved_P) for term in self._terms(z, epsilon)]).sum()

    def minimise(self, z: Batch, epsilon: float, start: Grads | None = None) -> Solution:
        """The displacement ``theta(eps) - theta_s``, ``[1, O, I]`` for every layer, by Newton's method with conjugate gradients.

        It has converged when the gradient is at most ``tolerance`` times its length at ``theta_s``.

        Args:
            start: a guess of ``d theta / d eps``, ``[1, O, I]`` for every layer, from which to go on.  What has converged owes it
                nothing but time.
        """
        d_P = torch.zeros_like(self.theta_P)
        if start is not None:
            d_P = epsilon * self.function.space.flatten(start)[0].to(d_P)
        with self.function.differentiable():
            moved_P, stats = self._newton(self._terms(z, epsilon), d_P)
        return Solution(self.function.space.unflatten(moved_P[None]), "why" not in stats, stats)

    def derivative(self, z: Batch, epsilon: float = 1e-4) -> Solution:
        """``d theta / d eps`` at zero by central differences, ``[1, O, I]`` for every layer."""
        up, down = self.minimise(z, epsilon), self.minimise(z, -epsilon)
        value = {name: (up.value[name] - down.value[name]) / (2 * epsilon) for name in up.value}
        return Solution(value, up.converged and down.converged, down.stats | up.stats)

    def measure(self, moved: Grads, queries: Measured) -> np.ndarray:
        """``f`` of every query at ``theta_s + moved``, float64 ``[Q]``."""
        model = self.function.model
        module = self.function.at(self.theta_P + self.function.space.flatten(moved)[0])
        return measurements(Model(module, model.tokenizer, model.task), queries)

    def influence(self, z: Batch, queries: Measured, epsilon: float = 1e-4, start: Grads | None = None) -> Response:
        """``d f / d eps`` at zero of every query by central differences: the ground truth of ``I_f(z)`` (eq. 5)."""
        up, down = self.minimise(z, epsilon, start), self.minimise(z, -epsilon, start)
        change_Q = (self.measure(up.value, queries) - self.measure(down.value, queries)) / (2 * epsilon)
        return Response(change_Q, up.converged and down.converged, down.stats | up.stats)

    def _terms(self, z: Batch, epsilon: float) -> list[Callable[[Tensor], Tensor]]:
        """The summands of the objective, each a function of the displacement."""
        f, z = self.function, z.to(self.theta_P.device)

        def divergence(anchor: Anchor) -> Callable[[Tensor], Tensor]:
            task = f.model.task
            return lambda d: bregman(task, f.outputs(self.theta_P + d, anchor.batch), anchor) / self.N

        def rest(d_P: Tensor) -> Tensor:
            return epsilon * f.loss(self.theta_P + d_P, z) + self.damping / 2 * d_P.square().sum()

        return [*map(divergence, self.anchors), rest]

    def _newton(self, terms: list[Callable[[Tensor], Tensor]], d_P: Tensor) -> tuple[Tensor, dict[str, Any]]:
        slopes = [grad(term) for term in terms]

        def slope(d_P: Tensor) -> Tensor:
            return torch.stack([part(d_P) for part in slopes]).sum(0)

        start, g_P, steps = float(slope(torch.zeros_like(d_P)).norm()), slope(d_P), 0
        while float(g_P.norm()) > self.tolerance * start and steps < NEWTON_STEPS:
            move_P = _newton_move(slopes, d_P, g_P)
            tries = (d_P + 0.5**k * move_P for k in range(HALVINGS))
            lower = ((d, g) for d, g in ((d, slope(d)) for d in tries) if float(g.norm()) < float(g_P.norm()))
            found = next(lower, None)
            if found is None:
                break
            (d_P, g_P), steps = found, steps + 1
        left = float(g_P.norm()) / max(start, torch.finfo(g_P.dtype).tiny)
        stats: dict[str, Any] = {"steps": steps, "gradient": left}
        if not left <= self.tolerance:
            stats["why"] = (
                f"after {steps} Newton steps the gradient is still {left:.1e} of what it was at the trained weights; "
                "use float64, a smaller epsilon, or a larger damping"
            )
        return d_P, stats


def _newton_move(slopes: list[Callable[[Tensor], Tensor]], d_P: Tensor, g_P: Tensor) -> Tensor:
    """``- H^-1 g`` with the objective's own Hessian ``H`` at ``d``."""
    pulls = [vjp(part, d_P)[1] for part in slopes]  # H is its own transpose

    def hessian(v_1P: Tensor) -> Tensor:
        return torch.stack([pull(v_1P[0])[0] for pull in pulls]).sum(0)[None]

    return conjugate_gradient(hessian, -g_P[None], None, INNER_TOLERANCE, INNER_STEPS).v_QP[0]
