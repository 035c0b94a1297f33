"""Factors agree with the oracle: ``A``, ``S``, their eigenbases, ``lam``, and every curvature made of them.

Axes: N sequences, I inputs, O outputs, Q queries.
"""

from functools import cache

import pytest
import torch
from torch import nn

import reference
from cases import CASES, case, close, gradients, measured, pairs
from upriver.curvature.base import Damping
from upriver.curvature.blocks import Eigenblock, Moments, TokenGradient
from upriver.curvature.fit import CORRECTION_STREAM, COVARIANCE_STREAM, fit
from upriver.errors import ConfigError, MismatchError, NumericalError
from upriver.kernels import add_second_moment, aligned, one_core_each
from upriver.model.load import Model
from upriver.model.tasks import Regression
from upriver.tensors import (
    LowRank,
    Scratch,
    eigh,
    even_parts,
    orthonormal,
    rotated_gradients,
    symmetric,
    truncated_svd,
    weighted_low_rank,
)
from upriver.text.examples import Examples

CURVATURES = ("ekfac", "kfac", "diagonal", "identity")  # of single layers
FISHERS = {"sampled": (COVARIANCE_STREAM, CORRECTION_STREAM), "empirical": (None, None)}
RELATIVE, ABSOLUTE = Damping.parse("0.1x"), Damping.parse(0.05)


@cache
def truth(name: str, fisher: str) -> reference.Moments:
    return reference.moments(pairs(name, FISHERS[fisher][0], 3))


def correction_gradients(name: str, fisher: str, layer: str) -> list[torch.Tensor]:
    return [G[layer] for G in gradients(name, FISHERS[fisher][1], 3)]


def oracle(name: str, fisher: str, layer: str, kind: str) -> reference.Basis:
    moments = truth(name, fisher)
    grads = correction_gradients(name, fisher, layer)
    return reference.curvature(kind, moments.A[layer], moments.S[layer], moments.T_mean[layer], grads)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", CASES)
def test_covariances_and_eigenbases(name, fisher, fitted):
    factors = fitted(name, fisher=fisher, seed=3)
    for layer in case(name).names:
        m = factors.moments(layer)
        wanted = truth(name, fisher)
        for Q, eig, expected in ((m.Q_A_II, m.eig_A_I, wanted.A[layer]), (m.Q_S_OO, m.eig_S_O, wanted.S[layer])):
            close(Q @ torch.diag(eig) @ Q.T, expected)
            close(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype))
        assert m.T_mean == pytest.approx(wanted.T_mean[layer], rel=1e-12)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", CASES)
def test_eigenvalues(name, fisher, fitted):
    factors = fitted(name, fisher=fisher, seed=3)
    for layer in case(name).names:
        m, grads = factors.moments(layer), correction_gradients(name, fisher, layer)
        close(factors.block(layer, "ekfac").lam_OI, reference.eigenvalues(grads, m.Q_S_OO, m.Q_A_II))
        close(factors.block(layer, "kfac").lam_OI, oracle(name, fisher, layer, "kfac").lam)
        close(factors.block(layer, "diagonal").lam_OI, oracle(name, fisher, layer, "diagonal").lam)
        assert (factors.block(layer, "identity").lam_OI == 1).all()


@pytest.mark.parametrize("damping", [RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("name", CASES)
def test_solve(name, kind, damping, fitted):
    """From end to end: the oracle takes its own moments, eigenbases and eigenvalues, and solves a dense system."""
    curvature = fitted(name, seed=3).curvature(kind)
    q = {layer: torch.stack([f[layer] for f in measured(name)]) for layer in case(name).names}
    solution = curvature.solve(q, damping)
    assert solution.converged
    for layer, q_QOI in q.items():
        basis = oracle(name, "sampled", layer, kind)
        level = damping.value * float(basis.lam.mean()) if damping.relative else damping.value
        close(solution.value[layer], torch.stack([basis.solve(q_OI, level) for q_OI in q_QOI]), 1e-7)


@pytest.mark.parametrize("name", ["llama", "twice"])
def test_the_stored_share_of_parameters_and_tokens(name, fitted):
    c, about = case(name), fitted(name, seed=3).manifest
    tracked = sum(g.numel() for g in gradients(name)[0].values())
    assert about["coverage"]["tracked"] == tracked
    assert about["coverage"]["total"] == sum(p.numel() for p in c.model.module.parameters())
    assert about["fit"]["sequences"] == len(c.data)
    assert about["fit"]["tokens"] == c.data.lengths_N.sum()


@pytest.mark.parametrize("dtype", ["float32", "mixed", "bfloat16"])
def test_narrow_types_accumulate_in_float32(dtype, tmp_path):
    c = case("gpt2")
    factors = fit(c.model, c.data, tmp_path, layers=c.spec, dtype=dtype)
    layer = c.names[0]
    assert factors.block(layer).lam_OI.dtype == torch.float32
    A = reference.moments(pairs("gpt2", None)).A[layer]  # the inputs do not depend on labels
    m = factors.moments(layer)
    close(m.Q_A_II @ torch.diag(m.eig_A_I) @ m.Q_A_II.T, A, {"float32": 1e-5, "mixed": 1e-2, "bfloat16": 3e-2}[dtype])


def test_a_sample_of_the_corpus_is_what_is_fitted(tmp_path):
    c = case("gpt2")
    factors = fit(c.model, c.data, tmp_path, layers=c.spec, dtype="float64", fisher="empirical", max_tokens=20, seed=5)
    rows = c.data.sample(20, 5)
    assert 1 < len(rows) < len(c.data)
    layer = c.names[0]
    m = factors.moments(layer)
    expected = reference.moments([pairs("gpt2")[row] for row in rows]).A[layer]
    close(m.Q_A_II @ torch.diag(m.eig_A_I) @ m.Q_A_II.T, expected)


def test_factors_are_reused_and_others_refused(tmp_path):
    c, said = case("classifier"), []
    first = fit(c.model, c.data, tmp_path, layers="*", dtype="float64", fisher="empirical")
    again = fit(c.model, c.data, tmp_path, layers="*", dtype="float64", fisher="empirical", say=said.append)
    assert "used as it is" in said[0]
    assert torch.equal(first.block("0").lam_OI, again.block("0").lam_OI)
    with pytest.raises(MismatchError, match=r"another options\.seed: got 1 now, 0 then"):
        fit(c.model, c.data, tmp_path, layers="*", dtype="float64", fisher="empirical", seed=1)
    with pytest.raises(MismatchError, match="another model"):
        first.check(case("regressor").model)


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float64", False)])
def test_what_was_set_to_zero_is_told_where_it_is_more_than_rounding(dtype, told, tmp_path):
    """Eight examples span eight of 65 directions: what a narrow type makes of the others is of either sign."""
    torch.manual_seed(0)
    net, said = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 1)), []
    data = Examples({"x": torch.randn(8, 64), "y": torch.randn(8)})
    factors = fit(Model(net, task=Regression()), data, tmp_path, layers="*", dtype=dtype, say=said.append)
    lowest = factors.manifest["fit"]["clamped"]
    assert (lowest < -1e-6) == told
    zeroed = [line for line in said if "were set to zero" in line]
    assert len(zeroed) == told
    assert all(f"negative eigenvalues down to {lowest:.1e} of the largest" in line for line in zeroed)
    assert factors.moments("0").eig_A_I.min() >= 0


class TestConstructors:
    """One contract for every curvature."""

    @pytest.fixture(params=CURVATURES)
    def block(self, request):
        torch.manual_seed(0)
        O, I, f64 = 4, 6, torch.float64
        a_MI, g_MO = torch.randn(50, I, dtype=f64) ** 3, torch.randn(50, O, dtype=f64)
        (eig_A, Q_A, _), (eig_S, Q_S, _) = (eigh(x.T @ x / 50) for x in (a_MI, g_MO))
        moments = Moments(Q_A, Q_S, eig_A, eig_S, 5.0)
        lam = torch.rand(O, I, dtype=f64) + 0.1
        return {
            "ekfac": lambda: Eigenblock.ekfac(moments, lam),
            "kfac": lambda: Eigenblock.kfac(moments),
            "diagonal": lambda: Eigenblock.diagonal(lam),
            "identity": lambda: Eigenblock.identity(O, I).to(lam),
        }[request.param]()

    @pytest.fixture
    def q(self):
        return torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("damping", [RELATIVE, ABSOLUTE, Damping(0.0, False)])
    def test_solve_undoes_matvec(self, block, q, damping):
        close(block.solve(block.matvec(q, damping), damping), q)
        close(block.matvec(block.solve(q, damping), damping), q)

    def test_symmetric_and_positive(self, block, q):
        eye = torch.eye(24, dtype=torch.float64).unflatten(1, (4, 6))
        for dense in (block.matvec(eye, RELATIVE).flatten(1), block.solve(eye, RELATIVE).flatten(1)):
            close(dense, dense.T)
            assert torch.linalg.eigvalsh(dense).min() > 0

    def test_linear_in_the_query(self, block, q):
        both = block.solve(2 * q[:1] - q[1:2], RELATIVE)
        close(both, 2 * block.solve(q[:1], RELATIVE) - block.solve(q[1:2], RELATIVE))

    def test_large_damping_is_division_by_it(self, block, q):
        close(1e9 * block.solve(q, Damping(1e9, False)), q, 1e-6)

    def test_no_damping_is_the_inverse(self, block, q):
        eye = torch.eye(24, dtype=torch.float64).unflatten(1, (4, 6))
        inverse = torch.linalg.inv(block.matvec(eye, Damping(0.0, False)).flatten(1))
        close(block.solve(q, Damping(0.0, False)).flatten(1), q.flatten(1) @ inverse)

    def test_full_low_rank_is_the_solution(self, block, q):
        generator = torch.Generator().manual_seed(2)
        Q_A, Q_S = (torch.linalg.qr(torch.randn(n, n, generator=generator).to(q)).Q for n in (6, 4))
        eig_A, eig_S = (torch.rand(n, generator=generator).to(q) for n in (6, 4))
        metric = block.basis or Moments(Q_A, Q_S, eig_A, eig_S, 1.0)
        tokens = [TokenGradient(torch.eye(6).to(q), q_OI.T) for q_OI in q]
        close(block.solve_tokens(tokens, RELATIVE), block.solve(q, RELATIVE))
        close(block.solve_low_rank(tokens, RELATIVE, 4, metric).dense(), block.solve(q, RELATIVE))

    def test_narrower_type_for_computing(self, block, q):
        close(block.to(q.float()).solve(q.float(), RELATIVE), block.solve(q, RELATIVE), 1e-5)


def test_singular_curvature_is_an_error():
    block = Eigenblock.diagonal(torch.tensor([[0.0, 1.0]]))
    with pytest.raises(NumericalError, match="singular"):
        block.solve(torch.ones(1, 1, 2), Damping(0.0, False))
    with pytest.raises(NumericalError, match="singular"):
        Eigenblock.diagonal(torch.zeros(1, 2)).solve(torch.ones(1, 1, 2), RELATIVE)


@pytest.mark.parametrize(
    ("text", "value", "relative"),
    [("0.1x", 0.1, True), ("2x", 2.0, True), (" 1e-3 ", 1e-3, False), (0.5, 0.5, False), ("0", 0.0, False)],
)
def test_damping_is_parsed(text, value, relative):
    assert Damping.parse(text) == (value, relative)


@pytest.mark.parametrize("text", ["", "x", "-1", "-0.1x", "nan", "inf", "infx", "a lot", "0.1y", "1e-3 x x"])
def test_bad_damping_is_an_error(text):
    with pytest.raises(ConfigError, match="bad damping: got"):
        Damping.parse(text)


def test_relative_damping_is_a_share_of_the_mean():
    lam = torch.tensor([[1.0, 3.0]])
    assert Damping.parse("0.1x").of(lam) == pytest.approx(0.2)
    assert Damping.parse("0.1").of(lam) == pytest.approx(0.1)


def test_the_covariance_and_correction_passes_draw_different_labels():
    drawn = [
        [case("gpt2").labels(row, 3, stream) for row in range(14)] for stream in (COVARIANCE_STREAM, CORRECTION_STREAM)
    ]
    assert any(not torch.equal(a, b) for a, b in zip(*drawn, strict=True))


class TestTensors:
    def test_both_orders_of_rotation(self):
        torch.manual_seed(0)
        scratch = Scratch()  # shared by all, so that what one left lies where the next one works
        for T, O, I in ((1, 3, 5), (4, 3, 5), (4, 5, 3), (40, 3, 5), (4, 17, 16)):
            a, g = torch.randn(2, T, I, dtype=torch.float64), torch.randn(2, T, O, dtype=torch.float64)
            Q_A, Q_S = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (I, O))
            expected = torch.stack([Q_S.T @ (g[n].T @ a[n]) @ Q_A for n in (0, 1)])
            close(rotated_gradients(a, g, Q_A, Q_S), expected)
            close(rotated_gradients(a @ Q_A, g, None, Q_S), expected)
            close(rotated_gradients(a, g @ Q_S, Q_A, None), expected)
            wide = scratch.product("input", a, Q_A, aligned(I))
            assert wide.shape == (2, T, aligned(I))
            assert wide.is_contiguous()
            close(rotated_gradients(a, g, Q_A, Q_S, scratch), expected)
            found = rotated_gradients(wide, g, None, Q_S, scratch)
            close(found[..., :I], expected)
            assert not found[..., I:].any()

    def test_even_parts(self):
        assert even_parts(0, 3) == []
        for total, most, sizes in ((8, 8, [8]), (9, 8, [4, 5]), (8, 3, [2, 3, 3]), (3, 1, [1, 1, 1])):
            parts = even_parts(total, most)
            assert [len(range(total)[part]) for part in parts] == sizes
            assert [n for part in parts for n in range(total)[part]] == list(range(total))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["by BLAS", "by blocks"])
    @pytest.mark.parametrize("shape", [(0, 3), (7, 1), (50, 3), (20, 33), (5, 900)])
    def test_symmetric_products(self, dtype, shape):
        torch.manual_seed(0)
        x_MI = torch.randn(shape, dtype=dtype)
        total = torch.zeros(shape[1], shape[1], dtype=torch.float64)
        add_second_moment(total, x_MI)
        add_second_moment(total, 2 * x_MI.T.contiguous().T)
        close(symmetric(total), 5 * x_MI.double().T @ x_MI.double(), 1e-9 if dtype == torch.float64 else 1e-6)

    def test_orthonormal_columns_span_the_same(self):
        torch.manual_seed(0)
        x = torch.randn(40, 6, dtype=torch.float64) * 10.0 ** -torch.arange(6, dtype=torch.float64)
        basis = orthonormal(orthonormal(x))
        close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
        close(basis @ (basis.T @ x), x)

    def test_eigenvalues_ascend_and_negatives_are_zero_and_said(self):
        values, vectors, clamped = eigh(torch.diag(torch.tensor([4.0, -1.0, 2.0])))
        assert values.tolist() == [0, 2, 4]
        assert clamped == pytest.approx(-0.25)
        close(vectors.abs(), torch.tensor([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64))

    @pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("mkl", [True, False])
    def test_eigh_by_either_library(self, mkl, dtype, exact, monkeypatch):
        monkeypatch.setattr("upriver.kernels.MKL_AT_HOME", mkl)
        torch.manual_seed(0)
        x = torch.randn(30, 20, dtype=dtype)
        matrix = x @ x.T  # ten eigenvalues are zero
        with one_core_each(2) as pool:  # the lower triangle counts
            found = list(pool.map(eigh, [matrix, matrix.tril(), 2 * matrix]))
        for scale, (values, vectors, low) in zip((1, 1, 2), found, strict=True):
            close(vectors @ (values[:, None] * vectors.T), scale * matrix, exact)
            close(vectors.T @ vectors, torch.eye(30, dtype=dtype), exact)
            assert values.min() >= 0
            assert -exact < low <= 0

    def test_one_core_each_leaves_the_threads_as_they_were(self):
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            with one_core_each(2) as pool:
                assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
                failed = pool.submit(lambda: 1 / 0)
            assert isinstance(failed.exception(), ZeroDivisionError)
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)

    def test_eigh_refuses_nan(self):
        with pytest.raises(NumericalError, match="NaN"):
            eigh(torch.full((2, 2), torch.nan))

    @pytest.mark.parametrize("shape", [(2, 5, 7), (2, 60, 50)])
    def test_full_rank_is_exact(self, shape):
        torch.manual_seed(0)
        v_QOI = torch.randn(shape, dtype=torch.float64)
        eig_S, eig_A = (torch.rand(n, dtype=torch.float64) ** 8 for n in shape[1:])
        close(weighted_low_rank(v_QOI, min(shape[1:]), eig_S, eig_A).dense(), v_QOI)

    def test_weighted_low_rank_keeps_scores_better_than_the_plain_one(self):
        torch.manual_seed(0)
        v_QOI = torch.randn(8, 30, 40, dtype=torch.float64)
        eig_S, eig_A = (10.0 ** -torch.linspace(0, 4, n, dtype=torch.float64) for n in (30, 40))
        G_NOI = eig_S.sqrt()[:, None] * torch.randn(500, 30, 40, dtype=torch.float64) * eig_A.sqrt()

        def error(low):
            return torch.einsum("noi,qoi->nq", G_NOI, low.dense() - v_QOI).square().mean()

        assert error(weighted_low_rank(v_QOI, 4, eig_S, eig_A)) < 0.5 * error(truncated(v_QOI, 4))

    def test_weighted_low_rank_has_the_least_expected_error(self):
        """Any other factors of the same rank, here by local search around the optimum, do worse in the weighted norm."""
        torch.manual_seed(0)
        v_QOI = torch.randn(1, 6, 5, dtype=torch.float64)
        eig_S, eig_A = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64) + 0.1
        low = weighted_low_rank(v_QOI, 2, eig_S, eig_A)

        def error(w_OI):
            return (eig_S[:, None] * (w_OI - v_QOI[0]) ** 2 * eig_A).sum()

        singular = torch.linalg.svdvals(eig_S.sqrt()[:, None] * v_QOI[0] * eig_A.sqrt())
        assert error(low.dense()[0]) == pytest.approx(float(singular[2:].square().sum()), rel=1e-9)
        for _ in range(50):
            U, V = (x[0] + 0.1 * torch.randn_like(x[0]) for x in low)
            assert error(U @ V) > error(low.dense()[0])

    def test_randomised_factors_are_close_to_the_best(self):
        torch.manual_seed(0)
        U, V = (torch.linalg.qr(torch.randn(2, 120, 120, dtype=torch.float64)).Q for _ in range(2))
        s = 1 / torch.arange(1, 121, dtype=torch.float64)
        w_QOI = U * s @ V
        error = torch.linalg.matrix_norm(truncated(w_QOI, 8).dense() - w_QOI)
        assert (error <= 1.001 * s[8:].square().sum().sqrt()).all()

    @pytest.mark.parametrize("tokens", [10, 100])
    def test_factors_from_the_tokens_are_close_to_the_best(self, tokens):
        """A product of tokens, divided by what is almost, but not quite, an outer product: a solved query."""
        torch.manual_seed(0)
        a, g = torch.randn(tokens, 120).double(), torch.randn(tokens, 150).double()
        decay = 1 / torch.arange(1, 121, dtype=torch.float64)
        w_OI = (g.T @ (a * decay)) * (0.5 + torch.rand(150, 120).double())
        error = torch.linalg.matrix_norm(truncated_svd(w_OI, 8, (a * decay).T).dense() - w_OI)
        assert error <= 1.01 * torch.linalg.svdvals(w_OI)[8:].square().sum().sqrt()


def truncated(w_QOI, rank):
    return LowRank(*(torch.stack(x) for x in zip(*(truncated_svd(w_OI, rank) for w_OI in w_QOI), strict=True)))
