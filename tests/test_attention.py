"""Attention on the CPU: the same function and gradient as torch's in float64, no less exact than its kernel in the same type."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import case
from upriver import kernels
from upriver.kernels import BRIEF, FROM, LONGEST, ROWS, FastKernels
from upriver.model.capture import frozen

CAUSAL = {"is_causal": True}
WIDE, NARROW = torch.float32, torch.bfloat16


def qkv(T: int, dtype: torch.dtype, heads: int = 3, shared: int = 1, N: int = 2) -> list[torch.Tensor]:
    """Laid out as models do it: heads inside tokens; the values a part of a larger tensor."""
    generator = torch.Generator().manual_seed(T)
    sizes = [(heads, 8), (heads // shared, 8), (heads // shared, 24)]
    q, k, v = (torch.randn(N, T, H, D, generator=generator).mul(1.5).to(dtype).transpose(1, 2) for H, D in sizes)
    return [q, k, v[..., 8:16]]


def attended(x: list[torch.Tensor], inside: bool, **how) -> list[torch.Tensor]:
    """Output and gradients to query, key and value."""
    q, k, v = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in x)
    generator = torch.Generator().manual_seed(0)
    with FastKernels() if inside else torch.enable_grad():
        out = F.scaled_dot_product_attention(q, k, v, **how)
    outer = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), outer)]


def errors(found: list[torch.Tensor], x: list[torch.Tensor], **how) -> list[float]:
    """Relative, but for what is zero but for rounding: the gradients to one token's query and key."""
    exact = attended([t.double() for t in x], False, **how)
    return [float((f - e).norm() / e.norm().clamp(min=1e-6)) for f, e in zip(found, exact, strict=True)]


@pytest.fixture
def everywhere(monkeypatch):
    """By blocks at every length, a sequence at a time."""
    monkeypatch.setattr(kernels, "FROM", {WIDE: 1, NARROW: 1})
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("how", [CAUSAL, {}, CAUSAL | {"scale": 0.7}], ids=["causal", "all", "scaled"])
@pytest.mark.parametrize("T", [1, 2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5])
def test_float32_agrees_with_float64(T, how, everywhere):
    x = qkv(T, WIDE)
    assert max(errors(attended(x, True, **how), x, **how)) < 2e-6


@pytest.mark.parametrize("T", [2, ROWS + 1, 3 * ROWS + 5])
def test_bfloat16_is_as_exact_as_the_library(T, everywhere):
    x = qkv(T, NARROW)
    ours, theirs = (errors(attended(x, inside, **CAUSAL), x, **CAUSAL) for inside in (True, False))
    assert all(a < max(1.5 * b, 0.003) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [WIDE, NARROW])
def test_heads_that_share_keys_and_values(dtype, everywhere):
    x, how = qkv(70, dtype, heads=6, shared=3), CAUSAL | {"enable_gqa": True}
    assert max(errors(attended(x, True, **how), x, **how)) < (2e-6 if dtype == WIDE else 0.01)


def test_chunks_change_nothing(monkeypatch):
    x = qkv(LONGEST, WIDE, N=5)
    whole = attended(x, True, **CAUSAL)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    for one, other in zip(whole, attended(x, True, **CAUSAL), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_it_takes_the_place_of_the_kernel_where_it_is_faster(monkeypatch):
    taken = []
    monkeypatch.setattr(kernels.Attend, "apply", lambda q, *a: taken.append((q.shape[2], q.dtype)) or q)
    wanted = [(T, dtype) for dtype in FROM for T in (FROM[dtype], LONGEST)]
    with FastKernels():
        for T, dtype in [
            *wanted,
            (FROM[WIDE] - 1, WIDE),
            (LONGEST + 1, WIDE),
            (LONGEST + 1, NARROW),
            (300, torch.float64),
        ]:
            F.scaled_dot_product_attention(*qkv(T, dtype), **CAUSAL)
    assert taken == wanted


@pytest.mark.parametrize("T", [8, BRIEF])
@pytest.mark.parametrize("dtype", [WIDE, torch.float64])
def test_other_calls_are_left_alone(T, dtype):
    x, mask = qkv(T, dtype), torch.randn(T, T, dtype=dtype)
    expected = F.scaled_dot_product_attention(*x, attn_mask=mask)
    with FastKernels():
        assert torch.equal(F.scaled_dot_product_attention(*x, attn_mask=mask), expected)


def test_short_bfloat16_with_a_mask_is_computed_in_float32_and_rounded_once():
    x, mask = qkv(9, NARROW), torch.randn(9, 9).to(NARROW)
    expected = F.scaled_dot_product_attention(*[t.float() for t in x], attn_mask=mask.float()).to(NARROW)
    with FastKernels():
        assert torch.equal(F.scaled_dot_product_attention(*x, attn_mask=mask), expected)
    assert not torch.equal(F.scaled_dot_product_attention(*x, attn_mask=mask), expected)  # so the line above can fail


def test_forward_and_second_derivatives_go_the_plain_way():
    x = qkv(LONGEST, WIDE)
    tangents = [torch.ones_like(t) for t in x]
    attend = lambda *x: F.scaled_dot_product_attention(*x, **CAUSAL)  # noqa: E731

    def derivatives() -> list[torch.Tensor]:
        _, forward = torch.func.jvp(attend, tuple(x), tuple(tangents))
        q = x[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(attend(q, *x[1:]).sin().sum(), q, create_graph=True)
        return [forward, *torch.autograd.grad(first.sum(), q)]

    with sdpa_kernel(SDPBackend.MATH):
        plain = derivatives()
        with FastKernels():
            found = derivatives()
    for one, other in zip(found, plain, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_every_pass_runs_inside_and_leaves_nothing_behind():
    x = qkv(9, NARROW)
    before = F.scaled_dot_product_attention(*x, **CAUSAL)
    with frozen(case("llama").model.module):
        assert not torch.equal(F.scaled_dot_product_attention(*x, **CAUSAL), before)
    assert torch.equal(F.scaled_dot_product_attention(*x, **CAUSAL), before)
