"""Labels of the Fisher: the mean over several draws, and the expectation over all of them.

Axes: N examples, C outputs, O outputs and I inputs of a layer.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

import reference
from cases import case, close, gradients, pairs
from upriver.curvature.fit import CORRECTION_STREAM, COVARIANCE_STREAM
from upriver.errors import ModelError
from upriver.model.check import count_outputs
from upriver.model.losses import Task
from upriver.model.model import Model
from upriver.model.tasks import Classification

SMALL = ("classifier", "regressor")


def _component(outputs: reference.Loss, k: int, call: Callable) -> torch.Tensor:
    return outputs(call)[0][k]


def expected(name: str, layer: str, Q_S: torch.Tensor, Q_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``S`` and ``lam`` by going through the slopes of every output, with the Hessian of the loss in the outputs between."""
    c = case(name)
    S, lam = 0.0, 0.0
    for row in range(len(c.data)):
        h_C = c.outputs(row)(c.model.module)[0].detach()
        H_CC = reference.softmax_fisher(h_C) if isinstance(c.model.task, Classification) else torch.eye(len(h_C))
        each = [partial(_component, c.outputs(row), k) for k in range(len(h_C))]
        g_CO = torch.stack([reference.pairs(c.model.module, [layer], f)[layer].g_CTO[0, 0] for f in each])
        G_COI = torch.stack([reference.gradient(c.model.module, [layer], f)[layer] for f in each])
        S = S + g_CO.T @ H_CC.to(g_CO) @ g_CO / len(c.data)
        rotated_COI = Q_S.T @ G_COI @ Q_A
        lam = lam + torch.einsum("coi,cd,doi->oi", rotated_COI, H_CC.to(g_CO), rotated_COI) / len(c.data)
    return S, lam


@pytest.mark.parametrize("name", SMALL)
def test_all_labels_give_the_moments_of_the_gauss_newton_matrix(name, fitted):
    factors, sampled = fitted(name, fisher="exact"), fitted(name)
    for layer in case(name).names:
        m = factors.moments(layer)
        S, lam = expected(name, layer, m.Q_S_OO, m.Q_A_II)
        close(m.Q_S_OO @ torch.diag(m.eig_S_O) @ m.Q_S_OO.T, S, 1e-8)
        close(factors.block(layer).lam_OI, lam, 1e-8)
        close(m.eig_A_I, sampled.moments(layer).eig_A_I, 1e-8)
        assert m.T_mean == 1
        eye = [torch.eye(n, dtype=torch.float64) for n in S.shape[:1] + m.Q_A_II.shape[:1]]
        close(factors.block(layer, "diagonal").lam_OI, expected(name, layer, *eye)[1], 1e-8)


@pytest.mark.parametrize("name", ["llama", "twice", *SMALL])
def test_draws_are_streams_of_their_own_and_their_mean_is_taken(name, fitted):
    factors, K = fitted(name, draws=3, seed=3), 3
    c = case(name)
    first = [pair for k in range(K) for pair in pairs(name, COVARIANCE_STREAM + 2 * k, 3)]
    grads = [G for k in range(K) for G in gradients(name, CORRECTION_STREAM + 2 * k, 3)]
    wanted = reference.moments(first)
    for layer in c.names:
        m = factors.moments(layer)
        close(m.Q_S_OO @ torch.diag(m.eig_S_O) @ m.Q_S_OO.T, wanted.S[layer])
        close(m.Q_A_II @ torch.diag(m.eig_A_I) @ m.Q_A_II.T, wanted.A[layer])
        close(factors.block(layer).lam_OI, reference.eigenvalues([G[layer] for G in grads], m.Q_S_OO, m.Q_A_II))
        assert m.T_mean == pytest.approx(wanted.T_mean[layer], rel=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_the_mean_over_draws_tends_to_the_expectation(name, fitted):
    exact = fitted(name, fisher="exact")

    def apart(draws: int) -> float:
        some = fitted(name, draws=draws)
        pairs = [(some.block(x, "diagonal").lam_OI, exact.block(x, "diagonal").lam_OI) for x in case(name).names]
        return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)

    assert apart(256) < 0.1 < apart(1)


def test_tasks_without_a_root_and_sequences_with_several_predictions_are_refused():
    c = case("llama")
    with pytest.raises(
        ModelError, match=r"'causal language model', which does not offer them; fit with sampled labels"
    ):
        count_outputs(c.model, c.data)

    class Tokens(Classification):
        outputs = type(c.model.task).outputs  # pyright: ignore[reportAssignmentType]
        positions = type(c.model.task).positions  # pyright: ignore[reportAssignmentType]

    task: Task = Tokens()
    with pytest.raises(ModelError, match=r"one prediction an example: got \d+ of a sequence"):
        count_outputs(Model(c.model.module, task=task), c.data)
