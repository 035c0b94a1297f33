"""The study of ranks: its scores at full rank are the scores, and the groups it works in change nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cases import case, close, gradients, measured
from upriver.curvature.base import Damping
from upriver.curvature.blocks import TokenGradient

STUDY = Path(__file__).parent.parent / "studies" / "rank" / "study.py"


@pytest.fixture(scope="module")
def scores(study, fitted):
    c = case("llama")
    return study.score(c.model, c.data, np.arange(len(c.data)), c.queries, fitted("llama"))


def test_full_rank_scores_are_the_definition(scores, fitted):
    c, factors = case("llama"), fitted("llama")
    q = {name: torch.stack([grads[name] for grads in measured("llama")]) for name in c.names}
    v = factors.curvature().solve(q, Damping()).value
    expected = [
        [-sum((v[x][i] * G[x]).sum() for x in c.names) for i in range(len(c.queries))] for G in gradients("llama")
    ]
    close(scores.full_NQ, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["weighted", "plain"])
def test_all_components_together_are_full_rank(scores, kind):
    close(scores.low_NQR[kind][..., -1], scores.full_NQ, 1e-8)


def test_one_component_of_each_layer_is_the_nearest_matrix_of_rank_one(study, fitted):
    block = fitted("llama").block(case("llama").names[0])
    rng = torch.Generator().manual_seed(0)
    O, I = block.lam_OI.shape
    draw = lambda n: torch.randn(3, n, generator=rng, dtype=torch.float64)  # noqa: E731
    solved = study.solve(block, [TokenGradient(draw(I), draw(O))])
    low = solved.components["plain"]
    error = (solved.v_QOI - low.U_QOR[..., :1] @ low.V_QRI[:, :1]).norm()
    rest = torch.linalg.svdvals(solved.v_QOI[0])[1:].norm()
    torch.testing.assert_close(error, rest)


def test_groups_of_layers_change_nothing(study, scores, fitted, monkeypatch):
    c = case("llama")
    each = study.layer_groups
    monkeypatch.setattr(study, "layer_groups", lambda layers, queries: each(layers, queries, budget=1))
    apart = study.score(c.model, c.data, np.arange(len(c.data)), c.queries, fitted("llama"))
    close(apart.full_NQ, scores.full_NQ)
    close(apart.low_NQR["plain"], scores.low_NQR["plain"])


def test_rank_needed_is_where_the_curve_stays_above(study):
    assert study.rank_needed(np.array([0.5, 0.995, 0.98, 0.99, 1.0])) == 4
    assert study.rank_needed(np.array([0.995, 1.0])) == 1
    assert study.rank_needed(np.array([0.995, 0.98])) is None
