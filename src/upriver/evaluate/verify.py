"""What one more copy of a passage really does to an answer, to be held against what its score predicts.

``proximal``: the proximal Bregman response (eq. 7, 8), its objective linearised at the trained weights.  One more copy of ``z``
moves them by ``- (G + lambda)^-1 grad L(z) / N``.  ``G`` is symmetric, so what that does to ``f`` is what the response of the
*answer*, ``v = (G + lambda)^-1 grad f``, does to the log-probability of the passage: one system a query serves any number of
passages.  It is solved to a stated residual on a sample of the corpus that the trace has not chosen, its length is set by the
same objective on other sequences; then the weights are moved by ``+- step v``, and the passage is put through the model.

``finetune``: a step of gradient descent on the passage alone, ``- step grad L(z)``, and the answer is put through the model.  It
needs no curvature, and so it checks gradients only: the prediction is ``- grad f . grad L(z)``.

Axes: Q queries, P tracked parameters, N passages of a query.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upriver.curvature import energy
from upriver.curvature.base import Damping, Grads
from upriver.curvature.choose import solver
from upriver.curvature.iterative import ConjugateGradient
from upriver.curvature.products import Products, Space, Tracked
from upriver.errors import NumericalError
from upriver.influence.job import Given
from upriver.influence.queries import batches, gradients, weighted_measurement
from upriver.model.layers import Layer
from upriver.model.model import Model
from upriver.runtime.artifact import Tensors
from upriver.runtime.config import VerifyOptions
from upriver.text.batch import Batch

MOVED = 0.05  # nats by which what is trained on rises or falls: small enough to be linear, large beside rounding
SALT = 0x51ED2701  # so that other sequences are drawn than for the trace
TOLERANCE = 1e-4  # relative residual at which the solver stops
BATCH_TOKENS = 1024  # in which products are fastest
BLOCKS = ("ekfac", "kfac", "diagonal")  # whose solutions are refined; other traces have no solution to start from


class Trial(NamedTuple):
    """A trace as it was made, how it is verified, and the passages of each query."""

    asked: Given
    opts: VerifyOptions
    wanted: list[np.ndarray]

    @property
    def damping(self) -> Damping:
        return Damping.parse(self.asked.opts.dampings[0])

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Sequences to solve on, and others, as many tokens, to set the length by: none where the first are all there are."""
        data, seed = self.asked.data, self.opts.seed ^ SALT
        solved = data.sample(self.opts.tokens, seed)
        return solved, np.setdiff1d(data.sample(2 * self.opts.tokens, seed), solved)


def realised(trial: Trial, chunk: list[int]) -> Tensors:
    """The responses of some queries' passages, one after the other, in raw influence (N times nats).

    ``realised`` of every passage, and ``predicted`` where it is not the trace that predicts; ``residual`` and ``length`` of each
    query.

    Raises:
        NumericalError: a response is not finite.
    """
    out = (_proximal if trial.opts.how == "proximal" else _finetune)(trial, chunk)
    if not all(torch.isfinite(x).all() for x in out.values()):
        raise NumericalError("what the moved weights predict holds NaN or infinity; trace with a larger --damping")
    return out


def _proximal(trial: Trial, chunk: list[int]) -> Tensors:
    asked, (rows, others) = trial.asked, trial.samples()
    with asked.model.computing_in(asked.exact) as model:
        layers = asked.tracked(model)
        q = _gradients(trial, model, layers, chunk)
        found = _solver(trial, model, layers, rows)
        solution = found.solve(q, trial.damping)
        length_Q = torch.ones(len(chunk), dtype=torch.float64)
        if len(others):
            (vGv_Q,) = energy.held_out(model, layers, asked.data, others, [solution.value], BATCH_TOKENS)
            length_Q = energy.judge(q, solution.value, vGv_Q, found.lambdas(trial.damping)).best_scale_Q
        q_QP, v_QP = found.space.flatten(q).double(), found.space.flatten(solution.value).double()
    v_QP *= length_Q[:, None].to(v_QP)
    rise_Q, parts = (q_QP * v_QP).sum(1).tolist(), []
    with _precise(trial) as function:
        for at, query in enumerate(chunk):
            passages = [_exact(asked.data.batch(np.array([row])), v_QP) for row in trial.wanted[query]]

            def log_probs(theta_P: Tensor, passages=passages) -> Tensor:
                return -torch.stack([function.loss(theta_P, batch) for batch in passages])

            parts.append(_central(function, v_QP[at], rise_Q[at], log_probs))
    residual_Q = torch.tensor(solution.stats["residual"], dtype=torch.float64)
    return {"realised": torch.cat(parts), "residual": residual_Q, "length": length_Q}


def _finetune(trial: Trial, chunk: list[int]) -> Tensors:
    asked, found, expected = trial.asked, [], []
    with asked.model.computing_in(asked.exact) as model:
        layers = asked.tracked(model)
        q_QP = Space.of(layers).flatten(_gradients(trial, model, layers, chunk)).double()
    with _precise(trial) as function:
        for at, query in enumerate(chunk):
            asking = [_exact(batch, q_QP) for batch in batches(asked.queries, [query])]

            def measured(theta_P: Tensor, asking=asking) -> Tensor:
                model = Model(function.at(theta_P), task=function.model.task)
                return torch.stack([weighted_measurement(model, batch) for batch in asking]).sum()

            for row in trial.wanted[query]:
                g_P = function.gradient(function.theta_P, _exact(asked.data.batch(np.array([row])), q_QP))
                found.append(_central(function, -g_P, float(g_P.square().sum()), measured))
                expected.append(-(q_QP[at] @ g_P))
    return {"realised": torch.stack(found), "predicted": torch.stack(expected)}


@contextmanager
def _precise(trial: Trial) -> Iterator[Tracked]:
    """The model as a function of its tracked weights in float64, in which a small difference is exact."""
    with trial.asked.model.computing_in("float64") as model:
        function = Tracked(model, trial.asked.tracked(model))
        with function.differentiable():
            yield function


def _exact(batch: Batch, like: Tensor) -> Batch:
    """A batch on the device of ``like``, and what it holds of numbers in its type."""
    batch = batch.to(like.device)
    inputs = {name: x.to(like.dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def _central(function: Tracked, along_P: Tensor, rise: float, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of ``f`` along ``along``, by central differences: float64, of the shape of ``f``.

    Args:
        rise: the derivative of what is trained on, which moves by ``MOVED`` either way.
    """
    theta_P, step = function.theta_P, MOVED / max(abs(rise), torch.finfo(torch.float64).tiny)
    with torch.no_grad():
        up, down = (f(theta_P + sign * step * along_P) for sign in (1, -1))
    return (up - down).double() / (2 * step)


def _gradients(trial: Trial, model: Model, layers: list[Layer], chunk: list[int]) -> Grads:
    return gradients(model, layers, trial.asked.queries, chunk, trial.asked.opts.batch)


def _solver(trial: Trial, model: Model, layers: list[Layer], rows: np.ndarray) -> ConjugateGradient:
    """Conjugate gradients with the damping of the trace, from the solution of its curvature where that is one layer by itself."""
    asked, kind = trial.asked, trial.asked.opts.curvature
    how: dict[str, Any] = {"refine": trial.opts.steps} if kind in BLOCKS else {"steps": trial.opts.steps}
    factors = asked.factors if kind in (*BLOCKS, "cg", "astra") else None  # whose damping is that of the factors
    given = (kind if kind in BLOCKS else "cg", model, layers, asked.data, rows, factors)
    found = solver(*given, tolerance=TOLERANCE, batch_tokens=BATCH_TOKENS, **how)
    assert isinstance(found, ConjugateGradient)
    if factors is None and trial.damping.relative:  # relative to the matrix over the sequences of the trace
        found.product.mean_eigenvalues = Products(model, layers, asked.data, asked.sample).mean_eigenvalues
    return found


def agreement(predicted_N: np.ndarray, realised_N: np.ndarray) -> dict[str, Any]:
    """How well a prediction holds, in ``pairs`` of it and what was realised: their ``pearson`` correlation; the ``slope`` of the
    line through them; ``scale``, the factor of the predictions that fits best; ``size``, the root mean square of the realised.

    A number that is not defined, as the correlation of a single pair, is None.
    """
    p, r = np.asarray(predicted_N, np.float64), np.asarray(realised_N, np.float64)
    centred_p, centred_r = (x - x.mean() if len(x) else x for x in (p, r))
    variance, covariance = centred_p @ centred_p, centred_p @ centred_r
    spread = np.sqrt(variance * (centred_r @ centred_r))
    varied = len(p) > 1 and spread > 0
    return {
        "pairs": len(p),
        "pearson": float(covariance / spread) if varied else None,
        "slope": float(covariance / variance) if varied else None,
        "scale": float(p @ r / (p @ p)) if p.any() else None,
        "size": float(np.sqrt(np.mean(r**2))) if len(r) else None,
    }
