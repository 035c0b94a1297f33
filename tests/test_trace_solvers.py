"""Every solver through one and the same trace: its scores against the dense solution, and what it says of itself.

Axes: N sequences, Q queries, P tracked parameters.
"""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import upriver as up
from cases import case, gradients, measured
from upriver.curvature.base import Damping
from upriver.curvature.choose import SOLVERS, needs_factors, solver
from upriver.curvature.energy import held_out, judge
from upriver.curvature.iterative import GAIN
from upriver.curvature.products import Products, Space
from upriver.influence import job
from upriver.runtime.config import TraceOptions
from upriver.runtime.progress import silent
from upriver.show.report import write_report

DAMPINGS = ("0.1x", "1x", "0.05")
BLOCKS = ("ekfac", "kfac", "diagonal", "identity")
ENOUGH = {"cg": 1000, "lissa": 5000, "astra": 5000}  # steps
TOLERANCE = {"lissa": 2e-2, "astra": 2e-2, "cg": 1e-4}  # of the range: what they stop at; the others are exact


@cache
def flat(name: str) -> tuple[Tensor, Tensor]:
    """The gradients of the losses ``[N, P]`` and of the measurements ``[Q, P]``, by the oracle."""
    space = Space.of(case(name).layers)

    def laid(grads) -> Tensor:
        return torch.stack([torch.cat([g[layer].double().flatten() for layer in space.shapes]) for g in grads])

    return laid(gradients(name)), laid(measured(name))


@cache
def matrix(name: str) -> Tensor:
    """The exact Gauss-Newton matrix, ``[P, P]``."""
    c = case(name)
    product = Products(c.model, c.layers, c.data)
    return product(torch.eye(product.space.P, dtype=torch.float64))


def dense_scores(name: str, G_PP: Tensor, lambdas: dict[str, float]) -> np.ndarray:
    """``- grad f^T (G + lambda I)^-1 grad L``, ``[N, Q]``."""
    c, (g_NP, q_QP) = case(name), flat(name)
    space = Space.of(c.layers)
    damped_PP = G_PP + torch.diag(space.spread(lambdas, G_PP))
    return -(g_NP @ torch.linalg.solve(damped_PP, q_QP.T)).numpy()


def traced(name: str, kind: str, out, factors, **given) -> tuple[np.ndarray, up.Scores]:
    c = case(name)
    options = {"layers": c.spec, "rank": "full", "top": 3, "batch_tokens": 30, "dtype": "float64", **given}
    scores = up.trace(c.model, c.data, c.queries, factors, out, curvature=kind, **options)
    return scores.frame().sort_values("sequence")[c.queries.ids].to_numpy(np.float64), scores


def block_matrix(factors: up.Factors, kind: str, name: str) -> Tensor:
    """The dense matrix of a curvature that is diagonal in a Kronecker basis."""
    space = Space.of(case(name).layers)
    eye = space.unflatten(torch.eye(space.P, dtype=torch.float64))
    return space.flatten(factors.curvature(kind).matvec(eye, Damping(0.0, False)))


JOBS = [("llama", damping) for damping in DAMPINGS] + [
    ("classifier", "1x"),
    ("regressor", "0.1x"),
    ("regressor", "0.05"),
]


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize(("name", "damping"), JOBS)
def test_every_solver_gives_the_dense_solution_through_a_trace(name, damping, kind, fitted, tmp_path):
    """The slow ones, which take as many steps as the matrix is badly conditioned, at the largest damping."""
    if kind == "arnoldi" and name == "llama":
        pytest.skip(
            "takes ten seconds each: the classifier and the regressor are at these dampings, llama is in test_solvers"
        )
    if (kind in ("lissa", "astra") and name != "classifier") or (kind == "identity" and damping != "0.1x"):
        pytest.skip("told apart by other jobs")
    factors = fitted(name) if needs_factors(kind) or kind == "cg" else None
    G_PP = block_matrix(fitted(name), kind, name) if kind in BLOCKS else matrix(name)
    given = {} if kind == "identity" else {"damping": damping}
    if kind in ("arnoldi", "nystrom"):
        given["solver_rank"] = len(G_PP)
    elif kind in ENOUGH:
        given["solver_steps"] = ENOUGH[kind]
    found_NQ, scores = traced(name, kind, tmp_path, factors, **given)
    parsed = Damping.parse("0" if kind == "identity" else damping)
    # a relative damping is that of the preconditioner's layers, or of the matrix itself
    basis_PP = block_matrix(fitted(name), "ekfac", name) if kind in ("cg", "astra") else G_PP
    means = Space.of(case(name).layers).unflatten(torch.diagonal(basis_PP)[None])
    expected_NQ = dense_scores(name, G_PP, {layer: parsed.of(x) for layer, x in means.items()})
    off = np.abs(found_NQ - expected_NQ).max() / np.abs(expected_NQ).max()
    assert off < TOLERANCE.get(kind, 1e-6), off
    assert scores.manifest["solver"]["converged"]
    assert all(q["solution"]["converged"] for q in scores.queries)


def test_refinement_goes_from_ekfac_to_the_exact_solution(fitted, tmp_path):
    name, factors = "llama", fitted("llama")
    lambdas = factors.curvature().lambdas(Damping())
    exact_NQ = dense_scores(name, matrix(name), lambdas)
    off = []
    for steps in (0, 1, 3, 300):
        found_NQ, scores = traced(name, "ekfac", tmp_path / str(steps), factors, refine=steps)
        off.append(np.abs(found_NQ - exact_NQ).max() / np.abs(exact_NQ).max())
        assert scores.manifest["solver"]["refine"] == steps
    assert off[0] > off[2] > off[3], off
    assert off[3] < 1e-3


@pytest.mark.parametrize("tokens", [30, 1000], ids=["some", "all"])
def test_refinement_stops_where_the_energy_on_other_sequences_no_longer_rises(tokens, tmp_path, monkeypatch):
    """Every query keeps the best of its steps, on sequences that the solver does not go over, if there are any."""
    monkeypatch.setattr(job, "FEW", 2)
    c, damping = case("llama"), Damping()
    factors = up.fit(c.model, c.data, tmp_path / "factors", layers=c.spec, dtype="float64", max_tokens=tokens)
    given = job.Given(c.model, c.data, c.queries, factors, TraceOptions(refine="auto"), (), silent, print)
    assert len(given.seen) == len(given.sample) + (len(given.stops) if tokens == 30 else 0)
    _, scores = traced("llama", "ekfac", tmp_path / "auto", factors, refine="auto")
    solutions = [q["solution"] for q in scores.queries]
    q = Space.of(c.layers).unflatten(flat("llama")[1])
    energies = []
    for steps in range(max(s["steps"] for s in solutions) + 1):
        curvature = solver("ekfac", c.model, c.layers, c.data, given.sample, factors, refine=steps)
        v = curvature.solve(q, damping).value
        (vGv_Q,) = held_out(c.model, c.layers, c.data, given.stops, [v])
        energies.append(judge(q, v, vGv_Q, curvature.lambdas(damping)).energy_Q.tolist())
    for said, *of_one in zip(solutions, *energies, strict=True):
        taken = of_one[: said["steps"]]
        assert all(b > a + GAIN * abs(a) for a, b in pairwise(taken)), "each step but the last brought much"
        assert of_one[said["steps"]] <= taken[-1] + GAIN * abs(taken[-1]), "and the last did not"
    assert scores.manifest["solver"]["refine"] == "auto"
    assert "until the held-out energy" in write_report(tmp_path / "auto", tmp_path / "report.html").read_text()


def test_a_solver_that_did_not_converge_says_so_in_the_results_and_on_the_page(fitted, tmp_path):
    _, scores = traced("llama", "cg", tmp_path / "scores", fitted("llama"), solver_steps=1, damping="1e-4")
    assert not scores.manifest["solver"]["converged"]
    assert "residual" in scores.manifest["solver"]["why"]
    assert [q["solution"]["converged"] for q in scores.queries] == [False] * 3
    page = write_report(tmp_path / "scores", tmp_path / "report.html").read_text()
    told = json.loads((tmp_path / "report.json").read_text())
    assert "after 1 " in json.dumps(told["trust"])
    assert "Solver" in page


def test_several_dampings_are_columns_of_one_trace(fitted, tmp_path):
    factors = fitted("llama")
    c = case("llama")
    together = up.trace(
        c.model,
        c.data,
        c.queries,
        factors,
        tmp_path / "both",
        rank="full",
        top=3,
        damping="0.1x,0.01x",
        dtype="float64",
    )
    for damping in ("0.1x", "0.01x"):
        alone = up.trace(
            c.model,
            c.data,
            c.queries,
            factors,
            tmp_path / damping,
            rank="full",
            top=3,
            damping=damping,
            dtype="float64",
        )
        ids = c.queries.ids if damping == "0.1x" else [f"{x}@0.01x" for x in c.queries.ids]
        np.testing.assert_array_equal(together.frame()[ids].to_numpy(), alone.frame()[c.queries.ids].to_numpy())
    assert [q["id"] for q in together.queries] == c.queries.ids


def test_tracincp_adds_the_checkpoints_by_their_learning_rates(tmp_path):
    c = case("classifier")
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        models.append(up.Model(module, task=up.Classification()))
    given = {"layers": "*", "rank": "full", "top": 3, "dtype": "float64"}
    rates = (0.1, 0.03)
    both = up.trace(
        c.model, c.data, c.queries, out=tmp_path / "both", curvature="tracincp",
        checkpoints=list(zip(models, rates, strict=True)), **given,
    )  # fmt: skip
    expected = 0.0
    for i, (model, rate) in enumerate(zip(models, rates, strict=True)):
        alone = up.trace(model, c.data, c.queries, out=tmp_path / str(i), curvature="identity", **given)
        expected = expected + rate * alone.frame()[c.queries.ids].to_numpy()
    np.testing.assert_allclose(both.frame()[c.queries.ids].to_numpy(), expected, rtol=1e-5, atol=1e-7)
    top = both.top(c.queries.ids[0], 1)
    assert top["score"][0] == pytest.approx(expected[:, 0].max(), rel=1e-5)
    assert both.manifest["curvature"] == "tracincp"


def test_solutions_are_judged_on_sequences_that_played_no_part(fitted, tmp_path):
    c = case("llama")
    factors = up.fit(c.model, c.data, tmp_path / "factors", layers=c.spec, dtype="float64", max_tokens=30)
    given = {"rank": "full", "top": 3, "dtype": "float64", "held_out": 1000}
    scores = up.trace(c.model, c.data, c.queries, factors, tmp_path / "scores", **given)
    seen = c.data.sample(factors.manifest["fit"]["tokens"], 0)
    for q in scores.queries:
        solution = q["solution"]
        assert solution["held_out"]["sequences"] == len(c.data) - len(seen)
        assert solution["best_energy"] >= solution["energy"]
        assert solution["gradient"]["best_energy"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"curvature": "ekfac"}, "needs factors"),
        ({"curvature": "tracincp"}, "--checkpoints"),
        ({"curvature": "identity", "refine": 3}, "inverts nothing"),
        ({"curvature": "cg", "damping": "0.1x,0.1x"}, "each damping once"),
        ({"curvature": "newton"}, "ekfac"),
    ],
)
def test_what_goes_with_no_solver_is_refused(given, message, tmp_path):
    c = case("classifier")
    with pytest.raises(up.UpriverError, match=message):
        up.trace(c.model, c.data, c.queries, out=tmp_path / "out", layers="*", **given)
