"""Attention in bfloat16 on the CPU: in float32 inside for short sequences, untouched elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from cases import case
from upriver.model.attention import SHORT, ShortAttention
from upriver.model.capture import frozen


def qkv(T: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(2, 3, T, 8, generator=generator).to(dtype) for _ in range(3)]


def attend(x: list[torch.Tensor]) -> torch.Tensor:
    return F.scaled_dot_product_attention(*x, is_causal=True)


def test_short_sequences_are_computed_in_float32_and_rounded_once():
    x = qkv(SHORT - 1, torch.bfloat16)
    expected = attend([t.float() for t in x]).to(torch.bfloat16)
    with ShortAttention():
        assert torch.equal(attend(x), expected)
    assert not torch.equal(attend(x), expected)  # by itself bfloat16 rounds on the way, so the test above can fail


@pytest.mark.parametrize(("T", "dtype"), [(SHORT, torch.bfloat16), (8, torch.float32), (8, torch.float64)])
def test_others_are_left_alone(T, dtype):
    x = qkv(T, dtype)
    expected = attend(x)
    with ShortAttention():
        assert torch.equal(attend(x), expected)


def test_a_mask_given_by_name_is_turned_with_the_rest():
    x, mask = qkv(9, torch.bfloat16), torch.randn(9, 9).to(torch.bfloat16)
    expected = F.scaled_dot_product_attention(*[t.float() for t in x], attn_mask=mask.float()).to(torch.bfloat16)
    with ShortAttention():
        assert torch.equal(F.scaled_dot_product_attention(*x, attn_mask=mask), expected)


def test_every_pass_runs_inside_and_leaves_nothing_behind():
    x = qkv(9, torch.bfloat16)
    before = attend(x)
    with frozen(case("llama").model.module):
        assert not torch.equal(attend(x), before)
    assert torch.equal(attend(x), before)
