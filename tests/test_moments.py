"""Units and number types of the moments, and factors applied to gradients of another type."""

import numpy as np
import pytest
import torch

import reference
from cases import case, close
from upriver.curvature.base import Damping
from upriver.curvature.blocks import Eigenblock, Moments
from upriver.curvature.consumers import Covariance
from upriver.curvature.fit import CORRECTION_STREAM, fit
from upriver.model.layers import Layer
from upriver.tensors import sequence_gradients
from upriver.text.batch import Batch

LAYER = Layer("x", (), 3, 4, False, 0, "x")


def symmetric(lower_II: torch.Tensor) -> torch.Tensor:
    """Sums hold the lower triangle alone."""
    return lower_II.tril() + lower_II.tril(-1).T


def batch_of(real_NT: torch.Tensor | None) -> Batch:
    return Batch(np.arange(2), np.arange(2, dtype=np.uint64), {}, real_NT)


def test_the_unit_of_kfac_is_the_sequence():
    """Independent ``a`` and ``g`` of zero mean, T positions: ``E (sum_t g_t a_t^T)^2 = T outer(S, A)``."""
    T, generator = 6, torch.Generator().manual_seed(0)
    a, g = (torch.randn(40_000, T, n, generator=generator, dtype=torch.float64) * s for n, s in ((2, 2.0), (3, 0.5)))
    eig_A, eig_S = (x.square().mean((0, 1)) for x in (a, g))
    block = Eigenblock.kfac(Moments(torch.eye(2), torch.eye(3), eig_A, eig_S, float(T)))
    torch.testing.assert_close(block.lam_OI, sequence_gradients(a, g).square().mean(0), rtol=0.05, atol=0)


def test_bfloat16_covariances_are_summed_wider():
    """After 512 batches a sum in bfloat16 would be off by tens of percent; here each product is rounded, the sum is not."""
    sums, generator = {}, torch.Generator().manual_seed(0)
    wanted, consumer = torch.zeros(4, 4, dtype=torch.float64), Covariance(sums, torch.float32)
    consumer.begin(batch_of(None))
    for _ in range(512):
        a, g = (torch.randn(2, 5, n, generator=generator).bfloat16() for n in (4, 3))
        consumer(LAYER, a, g)
        wanted += a.flatten(0, 1).double().T @ a.flatten(0, 1).double()
    assert (symmetric(sums["A:x"]).double() - wanted).norm() < 3e-4 * wanted.norm()


def test_padding_is_left_out_of_both_moments_in_every_call():
    sums, generator = {}, torch.Generator().manual_seed(0)
    a, g = (torch.randn(2, 6, n, generator=generator, dtype=torch.float64) for n in (4, 3))  # two calls of T = 3
    consumer = Covariance(sums, torch.float64)
    consumer.begin(batch_of(torch.tensor([[True, True, True], [True, False, False]])))
    consumer(LAYER, a, g)
    kept = [(0, t) for t in range(6)] + [(1, 0), (1, 3)]
    for name, x in (("A:x", a), ("S:x", g)):
        torch.testing.assert_close(
            symmetric(sums[name]), sum(torch.outer(x[i], x[i]) for i in kept), rtol=1e-12, atol=0
        )
    assert int(sums["count:x"]) == len(kept)


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "identity"])
def test_factors_solve_in_the_type_of_the_gradients(kind, fitted):
    c, damping, factors = case("twice"), Damping(0.1), fitted("twice")
    curvature = factors.curvature(kind)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        q = {x.name: torch.randn(2, x.O, x.I, dtype=dtype) for x in factors.layers}
        solution = curvature.solve(curvature.matvec(q, damping), damping)
        assert solution.converged
        assert list(solution.value) == c.names
        for name in c.names:
            torch.testing.assert_close(solution.value[name], q[name], rtol=tolerance, atol=tolerance)


def test_layers_given_the_same_tensor_share_one_input_moment(fitted):
    factors = fitted("llama")
    gate, up, down = (f"model.layers.0.mlp.{k}_proj" for k in ("gate", "up", "down"))
    assert {x.name: x.A_of for x in factors.layers if x.block == 0} == {gate: gate, up: gate, down: down}
    assert torch.equal(factors.moments(gate).Q_A_II, factors.moments(up).Q_A_II)


def test_attention_layers_that_share_an_input(tmp_path):
    """Queries, keys and values: one ``A``, three ``S``; the trace of EK-FAC is the mean squared gradient all the same."""
    c = case("llama")
    factors = fit(c.model, c.data, tmp_path / "factors", layers="attention", dtype="float64")
    assert len({x.A_of for x in factors.layers}) == 4  # of eight: q, k and v of a block are led by one, o by itself
    names = [x.name for x in factors.layers]
    losses = [c.loss(row, 0, CORRECTION_STREAM) for row in range(len(c.data))]
    grads = [reference.gradient(c.model.module, names, loss) for loss in losses]
    for name in names:
        lam_OI, m, G_N = factors.block(name).lam_OI, factors.moments(name), [G[name] for G in grads]
        close(lam_OI, reference.eigenvalues(G_N, m.Q_S_OO, m.Q_A_II))
        close(lam_OI.sum(), torch.stack([G.square().sum() for G in G_N]).mean())
