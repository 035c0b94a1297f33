"""Unit-norm scores against dense solves of the oracle's gradients.

Axes: N sequences, Q queries.
"""

import numpy as np
import pytest
import torch

import pretended
import upriver as up
from cases import case, close, gradients, measured, truth
from test_plan import HERE, SMALL
from upriver.curvature.base import Damping
from upriver.errors import ConfigError, QueryError
from upriver.influence.normed import Lengths, unit_norm
from upriver.runtime.cost import Asked, LayerSize, rotations
from upriver.runtime.divide import Budget, scan_held
from upriver.runtime.plan import Request, plan_run

KINDS = ("ekfac", "kfac", "diagonal", "identity")


def traced(name: str, out, factors, **given) -> up.Scores:
    c = case(name)
    options = {"layers": c.spec, "rank": "full", "top": 2, "batch_tokens": 30, "dtype": "float64", "held_out": 0}
    return up.trace(c.model, c.data, c.queries, factors, out, **{**options, "unit_norm": True, **given})


def expected(name: str, kind: str, damping: float) -> torch.Tensor:
    """``- q.v / sqrt(q.v_q  G.v_G)`` with each ``v`` a dense solve, layer by layer, float64 ``[N, Q]``."""
    cross, own_N, own_Q = 0.0, 0.0, 0.0
    for layer in case(name).names:
        basis = truth(name).curvature(kind, layer)
        level = 0.0 if kind == "identity" else damping * float(basis.lam.mean())
        G_NW, q_QW = (torch.stack([g[layer].flatten() for g in some(name)]).double() for some in (gradients, measured))
        matrix = basis.dense() + level * torch.eye(len(G_NW[0]), dtype=torch.float64)
        solved_QW, solved_NW = torch.linalg.solve(matrix, q_QW.T).T, torch.linalg.solve(matrix, G_NW.T).T
        cross = cross - G_NW @ solved_QW.T
        own_N, own_Q = own_N + (G_NW * solved_NW).sum(1), own_Q + (q_QW * solved_QW).sum(1)
    return cross / (own_N[:, None] * own_Q).sqrt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "twice", "regressor"])
def test_unit_norm_scores_are_those_of_dense_solves(name, kind, fitted, tmp_path):
    factors = None if kind == "identity" else fitted(name)
    scores = traced(name, tmp_path, factors, curvature=kind)
    found = scores.frame()[[f"{x}@unit" for x in case(name).queries.ids]].to_numpy()
    wanted = expected(name, kind, 0.1)
    close(torch.tensor(found), wanted, 1e-5)  # float32 tables
    assert np.abs(found).max() <= 1
    if kind == "identity":
        G, q = (
            torch.stack([torch.cat([g[x].flatten() for x in g]) for g in some(name)]) for some in (gradients, measured)
        )
        close(torch.tensor(found), -torch.cosine_similarity(G[:, None].double(), q[None].double(), dim=2), 1e-5)


def test_further_dampings_have_their_own(fitted, tmp_path):
    whole = traced("llama", tmp_path / "a", fitted("llama"), damping="0.1x,1x")
    ids = case("llama").queries.ids
    for text, damping in (("", 0.1), ("@1x", 1.0)):
        found = whole.frame()[[f"{x}{text}@unit" for x in ids]].to_numpy()
        close(torch.tensor(found), expected("llama", "ekfac", damping), 1e-5)


def test_the_best_by_unit_norm_are_taken_from_all_sequences(fitted, tmp_path):
    scores = traced("llama", tmp_path / "a", fitted("llama"))
    found, frame = scores.top("q0", 4, unit_norm=True), scores.frame()
    wanted = frame[frame["q0@unit"] > 0].nlargest(4, "q0@unit")
    assert found["sequence"].tolist() == wanted["sequence"].tolist()
    assert found["unit"].tolist() == wanted["q0@unit"].tolist()
    lowest = scores.top("q1", 1, "negative", unit_norm=True)
    assert lowest["unit"].tolist() == [frame["q1@unit"].min()]
    assert "q0@unit" not in scores.documents()
    plain = traced("llama", tmp_path / "b", fitted("llama"), unit_norm=False)
    assert not [x for x in plain.frame() if "unit" in x]
    assert plain.frame()["q0"].tolist() == frame["q0"].tolist()
    with pytest.raises(QueryError, match="no unit-norm scores of 'q0'"):
        plain.top("q0", unit_norm=True)


@pytest.mark.parametrize("given", [{"curvature": "cg"}, {"refine": 2}, {"curvature": "exact"}], ids=str)
def test_solvers_that_do_not_go_layer_by_layer_are_refused(given, fitted, tmp_path):
    with pytest.raises(ConfigError, match=r"unit-norm scores need every sequence solved .*; leave out --unit-norm"):
        traced("classifier", tmp_path, fitted("classifier"), **given)


def test_a_gradient_of_zero_has_no_direction():
    found = unit_norm(np.array([[0.0, 3.0], [2.0, 9.0]]), np.array([[0.0], [4.0]]), np.array([1.0, 4.0]))
    assert found.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_lengths_are_measured_on_the_device(fitted):
    c, like = case("llama"), torch.empty(0, dtype=torch.float64)
    factors = fitted("llama")

    def measure(device: str) -> torch.Tensor:
        from test_pretended import placed

        model = placed("llama", device, torch.float64)
        layers = up.tracked_layers(model, c.data, c.spec)
        consumer = Lengths(factors.curvature(), layers, [Damping()], like.to(device))
        source = up.Source.of(c.data, np.arange(len(c.data)), 20)
        up.sweep(model, layers, source, source.rows, consumer)
        return consumer.result()["self"]

    wanted = measure("cpu")
    assert wanted.shape == (len(c.data), 1)
    with pretended.gpu():
        close(measure("cuda:0"), wanted, 1e-9)


def test_what_lengths_hold_and_multiply_is_planned():
    plain, normed = (plan_run(Request(10_000, 128, queries=8, memory=8 * 10**9, norms=n), SMALL, HERE) for n in (0, 2))
    scans = [next(p for p in plan.passes if p.name == "scan") for plan in (plain, normed)]
    more = 2 * sum(rotations(x, 128) + 2 * x.O * x.I / 128 for x in SMALL.layers)
    assert (scans[1].flop - scans[0].flop) / scans[1].tokens == pytest.approx(more)
    assert scans[1].peak > scans[0].peak
    assert normed.disk["scores"] == 1.5 * plain.disk["scores"]
    layers = [LayerSize(f"{i}", 64, 32, f"{i}", i) for i in range(3)]
    budget = Budget(10**9, 0, 256, 64)
    more = scan_held(layers, Asked(4, 8, 8, norms=2), budget, 256, 10**8).held
    assert more - scan_held(layers, Asked(4, 8, 8), budget, 256, 10**8).held == 4 * 3 * (64**2 + 32**2 + 2 * 64 * 32)
