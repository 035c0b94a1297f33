"""The classical solvers: products against a written-out loop, and every solver against the dense solution."""

import tempfile
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
from cases import case, close, gradients, pairs
from upriver.curvature import products as products_of
from upriver.curvature import spectral
from upriver.curvature.base import Damping
from upriver.curvature.blocks import BlockCurvature, Eigenblock, Moments
from upriver.curvature.choose import SOLVERS as SOLVERS_BY_NAME
from upriver.curvature.choose import needs_factors, solver
from upriver.curvature.diagonal import fit_diagonal
from upriver.curvature.energy import energy as energy_of
from upriver.curvature.energy import held_out, judge
from upriver.curvature.fit import fit
from upriver.curvature.iterative import ConjugateGradient, Neumann
from upriver.curvature.products import Products, Space, Tracked
from upriver.curvature.spectral import Spectral
from upriver.errors import ConfigError, ModelError, NumericalError
from upriver.influence.queries import Measurements
from upriver.influence.queries import gradients as query_gradients
from upriver.model.layers import find_layers
from upriver.model.load import Model
from upriver.model.losses import Task
from upriver.model.tasks import Classification
from upriver.text.examples import Examples

NAMES = ["classifier", "regressor", "gpt2", "llama", "twice", "shared"]
LAMBDA = {"classifier": 0.05, "regressor": 0.05, "gpt2": 1.0}


@cache
def products(name, kind="gauss-newton"):
    c = case(name)
    return Products(c.model, c.layers, c.data, kind=kind)


def flat(layers):
    return torch.cat([layers[n].flatten() for n in layers])


def stacked(name, rows):
    """The oracle's gradients of some sequences, as Grads ``[Q, O, I]``."""
    each = [gradients(name)[row] for row in rows]
    return {n: torch.stack([g[n] for g in each]) for n in case(name).names}


def with_bias(module, jacobian, name):
    """Derivatives to the weights of one layer, the bias as last column, laid flat: ``[M, C, O I]``."""
    weight = jacobian[f"{name}.weight"]
    weight = weight.transpose(2, 3) if type(module.get_submodule(name)).__name__ == "Conv1D" else weight
    bias = jacobian.get(f"{name}.bias")
    return (weight if bias is None else torch.cat([weight, bias[..., None]], 3)).flatten(2)


@cache
def written_out(name):
    """``G`` as a sum over sequences and predictions of ``J^T H J``, ``[P, P]``, one sequence at a time."""
    c, module = case(name), case(name).model.module
    weights = {f"{n}.{p}": w.detach() for n in c.names for p, w in module.get_submodule(n).named_parameters()}
    total = 0
    for row in range(len(c.data)):
        inputs = c.data.batch(np.array([row])).inputs

        def predictions(w, inputs=inputs):
            if not c.language:
                return functional_call(module, w, (inputs["x"],))
            logits_TV = functional_call(module, w, (), {"input_ids": inputs["tokens"], "use_cache": False}).logits[0]
            return logits_TV[torch.cat([inputs["loss"][0, 1:], torch.tensor([False])])]

        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacrev(predictions)(weights)
        J_MCP = torch.cat([with_bias(module, jacobian, n) for n in c.names], 2)
        for h_C, J_CP in zip(predictions(weights), J_MCP, strict=True):
            H_CC = torch.eye(len(h_C), dtype=h_C.dtype) if name == "regressor" else reference.softmax_fisher(h_C)
            total = total + J_CP.T @ H_CC @ J_CP
    return total.detach() / len(c.data)


@cache
def dense(name):
    """``(G + lambda I)^-1`` of the first four gradients by a dense solve of the written-out matrix."""
    G_PP = written_out(name)
    q_QP = products(name).space.flatten(stacked(name, range(4)))
    return torch.linalg.solve(G_PP + LAMBDA[name] * torch.eye(len(G_PP), dtype=G_PP.dtype), q_QP.T).T


@cache
def ekfac(name):
    """EK-FAC by the oracle, on eight draws of the labels."""
    c = case(name)
    passes = [reference.moments(pairs(name, 1, seed)) for seed in range(8)]
    blocks = {}
    for n in c.names:
        A, S = (sum(getattr(p, k)[n] for p in passes) / len(passes) for k in "AS")
        (eig_S, Q_S), (eig_A, Q_A) = torch.linalg.eigh(S), torch.linalg.eigh(A)
        grads = [g[n] for seed in range(8) for g in gradients(name, 2, seed)]
        lam = reference.eigenvalues(grads, Q_S, Q_A).detach()
        blocks[n] = Eigenblock.ekfac(Moments(Q_A, Q_S, eig_A, eig_S, 1.0), lam)
    return BlockCurvature(blocks, blocks.__getitem__)


@pytest.mark.parametrize("name", NAMES)
def test_gauss_newton_products_are_the_written_out_sum(name):
    product = products(name)
    close(product(torch.eye(product.space.P, dtype=torch.float64)), written_out(name))


def test_gauss_newton_is_the_expected_outer_product_of_gradients_over_labels():
    c = case("classifier")
    total = 0
    for x_I in c.data.inputs["x"]:
        p_C = F.softmax(c.model.module(x_I[None])[0], 0).detach()
        for label, p in enumerate(p_C):
            g_P = flat(reference.gradient(c.model.module, c.names, reference.class_loss(x_I, label)))
            total = total + p * torch.outer(g_P, g_P)
    product = products("classifier")
    close(product(torch.eye(product.space.P, dtype=torch.float64)), total / len(c.data))


@pytest.mark.parametrize("name", NAMES)
def test_hessian_products_are_second_derivatives_of_the_mean_loss(name):
    product, c = products(name, "hessian"), case(name)
    v_P, w_P = torch.randn(2, product.space.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f, losses = Tracked(c.model, c.layers), [c.loss(row) for row in range(len(c.data))]

    def mean_loss(s, t):
        module = f.at(f.theta_P + s * v_P + t * w_P)
        return sum(loss(module) for loss in losses) / len(losses)

    zero = torch.zeros((), dtype=torch.float64)
    with f.differentiable():
        expected = grad(lambda s: grad(mean_loss, argnums=1)(s, zero))(zero)
    close(product(v_P[None])[0] @ w_P, expected)


@pytest.mark.parametrize("name", ["gpt2", "twice"])
def test_neither_batch_size_nor_padding_changes_a_product(name):
    c = case(name)
    v_QP = torch.randn(3, products(name).space.P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one_by_one = Products(c.model, c.layers, c.data, batch_tokens=1)
    close(one_by_one(v_QP), products(name)(v_QP))
    N = len(c.data)
    halves = [np.arange(N)[i::2] for i in (0, 1)]
    some = [products(name)(v_QP, rows) * len(rows) / N for rows in halves]
    close(sum(some), products(name)(v_QP))
    close(Products(c.model, c.layers, c.data, halves[0])(v_QP) * len(halves[0]) / N, some[0])
    seen = []
    narrow = Products(c.model, c.layers, c.data, memory_bytes=1, advance=seen.append)  # one vector at a time
    close(narrow(v_QP), products(name)(v_QP))
    assert (sum(seen), narrow.done) == (c.data.lengths_N.sum(), len(v_QP))


SOLVERS = {
    "exact": lambda name: Spectral.exact(products(name)),
    "exact hessian": lambda name: Spectral.exact(products(name, "hessian"), negative="drop"),
    "arnoldi": lambda name: Spectral.arnoldi(products(name), rank=1000),
    "arnoldi at rank 6": lambda name: Spectral.arnoldi(products(name), rank=6),
    "nystrom": lambda name: Spectral.nystrom(products(name), rank=1000),
    "nystrom at rank 6": lambda name: Spectral.nystrom(products(name), rank=6),
    "conjugate gradients": lambda name: ConjugateGradient(products(name), tolerance=1e-11),
    "refined EK-FAC": lambda name: ConjugateGradient(products(name), ekfac(name), tolerance=1e-11),
    "LiSSA": lambda name: Neumann(products(name), steps=20_000, tolerance=1e-10),
    "ASTRA": lambda name: Neumann(products(name), ekfac(name), steps=20_000, tolerance=1e-10),
}
TO_THE_DENSE = [s for s in SOLVERS if "hessian" not in s and "rank 6" not in s]


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("damping", [Damping(0.3, relative=False), Damping(0.5)], ids=["absolute", "relative"])
def test_solve_undoes_matvec(method, damping):
    curvature, q = SOLVERS[method]("classifier"), stacked("classifier", range(3))
    solution = curvature.solve(curvature.matvec(q, damping), damping)
    assert solution.converged == ("rank 6" not in method)  # what a low rank leaves is measured on the matrix itself
    for n in q:
        close(solution.value[n], q[n], 1e-7)


@pytest.mark.parametrize("method", TO_THE_DENSE)
@pytest.mark.parametrize("name", ["classifier", "regressor", "gpt2"])
def test_invariant_5_every_solver_converges_to_the_dense_solution(name, method):
    if name == "gpt2" and method in ("LiSSA", "ASTRA"):
        pytest.skip("thousands of steps; the two smaller models show it")
    solution = SOLVERS[method](name).solve(stacked(name, range(4)), Damping(LAMBDA[name], relative=False))
    assert solution.converged
    close(products(name).space.flatten(solution.value), dense(name), 1e-6)


@pytest.mark.parametrize("name", ["classifier", "regressor"])
def test_arnoldi_solves_what_lies_outside_the_range_of_the_matrix(name):
    """A gradient lies in the range of ``G``; any other vector keeps its part in the null space, divided by the damping."""
    space, P = products(name).space, products(name).space.P
    q_QP = torch.randn(3, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = Spectral.arnoldi(products(name), P).solve(space.unflatten(q_QP), Damping(LAMBDA[name], relative=False))
    A_PP = written_out(name) + LAMBDA[name] * torch.eye(P, dtype=torch.float64)
    close(space.flatten(solution.value), torch.linalg.solve(A_PP, q_QP.T).T, 1e-6)


@pytest.mark.parametrize("build", [Spectral.arnoldi, Spectral.nystrom])
def test_a_higher_rank_is_never_further_from_the_matrix(build):
    G_PP, errors = written_out("gpt2"), []
    for rank in (2, 8, 32):
        s = build(products("gpt2"), rank)
        errors.append(float((s.U_PR * s.lam_R @ s.U_PR.T - G_PP).norm() / G_PP.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


def test_repeated_eigenvalues_are_all_found_by_arnoldi():
    projection_PP = torch.diag(torch.tensor([1.0] * 9 + [0.0] * 34).double())
    found = Spectral.arnoldi(Given(projection_PP, {"a": (1, 43)}), rank=20)
    close(found.lam_R[:9], torch.ones(9, dtype=torch.float64))
    assert float(found.lam_R[9:].abs().max()) < 1e-12


@cache
def fitted(name):
    c = case(name)
    with tempfile.TemporaryDirectory() as folder:
        factors = fit(c.model, c.data, folder, layers=c.spec, dtype="float64", max_tokens=None)
        fit_diagonal(c.model, c.data, factors)
        held = {(n, kind): factors.block(n, kind) for n in c.names for kind in ("ekfac", "kfac", "diagonal")}
    return SimpleNamespace(block=lambda name, kind: held[name, kind])


CONTRACT = {kind: {} for kind in SOLVERS_BY_NAME} | {
    "arnoldi": {"rank": 150}, "arnoldi at rank 5": {"rank": 5}, "nystrom": {"rank": 1000}, "nystrom at rank 5": {"rank": 5},
    "lissa": {"steps": 60}, "astra": {"steps": 60}, "cg with factors": {}, "ekfac refined": {"refine": 300},
    "ekfac refined by 2 steps": {"refine": 2}, "kfac refined": {"refine": 300}, "diagonal refined": {"refine": 300},
    "identity refined": {"refine": 300},
}  # fmt: skip
UNFINISHED = ("lissa", "astra", "rank 5", "2 steps")


DAMPINGS = {"0.1x": Damping(0.1), "1x": Damping(1.0), "0.3": Damping(0.3, relative=False)}
DAMPED = [
    ("llama", "1x"),
    *((name, at) for name in ("classifier", "regressor") for at in DAMPINGS),
]  # and through a trace


@pytest.mark.parametrize("solver_name", CONTRACT)
@pytest.mark.parametrize(("name", "at"), DAMPED)
def test_every_solver_solves_its_system_or_says_truly_how_far_it_is_from_it(name, solver_name, at):
    c, kind, damping = case(name), solver_name.split()[0], DAMPINGS[at]
    factors = fitted(name) if needs_factors(kind) or "factors" in solver_name else None
    curvature = solver(kind, c.model, c.layers, c.data, np.arange(len(c.data)), factors, **CONTRACT[solver_name])
    q, space = stacked(name, range(3)), Space.of(c.layers)
    solution = curvature.solve(q, damping)
    q_QP, v_QP = space.flatten(q), space.flatten(solution.value)
    if isinstance(curvature, BlockCurvature):
        close(space.flatten(curvature.matvec(solution.value, damping)), q_QP, 1e-7)
        return
    G_PP, lambdas = written_out(name), curvature.lambdas(damping)
    if damping.relative and solver_name in ("exact", "arnoldi", "nystrom", "cg", "lissa", "identity refined"):
        own = space.means(G_PP.diagonal())
        assert lambdas == pytest.approx({n: damping.value * mean for n, mean in own.items()}, rel=1e-6)
    A_PP = G_PP + torch.diag(space.spread(lambdas, q_QP))
    residual_Q = (q_QP - v_QP @ A_PP).norm(dim=1) / q_QP.norm(dim=1)
    told_Q, tolerance = torch.tensor(solution.stats["residual"], dtype=torch.float64), solution.stats["tolerance"]
    assert torch.allclose(told_Q, residual_Q, rtol=1e-4, atol=1e-9)
    assert solution.converged == bool((residual_Q <= tolerance).all()) == ("why" not in solution.stats)
    assert solution.converged or any(x in solver_name for x in UNFINISHED)
    error_Q = (v_QP - torch.linalg.solve(A_PP, q_QP.T).T).norm(dim=1)
    assert bool((error_Q <= residual_Q * q_QP.norm(dim=1) / min(lambdas.values()) * (1 + 1e-6)).all())


@pytest.mark.parametrize("metric", [True, False])
def test_a_compressed_solution_is_that_of_the_solver_at_the_rank_asked_for(metric):
    c, q, damping = case("llama"), stacked("llama", range(3)), Damping()
    moments = {n: fitted("llama").block(n, "ekfac").basis for n in c.names} if metric else {}
    curvature = solver("cg", c.model, c.layers, c.data, np.arange(len(c.data)))
    whole = curvature.solve(q, damping).value
    for rank in (3, 100):
        low, solution = curvature.solve_low_rank(q, damping, rank, moments.get)
        assert solution.converged
        for n in q:
            assert low[n].U_QOR.shape[2] == min(rank, *q[n].shape[1:])
            if rank == 100:
                close(low[n].dense(), whole[n], 1e-7)


def test_the_estimated_mean_eigenvalue_is_that_of_the_diagonal(monkeypatch):
    """Above a size of which the diagonal is not formed, random signs estimate it; the error falls with their number."""
    exact = products("llama").space.means(written_out("llama").diagonal())
    monkeypatch.setattr(products_of, "DIAGONAL", 0)
    monkeypatch.setattr(products_of, "PROBES", 500)
    c = case("llama")
    product = Products(c.model, c.layers, c.data)
    assert product.mean_eigenvalues == pytest.approx(exact, rel=0.3)
    monkeypatch.setattr(products_of, "PROBES", 4)
    whole = Spectral.arnoldi(product, 1000)  # what the eigenvectors do not hold is all that is estimated
    assert whole.lambdas(Damping(1.0)) == pytest.approx(exact, rel=1e-6)


@cache
def judged(name):
    """Energies over the same sequences of the solutions of several solvers, the exact one last."""
    c, q, damping = case(name), stacked(name, range(3)), Damping(0.2, relative=False)
    rows = np.arange(len(c.data))
    kinds = [("identity", {}), ("kfac", {}), ("ekfac", {}), ("ekfac", {"refine": 2}), ("exact", {})]
    values = [solver(k, c.model, c.layers, c.data, rows, fitted(name), **o).solve(q, damping).value for k, o in kinds]
    vGv = held_out(c.model, c.layers, c.data, rows, values, batch_tokens=12)
    lambdas = dict.fromkeys(c.names, damping.value)
    return values, vGv, [judge(q, v, g, lambdas) for v, g in zip(values, vGv, strict=True)]


@pytest.mark.parametrize("name", ["llama", "classifier", "regressor"])
def test_the_energy_is_largest_at_the_true_solution_whose_best_scale_is_one(name):
    values, vGv, found = judged(name)
    G_PP, space = written_out(name), Space.of(case(name).layers)
    for v, g in zip(values, vGv, strict=True):
        v_QP = space.flatten(v)
        close(g, ((v_QP @ G_PP) * v_QP).sum(1))
    best = found[-1]
    for other in found[:-1]:
        assert bool((other.energy_Q < best.energy_Q).all())
        assert bool((other.best_energy_Q < best.best_energy_Q).all())
        assert bool((other.energy_Q <= other.best_energy_Q).all())
    close(best.best_scale_Q, torch.ones(3, dtype=torch.float64), 1e-9)
    close(best.energy_Q, best.best_energy_Q, 1e-9)
    assert bool((found[3].best_energy_Q > found[2].best_energy_Q).all()), "two steps from EK-FAC are better than none"


def test_energy_of_nothing_is_nothing():
    zero = torch.zeros(1, dtype=torch.float64)
    assert [float(x) for x in energy_of(zero, zero, zero)] == [0.0, 0.0, 0.0]


def test_what_is_held_out_does_not_depend_on_batches_or_memory():
    c, (values, *_) = case("llama"), judged("llama")
    rows, seen = np.array([1, 4, 5, 9]), []
    whole = held_out(c.model, c.layers, c.data, rows, values)
    parts = held_out(c.model, c.layers, c.data, rows, values, 8, memory_bytes=1, advance=seen.append)
    assert sum(seen) == c.data.lengths_N[rows].sum()
    for one, other in zip(parts, whole, strict=True):
        close(one, other)


@cache
def correlated(hidden):
    """Products and EK-FAC of a classifier of strongly correlated inputs, with or without a hidden layer, and four gradients."""
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        x = 6 * torch.randn(400, 16).double() / torch.arange(1, 17) @ torch.linalg.qr(torch.randn(16, 16).double()).Q
        y = (x @ torch.randn(16, 6).double() + torch.randn(400, 6)).argmax(1)
        stack = [nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 6)] if hidden else [nn.Linear(16, 6)]
        model, data = Model(nn.Sequential(*stack).double(), task=Classification()), Examples({"x": x, "y": y})
        layers = find_layers(model.module, "*")
        factors = fit(model, data, folder, layers="*", dtype="float64", max_tokens=None)
        blocks = {n: factors.block(n) for n in factors.curvature().names}
        q = query_gradients(model, layers, Measurements(data), [0, 1, 2, 3])
    return Products(model, layers, data), BlockCurvature(blocks, blocks.__getitem__), q


@pytest.mark.parametrize(("hidden", "factor"), [(0, 2), (12, 1.1)])
def test_invariant_5_ekfac_preconditioning_reduces_the_iterations_of_conjugate_gradients(hidden, factor):
    product, preconditioner, q = correlated(hidden)
    plain = ConjugateGradient(product).solve(q, Damping(1e-3, relative=False))
    refined = ConjugateGradient(product, preconditioner).solve(q, Damping(1e-3, relative=False))
    assert plain.converged
    assert refined.converged
    assert refined.stats["steps"] < plain.stats["steps"] / factor


@pytest.mark.parametrize("iterations", [0, 3, 10])
def test_invariant_5_refinement_is_nearer_to_the_solution_after_as_many_iterations(iterations):
    product, preconditioner, q = correlated(hidden=12)
    damping = Damping(1e-3, relative=False)
    exact = Spectral.exact(product).solve(q, damping).value
    plain, refined = (
        ConjugateGradient(product, p, max_iterations=iterations).solve(q, damping).value for p in (None, preconditioner)
    )
    errors = [length(product, {n: v[n] - exact[n] for n in q}, damping) for v in (plain, refined)]
    assert bool((errors[1] < errors[0]).all()), errors


def length(product, v, damping):
    """``v^T (G + lambda I) v`` of each query, ``[Q]``: what conjugate gradients bring down."""
    Av = ConjugateGradient(product).matvec(v, damping)
    return sum((v[n] * Av[n]).sum((1, 2)) for n in v)


def test_refinement_starts_from_the_solution_of_ekfac():
    q, damping = stacked("classifier", range(4)), Damping(0.1)
    start = ConjugateGradient(products("classifier"), ekfac("classifier"), max_iterations=0).solve(q, damping)
    expected = ekfac("classifier").solve(q, damping).value
    for n in q:
        close(start.value[n], expected[n])
    assert not start.converged
    assert "more steps" in start.stats["why"]


def test_queries_do_not_disturb_each_other():
    q, damping = stacked("gpt2", range(4)), Damping(1.0, relative=False)
    together = ConjugateGradient(products("gpt2"), ekfac("gpt2"), tolerance=1e-10).solve(q, damping).value
    alone = (
        ConjugateGradient(products("gpt2"), ekfac("gpt2"), tolerance=1e-10).solve(stacked("gpt2", [2]), damping).value
    )
    for n in q:
        close(together[n][2], alone[n][0], 1e-7)


def test_lissa_with_too_large_a_scale_reports_divergence_as_data():
    largest = float(torch.linalg.eigvalsh(written_out("classifier"))[-1])
    q, damping = stacked("classifier", range(2)), Damping(0.05, relative=False)
    solution = Neumann(products("classifier"), step=2.5 / (largest + 0.05)).solve(q, damping)
    assert not solution.converged
    assert solution.stats["why"].startswith("diverged")
    assert "smaller step" in solution.stats["why"]
    stopped = Neumann(products("classifier"), step=1e-3, steps=5).solve(q, damping)
    assert not stopped.converged
    assert "more steps" in stopped.stats["why"]


def test_stochastic_lissa_comes_near_the_dense_solution():
    q, damping = stacked("classifier", range(4)), Damping(LAMBDA["classifier"], relative=False)
    solution = Neumann(products("classifier"), step=0.2, steps=300, sequences=10).solve(q, damping)
    found, expected = products("classifier").space.flatten(solution.value), dense("classifier")
    assert float(F.cosine_similarity(found, expected).min()) > 0.95


def test_stochastic_lissa_draws_the_same_sequences_for_the_same_seed():
    q, damping = stacked("classifier", range(4)), Damping(LAMBDA["classifier"], relative=False)
    runs = [
        Neumann(products("classifier"), step=0.2, steps=5, sequences=3, seed=s).solve(q, damping) for s in (1, 1, 2)
    ]
    assert all(torch.equal(runs[0].value[n], runs[1].value[n]) for n in q)
    assert not any(torch.equal(runs[0].value[n], runs[2].value[n]) for n in q)


def test_conjugate_gradients_report_an_indefinite_hessian_as_data():
    q = stacked("regressor", range(2))
    lowest = float(
        torch.linalg.eigvalsh(products("regressor", "hessian")(torch.eye(products("regressor").space.P).double()))[0]
    )
    assert lowest < 0, "the case must have an indefinite Hessian"
    solution = ConjugateGradient(products("regressor", "hessian")).solve(q, Damping(-lowest / 2, relative=False))
    assert not solution.converged
    assert "Gauss-Newton" in solution.stats["why"]


def test_what_cannot_be_done_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="positive semi-definite"):
        Spectral.nystrom(products("classifier", "hessian"), rank=3)
    with pytest.raises(NumericalError, match="singular"):
        SOLVERS["arnoldi at rank 6"]("classifier").solve(stacked("classifier", [0]), Damping(0.0, relative=False))
    with pytest.raises(NumericalError, match="singular"):
        SOLVERS["exact"]("classifier").solve(stacked("classifier", [0]), Damping(0.0, relative=False))
    monkeypatch.setattr(spectral, "EXACT_PARAMETERS", 10)
    with pytest.raises(ModelError, match="at most 10"):
        Spectral.exact(products("classifier"))


class Given:
    """Products with a matrix that is written out."""

    kind, done = "hessian", 0.0

    def __init__(self, matrix_PP, shapes):
        self.matrix_PP, self.theta_P, self.space = matrix_PP, matrix_PP[0], Space(shapes)

    def __call__(self, v_QP):
        return v_QP @ self.matrix_PP


def test_relative_damping_of_a_layer_whose_eigenvalues_are_negative_in_the_mean_is_refused():
    """It would be negative: the step would go the wrong way along small eigenvalues, without a word."""
    lam_P = torch.tensor([-3.0, 1.0, 0.5]).double()
    curvature = Spectral(Given(torch.diag(lam_P), {"a": (1, 3)}), torch.eye(3, dtype=torch.float64), lam_P)
    q = {"a": torch.ones(1, 1, 3, dtype=torch.float64)}
    for call in (curvature.solve, curvature.matvec):
        with pytest.raises(
            NumericalError, match=r"damping of layer 'a' is negative.*: got -5\.0e-02; give an absolute"
        ):
            call(q, Damping(0.1))


def test_an_indefinite_hessian_is_refused_or_loses_its_negative_eigenvalues_but_is_never_solved_in_silence():
    Q_PP = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    lam_P = torch.tensor([-2.0, -0.05, 0.1, 1.0, 3.0, 5.0]).double()
    given, damping = Given(Q_PP * lam_P @ Q_PP.T, {"a": (1, 2), "b": (2, 2)}), Damping(0.1, relative=False)
    q_QP = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = given.space.unflatten(q_QP)
    with pytest.raises(NumericalError, match=r"got 1 negative eigenvalues, the lowest -1\.9e\+00; drop them"):
        Spectral.exact(given).solve(q, damping)
    dropped = Spectral.exact(given, negative="drop").solve(q, damping)
    positive_PP = Q_PP * lam_P.clamp(min=0) @ Q_PP.T
    expected_QP = torch.linalg.solve(positive_PP + 0.1 * torch.eye(6, dtype=torch.float64), q_QP.T).T
    close(given.space.flatten(dropped.value), expected_QP)
    assert dropped.converged
    assert dropped.stats["dropped"] == 2


def test_the_projected_form_drops_what_lies_outside_the_span():
    damping, q = Damping(0.05, relative=False), stacked("classifier", range(3))
    kept, projected = (Spectral.arnoldi(products("classifier"), 6, outside=o) for o in ("damped", "projected"))
    v_QP, w_QP = (kept.space.flatten(s.solve(q, damping).value) for s in (kept, projected))
    close(w_QP, v_QP @ kept.U_PR @ kept.U_PR.T)
    outside_QP = kept.space.flatten(q) @ (torch.eye(kept.space.P).double() - kept.U_PR @ kept.U_PR.T)
    close(v_QP - w_QP, outside_QP / 0.05, 1e-7)


def test_a_task_without_outputs_says_what_to_give_it():
    class Plain(Task):
        name = "plain"

        def loss(self, module, batch, sampler=None):
            return module(batch.inputs["x"]).sum()

        def measurement(self, module, batch):
            return module(batch.inputs["x"]).sum(1)

    c = case("classifier")
    product = Products(type(c.model)(c.model.module, task=Plain()), c.layers, c.data)
    with pytest.raises(ModelError, match="give it `outputs` and `loss_of`"):
        product(torch.zeros(1, product.space.P, dtype=torch.float64))
