"""Attention on the CPU: forward and backward by blocks of rows, each as long as the causal mask lets it see.

torch's fused kernel forms the probabilities again when it goes backward, and is slow at it, in bfloat16 above all.  Sequences of
a few hundred tokens have room to keep them, in the type of the model; what is left are plain products.  In bfloat16 the scores
before the softmax are float32, so the error is that of torch's kernel (``benchmarks/kernels.py`` prints speeds,
tests/test_attention.py compares errors).

Axes: N sequences, H heads, T tokens, D width of a head; B heads of some sequences, W tokens that a block of R rows sees.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upriver.tensors import NARROW_ONEDNN

FROM = {torch.float32: 256} | ({torch.bfloat16: 1} if NARROW_ONEDNN else {})  # tokens, from which on this is faster
LONGEST = 512  # tokens, up to which the probabilities are kept: T / 2 numbers a token and head
SHORT = 256  # tokens, below which bfloat16 with a mask of its own is faster in float32
ROWS = 64
CHUNK_BYTES = 4 << 20  # float32 scores at once: what stays in the caches


def attend(*args: Any, **kwargs: Any) -> Tensor | None:
    """``scaled_dot_product_attention`` by :class:`Attend` where that is faster and as exact; None where it is left to torch."""
    call = _Call(*args, **kwargs)
    if call.by_blocks:
        return call.attend()
    if call.short:
        wide = _Call(*map(_float, call))
        return F.scaled_dot_product_attention(**wide._asdict()).to(torch.bfloat16)
    return None


class _Call(NamedTuple):
    """The arguments of ``scaled_dot_product_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def by_blocks(self) -> bool:
        """Whether it is plain attention of middle length on the CPU, differentiated at most once."""
        q, k, v = self[:3]
        plain = self.attn_mask is None and not self.dropout_p and q.ndim == k.ndim == v.ndim == 4
        if not plain or type(q) is not Tensor or q.device.type != "cpu" or q.dtype not in FROM:
            return False
        same = len(q) == len(k) and q.shape[2] == k.shape[2] and (self.enable_gqa or q.shape[1] == k.shape[1])
        once = torch.backends.cuda.flash_sdp_enabled() and not torch._C._are_functorch_transforms_active()
        return same and once and FROM[q.dtype] <= q.shape[2] <= LONGEST

    @property
    def short(self) -> bool:
        q = self.query
        return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] < SHORT

    def attend(self) -> Tensor:
        shared = self.query.shape[1] // self.key.shape[1]
        k, v = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (self.key, self.value))
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return Attend.apply(self.query, k, v, scale, self.is_causal)  # type: ignore[no-any-return]


def _float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


class Attend(torch.autograd.Function):
    """``softmax(scale q k^T) v`` of ``[N, H, T, D]``, row ``t`` up to token ``t`` where it is causal."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        (N, H, T), wide_q, wide_k = q.shape[:3], q.float() * scale, k.float()
        D = v.shape[3]
        out = q.new_empty_strided((N, H, T, D), (T * H * D, D, H * D, 1))  # as torch's kernel lays it out; no view
        hidden_RR = torch.full((ROWS, ROWS), float("-inf")).triu_(1)
        kept = []
        for first, end, seen in _blocks(T, causal):
            p_NHRW = q.new_empty(N, H, end - first, seen)
            for some in _chunks(p_NHRW):
                p_BRW, v_BTD = p_NHRW[some].flatten(0, 1), v[some].flatten(0, 1)
                q_BRD, k_BWD = wide_q[some, :, first:end].flatten(0, 1), wide_k[some].flatten(0, 1)[:, :seen]
                s_BRW = torch.bmm(q_BRD, k_BWD.transpose(1, 2), out=p_BRW if p_BRW.dtype == q_BRD.dtype else None)
                if causal:
                    s_BRW[:, :, first:] += hidden_RR[: end - first, : end - first]
                torch.softmax(s_BRW, -1, out=s_BRW)
                if s_BRW is not p_BRW:
                    p_BRW.copy_(s_BRW)
                out[some, :, first:end] = torch.bmm(p_BRW, v_BTD[:, :seen]).unflatten(0, (-1, H))
            kept.append(p_NHRW)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        g = g.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, end, seen), p_NHRW in zip(_blocks(q.shape[2], ctx.causal), kept, strict=True):
            for some in _chunks(p_NHRW):
                q_BTD, k_BTD, v_BTD, g_BTD, dq_BTD, dk_BTD, dv_BTD = (
                    x[some].flatten(0, 1) for x in (q, k, v, g, dq, dk, dv)
                )
                p_BRW, g_BRD = p_NHRW[some].flatten(0, 1), g_BTD[:, first:end]
                _add(dv_BTD[:, :seen], p_BRW.transpose(1, 2), g_BRD)
                dp_BRW = torch.bmm(g_BRD, v_BTD[:, :seen].transpose(1, 2))
                ds_BRW = torch.ops.aten._softmax_backward_data(dp_BRW, p_BRW, -1, p_BRW.dtype)
                dq_BTD[:, first:end] = torch.bmm(ds_BRW, k_BTD[:, :seen])
                _add(dk_BTD[:, :seen], ds_BRW.transpose(1, 2), q_BTD[:, first:end])
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None


def _add(total_BWD: Tensor, left_BWR: Tensor, right_BRD: Tensor) -> None:
    """Add the products; in float32 the library would go through rows that lie apart one matrix at a time."""
    if total_BWD.dtype == torch.float32:
        total_BWD += left_BWR @ right_BRD
    else:
        total_BWD.baddbmm_(left_BWR, right_BRD)


def _blocks(T: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """First row, last row and tokens seen of each block."""
    for first in range(0, T, ROWS):
        end = min(first + ROWS, T)
        yield first, end, end if causal else T


def _chunks(p_NHRW: Tensor) -> Iterator[slice]:
    """Some sequences at a time."""
    step = max(1, CHUNK_BYTES // (4 * max(1, p_NHRW[0].numel())))
    return (slice(start, start + step) for start in range(0, len(p_NHRW), step))
