"""Solve ``(G + lambda I) v = q`` by products alone: conjugate gradients, and Neumann iterations (LiSSA, ASTRA).

Both take a :class:`BlockCurvature` such as EK-FAC as preconditioner and start from its solution: that is the refinement of
EK-FAC.  Failure is data: ``Solution.converged`` is False and ``stats["why"]`` says why and what to change.
Axes: Q systems solved side by side, P tracked parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.curvature.base import Curvature, Damping, Grads, Solution
from upriver.curvature.blocks import BlockCurvature
from upriver.curvature.energy import held_out, judge
from upriver.curvature.products import Products

Map = Callable[[Tensor], Tensor]  # v_QP -> v_QP
GAIN = 0.01  # of the held-out energy: a step that brings less is the last
DIVERGED = 1e3  # times the right-hand side: a residual that has grown so far does not come back


class Outcome(NamedTuple):
    """What a solver of flat systems ends with; ``why`` is empty when it converged."""

    v_QP: Tensor
    steps: int | list[int]  # of all, or of each
    before_Q: Tensor  # ||q - A v|| / ||q|| of the vectors that it started from
    residual_Q: Tensor  # and at the end
    why: str


class System(NamedTuple):
    """``A = G + diag(lambda_P)`` and the preconditioner."""

    product: Products
    lambda_P: Tensor
    precondition: Map | None

    def A(self, v_QP: Tensor, rows: np.ndarray | None = None) -> Tensor:
        return self.product(v_QP, rows) + self.lambda_P * v_QP


class Iterative(Curvature):
    """What the iterative solvers share: the matrix, the preconditioner, and the damping."""

    def __init__(self, product: Products, preconditioner: BlockCurvature | None = None):
        self.product, self.preconditioner, self.space = product, preconditioner, product.space

    tolerance: float

    def matvec(self, q: Grads, damping: Damping) -> Grads:
        q_QP = self.space.flatten(q)
        return self.space.unflatten(self._system(q_QP, damping).A(q_QP))

    def lambdas(self, damping: Damping) -> dict[str, float]:
        """Relative damping is that of the preconditioner's layers, so that both are damped alike; without one, that of the
        layers' blocks of the matrix itself (:attr:`Products.mean_eigenvalues`)."""
        if not damping.relative:
            return dict.fromkeys(self.space.shapes, damping.value)
        if self.preconditioner is not None:
            return self.preconditioner.lambdas(damping)
        return {name: damping.of(mean) for name, mean in self.product.mean_eigenvalues.items()}

    def _system(self, q_QP: Tensor, damping: Damping) -> System:
        lambda_P = self.space.spread(self.lambdas(damping), q_QP)
        if self.preconditioner is None:
            return System(self.product, lambda_P, None)
        blocks = {name: self.preconditioner.block(name).to(q_QP) for name in self.space.shapes}
        loaded = BlockCurvature(blocks, blocks.__getitem__)

        def precondition(r_QP: Tensor) -> Tensor:
            return self.space.flatten(loaded.solve(self.space.unflatten(r_QP), damping).value)

        return System(self.product, lambda_P, precondition)

    def _solved(self, q: Grads, damping: Damping, run: Callable[[System, Tensor], Outcome]) -> Solution:
        q_QP = self.space.flatten(q)
        system, done = self._system(q_QP, damping), self.product.done
        out = run(system, q_QP)
        stats: dict[str, Any] = {
            "steps": out.steps,
            "products": self.product.done - done,  # each is a vector times the matrix, over all its sequences
            "residual_before": out.before_Q.tolist(),
            "residual": out.residual_Q.tolist(),
            "tolerance": self.tolerance,
        }
        return Solution(self.space.unflatten(out.v_QP), not out.why, stats | ({"why": out.why} if out.why else {}))


class ConjugateGradient(Iterative):
    """Conjugate gradients, every query by itself, until ``||q - A v|| <= tolerance ||q||``.

    From EK-FAC's solution the first iterations gain the most.  Where there are far fewer sequences than weights, ``G`` has few
    eigenvalues apart from zero, and plain conjugate gradients need fewer iterations to a *tight* tolerance.

    Args:
        stops: sequences, best others than those of ``product``: a query ends with the step after which its energy on them
            (:mod:`upriver.curvature.energy`) rises by less than a hundredth, and keeps the best of its solutions.  The residual
            on few sequences goes on to fall where the solution no longer gets better.

    Example:
        >>> ConjugateGradient(product, factors.curvature()).solve(q, Damping())  # EK-FAC, refined
    """

    def __init__(
        self,
        product: Products,
        preconditioner: BlockCurvature | None = None,
        tolerance: float = 1e-5,
        max_iterations: int = 1000,
        stops: np.ndarray | None = None,
    ):
        super().__init__(product, preconditioner)
        self.tolerance, self.max_iterations, self.stops = tolerance, max_iterations, stops

    def solve(self, q: Grads, damping: Damping) -> Solution:
        how = self.tolerance, self.max_iterations

        def run(system: System, q_QP: Tensor) -> Outcome:
            judged = None if self.stops is None else partial(self._energy, self.stops, damping, q_QP)
            return conjugate_gradient(system.A, q_QP, system.precondition, *how, judged)

        return self._solved(q, damping, run)

    def _energy(self, rows: np.ndarray, damping: Damping, q_QP: Tensor, v_QP: Tensor, on: Tensor) -> Tensor:
        """The energy of solutions of the queries ``on``, which conjugate gradients raise step by step where it is their own."""
        p, v = self.product, self.space.unflatten(v_QP)
        model, layers = p.function.model, p.function.layers
        (vGv_Q,) = held_out(model, layers, p.data, rows, [v], p.batch_tokens, memory_bytes=p.memory_bytes)
        return judge(self.space.unflatten(q_QP[on]), v, vGv_Q, self.lambdas(damping)).energy_Q.to(q_QP.device)


def conjugate_gradient(
    A: Map,
    q_QP: Tensor,
    precondition: Map | None,
    tolerance: float,
    most: int,
    judged: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Outcome:
    """Preconditioned conjugate gradients from the preconditioner's own solution (from zero without one).

    The recursion goes on to half the tolerance.  Where it says that it has converged the residual is measured once more, as
    rounding parts the two; else its own is given.  ``judged`` gives the worth of solutions ``v_QP`` of some of the queries:
    each ends with its best.
    """
    M = precondition or torch.clone
    v_QP = M(q_QP) if precondition else torch.zeros_like(q_QP)
    r_QP = q_QP - A(v_QP) if precondition else q_QP.clone()
    z_QP = M(r_QP)
    p_QP, rz_Q = z_QP.clone(), (r_QP * z_QP).sum(1)
    scale_Q = q_QP.norm(dim=1).clamp(min=torch.finfo(q_QP.dtype).tiny)
    before_Q = r_QP.norm(dim=1) / scale_Q
    bent_Q = torch.zeros(len(q_QP), dtype=torch.bool, device=q_QP.device)
    ended_Q, steps_Q, everyone = bent_Q.clone(), torch.zeros_like(bent_Q, dtype=torch.long), torch.arange(len(q_QP))
    best_Q = judged(v_QP, everyone) if judged else None
    steps = 0
    while steps < most:
        on = ((r_QP.norm(dim=1) > tolerance / 2 * scale_Q) & ~bent_Q & ~ended_Q).nonzero()[:, 0]
        if not len(on):
            break
        p, Ap = p_QP[on], A(p_QP[on])
        curve = (p * Ap).sum(1)
        bent_Q[on] = ~(curve > 0)
        step = torch.where(curve > 0, rz_Q[on] / curve, 0.0)[:, None]
        moved = v_QP[on] + step * p
        if judged and best_Q is not None:
            worth, before = judged(moved, on), best_Q[on]
            ended_Q[on] = worth <= before + GAIN * before.abs()
            best_Q[on], kept = torch.maximum(worth, before), (worth > before)[:, None]
            moved, step = torch.where(kept, moved, v_QP[on]), torch.where(kept, step, 0.0)
        v_QP[on] = moved
        r_QP[on] -= step * Ap
        steps_Q[on] += 1
        z = M(r_QP[on])
        rz = (r_QP[on] * z).sum(1)
        p_QP[on] = z + (rz / rz_Q[on])[:, None] * p
        rz_Q[on] = rz
        steps += 1
    if steps and bool((r_QP.norm(dim=1) <= tolerance * scale_Q).any()):
        r_QP = q_QP - A(v_QP)
    residual_Q = r_QP.norm(dim=1) / scale_Q
    unfinished = residual_Q[~ended_Q]
    why = _why_not(unfinished, bent_Q, tolerance, steps, most) if len(unfinished) else ""
    return Outcome(v_QP, steps_Q.tolist() if judged else steps, before_Q, residual_Q, why)


def _why_not(residual_Q: Tensor, bent_Q: Tensor, tolerance: float, steps: int, most: int) -> str:
    if bent_Q.any():
        return (
            f"the damped matrix is not positive definite: no positive curvature along a search direction of {int(bent_Q.sum())} "
            "queries; use the Gauss-Newton matrix, or a larger damping"
        )
    worst = float(residual_Q.max())
    if worst <= tolerance:
        return ""
    if steps < most:
        return (
            f"rounding: the relative residual is {worst:.1e}, above the tolerance of {tolerance:.0e}, where the recursion ended; "
            "use float64, or a larger tolerance"
        )
    return (
        f"the relative residual is {worst:.1e} after {steps} steps, above the tolerance of {tolerance:.0e}; "
        "allow more steps, a larger damping, or give a preconditioner such as EK-FAC"
    )


class Neumann(Iterative):
    """``v <- v + step M (q - A v)``, over all sequences or a few drawn at random in each step.

    Without a preconditioner (``M = I``) this is LiSSA; ``step`` is one over what Koh and Liang call the scale, and must stay
    below ``2 / (largest eigenvalue + lambda)`` of every batch drawn.  Preconditioned with EK-FAC it is ASTRA (arXiv 2507.14740),
    whose first iterate is EK-FAC's own solution at ``step = 1``.

    Args:
        step: None takes ``1 / (largest eigenvalue of M G + lambda)`` over all sequences, by power iteration.
        sequences: how many are drawn, with replacement, in each step; None takes all.

    Example:
        >>> Neumann(product, step=0.1, steps=5_000, sequences=128).solve(q, Damping.parse(1e-2))  # LiSSA
    """

    def __init__(
        self,
        product: Products,
        preconditioner: BlockCurvature | None = None,
        *,
        step: float | None = None,
        steps: int = 1000,
        sequences: int | None = None,
        tolerance: float = 1e-3,
        seed: int = 0,
    ):
        super().__init__(product, preconditioner)
        self.step, self.steps, self.sequences, self.tolerance, self.seed = step, steps, sequences, tolerance, seed

    def solve(self, q: Grads, damping: Damping) -> Solution:
        found = 0.0

        def run(system: System, q_QP: Tensor) -> Outcome:
            nonlocal found
            M = system.precondition or torch.clone
            found = self.step or 1 / power_iteration(lambda v: M(system.A(v)), q_QP)
            return self._iterate(system, q_QP, lambda r: found * M(r))

        solution = self._solved(q, damping, run)
        return solution._replace(stats=solution.stats | {"step": found})

    def _iterate(self, system: System, q_QP: Tensor, move: Map) -> Outcome:
        rng = np.random.default_rng(self.seed)
        norm_Q = q_QP.norm(dim=1).clamp(min=torch.finfo(q_QP.dtype).tiny)
        v_QP, rows, before_Q = move(q_QP), None, None
        for done in range(1, self.steps + 1):
            if self.sequences is not None:
                rows = rng.choice(self.product.rows, self.sequences)
            r_QP = q_QP - system.A(v_QP, rows)
            residual_Q = r_QP.norm(dim=1) / norm_Q
            before_Q = residual_Q if before_Q is None else before_Q
            if not bool((residual_Q <= DIVERGED).all()):
                return Outcome(v_QP, done, before_Q, residual_Q, self._diverged(done, residual_Q))
            if rows is None and bool((residual_Q <= self.tolerance).all()):
                return Outcome(v_QP, done, before_Q, residual_Q, "")
            v_QP = v_QP + move(r_QP)
        residual_Q = (q_QP - system.A(v_QP)).norm(dim=1) / norm_Q
        before_Q = residual_Q if before_Q is None else before_Q
        return Outcome(v_QP, self.steps, before_Q, residual_Q, self._unfinished(float(residual_Q.max())))

    def _diverged(self, done: int, residual_Q: Tensor) -> str:
        return (
            f"diverged: the relative residual is {float(residual_Q.max()):.1e} after {done} steps; the step is too large for the "
            "largest eigenvalue; give a smaller step, more sequences to each step, or a larger damping"
        )

    def _unfinished(self, worst: float) -> str:
        if worst <= self.tolerance:
            return ""
        drawn = "" if self.sequences is None else ", draw more sequences to each step"
        return (
            f"the relative residual is {worst:.1e} after {self.steps} steps, above the tolerance of {self.tolerance:.0e}; "
            f"allow more steps{drawn}, or give a preconditioner such as EK-FAC"
        )


def power_iteration(A: Map, like_QP: Tensor, steps: int = 30) -> float:
    """The largest eigenvalue of ``A``, from below."""
    v_1P = torch.randn(1, like_QP.shape[1], generator=torch.Generator().manual_seed(0)).to(like_QP)
    size = torch.ones(())
    for _ in range(steps):
        v_1P = A(v_1P / v_1P.norm())
        size = v_1P.norm()
    return float(size)
