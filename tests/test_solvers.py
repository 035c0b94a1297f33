"""The classical solvers: products against a written-out loop, and every solver against the dense solution."""

import tempfile
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import reference
from cases import case, close, gradients, pairs
from upriver.curvature import spectral
from upriver.curvature.base import Damping
from upriver.curvature.blocks import BlockCurvature, Eigenblock, Moments
from upriver.curvature.fit import fit
from upriver.curvature.iterative import ConjugateGradient, Neumann
from upriver.curvature.products import Products, Space, Tracked
from upriver.curvature.spectral import Spectral
from upriver.errors import ConfigError, ModelError, NumericalError
from upriver.influence.queries import Measurements, query_gradients
from upriver.model.layers import find_layers
from upriver.model.load import Model
from upriver.model.losses import Classification, Task
from upriver.text.batch import Examples

NAMES = ["classifier", "regressor", "gpt2", "twice", "shared"]
LAMBDA = {"classifier": 0.05, "regressor": 0.05, "gpt2": 1.0}


@cache
def products(name, kind="gauss-newton"):
    c = case(name)
    return Products(c.model, c.layers, c.data, kind)


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
    parts = [products(name)(v_QP, np.arange(N)[i::2]) * len(np.arange(N)[i::2]) for i in (0, 1)]
    close(sum(parts) / N, products(name)(v_QP))


SOLVERS = {
    "exact": lambda name: Spectral.exact(products(name)),
    "exact hessian": lambda name: Spectral.exact(products(name, "hessian")),
    "arnoldi": lambda name: Spectral.arnoldi(products(name), rank=1000),
    "arnoldi at rank 6": lambda name: Spectral.arnoldi(products(name), rank=6),
    "nystrom": lambda name: Spectral.nystrom(products(name), rank=1000),
    "nystrom at rank 6": lambda name: Spectral.nystrom(products(name), rank=6),
    "conjugate gradients": lambda name: ConjugateGradient(products(name), tolerance=1e-11),
    "refined EK-FAC": lambda name: ConjugateGradient(products(name), ekfac(name), tolerance=1e-11),
    "LiSSA": lambda name: Neumann(products(name), steps=20_000, tolerance=1e-10),
    "ASTRA": lambda name: Neumann(products(name), ekfac(name), steps=20_000, tolerance=1e-10),
}
MATRIX_FREE_ALONE = ("conjugate gradients", "LiSSA")
TO_THE_DENSE = [s for s in SOLVERS if "hessian" not in s and "rank 6" not in s]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("damping", [Damping(0.3, relative=False), Damping(0.5)], ids=["absolute", "relative"])
def test_solve_undoes_matvec(solver, damping):
    if damping.relative and solver in (*MATRIX_FREE_ALONE, "exact hessian"):
        pytest.skip("no eigenvalues to be relative to")
    curvature, q = SOLVERS[solver]("classifier"), stacked("classifier", range(3))
    solution = curvature.solve(curvature.matvec(q, damping), damping)
    assert solution.converged
    for n in q:
        close(solution.value[n], q[n], 1e-7)


@pytest.mark.parametrize("solver", TO_THE_DENSE)
@pytest.mark.parametrize("name", ["classifier", "regressor", "gpt2"])
def test_invariant_5_every_solver_converges_to_the_dense_solution(name, solver):
    if name == "gpt2" and solver in ("LiSSA", "ASTRA"):
        pytest.skip("thousands of steps; the two smaller models show it")
    solution = SOLVERS[solver](name).solve(stacked(name, range(4)), Damping(LAMBDA[name], relative=False))
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
    product = products("classifier")

    class Projection:
        kind, space, device = product.kind, product.space, product.device

        def __call__(self, v_QP):
            return torch.cat([v_QP[:, :9], torch.zeros_like(v_QP[:, 9:])], 1)

    found = Spectral.arnoldi(Projection(), rank=20)
    close(found.lam_R[:9], torch.ones(9, dtype=torch.float64))
    assert float(found.lam_R[9:].abs().max()) < 1e-12


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
    assert refined.stats["iterations"] < plain.stats["iterations"] / factor


@pytest.mark.parametrize("iterations", [0, 3, 10])
def test_invariant_5_refinement_is_nearer_to_the_solution_after_as_many_iterations(iterations):
    product, preconditioner, q = correlated(hidden=12)
    damping = Damping(1e-3, relative=False)
    exact = Spectral.exact(product).solve(q, damping).value
    plain, refined = (
        ConjugateGradient(product, p, max_iterations=iterations).solve(q, damping).value for p in (None, preconditioner)
    )
    errors = [energy(product, {n: v[n] - exact[n] for n in q}, damping) for v in (plain, refined)]
    assert bool((errors[1] < errors[0]).all()), errors


def energy(product, v, damping):
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
    assert "more iterations" in start.stats["why"]


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


@pytest.mark.parametrize("solver", MATRIX_FREE_ALONE)
def test_relative_damping_needs_a_preconditioner(solver):
    with pytest.raises(ConfigError, match="absolute damping"):
        SOLVERS[solver]("classifier").solve(stacked("classifier", [0]), Damping())


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


def test_relative_damping_of_a_layer_whose_eigenvalues_are_negative_in_the_mean_is_refused():
    """It would be negative: the step would go the wrong way along small eigenvalues, without a word."""
    curvature = Spectral(
        Space({"a": (1, 3)}), torch.eye(3, dtype=torch.float64), torch.tensor([-3.0, 1.0, 0.5]).double()
    )
    q = {"a": torch.ones(1, 1, 3, dtype=torch.float64)}
    for call in (curvature.solve, curvature.matvec):
        with pytest.raises(
            NumericalError, match=r"damping of layer 'a' is negative.*: got -5\.0e-02; give an absolute"
        ):
            call(q, Damping(0.1))
    solution = curvature.solve(curvature.matvec(q, Damping(0.1, relative=False)), Damping(0.1, relative=False))
    close(solution.value["a"], q["a"])


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
