"""Processor tuning, all of it: what torch can do by itself, done faster on the CPU.

Nothing else depends on how these functions work: with torch's own operations in their place (``tests/plain.py``) everything runs
and gives the same numbers, only slower.  ``benchmarks/kernels.py`` measures what each of them is worth.

Axes: M rows of a matrix, I columns of the first factor, K of the second; N sequences, H heads, T tokens, D width of a head,
B heads of some sequences, W tokens that a block of R rows of attention sees.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import get_blas_funcs
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Item = TypeVar("Item")
Result = TypeVar("Result")


CPUINFO = Path("/proc/cpuinfo")  # of Linux
INTEL = CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text()
MKL_AT_HOME = torch.backends.mkl.is_available() and INTEL
ONEDNN = torch.backends.mkldnn.is_available()
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
WIDE_ONEDNN = ONEDNN and torch.backends.mkl.is_available() and not MKL_AT_HOME and AVX512  # as far as it is measured
NARROW_ONEDNN = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()

ALIGNED = 16  # numbers of 4 bytes in 64
SHORT, SMALL = 16, 1 << 21  # the shortest side, and the multiplications, of a product that oneDNN is given
PACKED_BYTES = 128 << 20  # of a second factor, which oneDNN copies: a chunk of logits, of which the plan has two
BROAD, BLOCK = 384, 128  # columns from which oneDNN forms second moments faster than BLAS, and of its blocks at least
# columns from which SciPy's BLAS pays: where nobody told its idle threads to sleep (run.py), they hold up those of torch
SYRK = 1 if "OPENBLAS_THREAD_TIMEOUT" in os.environ else 1024
BLOCKS, COLUMNS = 8, 384  # parts of a symmetric product at most (9/16 of the full one), columns of one at least
SIDES = 2  # pieces of work that share the cores

# Attention by blocks: tokens from which on it is faster, and up to which the probabilities are kept (T / 2 of a token and head).
FROM = {torch.float32: 256} | ({torch.bfloat16: 1} if NARROW_ONEDNN else {})
LONGEST = 512
BRIEF = 256  # tokens, below which bfloat16 with a mask of its own is faster in float32
ROWS = 64  # of a block
CHUNK_BYTES = 4 << 20  # float32 scores at once: what stays in the caches


def aligned(n: int) -> int:
    """The width of rows of at least ``n`` numbers that all start at a multiple of 64 bytes.

    Products take up to a third longer where rows do not start at such places.
    """
    return -(-n // ALIGNED) * ALIGNED


def matmul(x_MI: Tensor, y_IK: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """``x @ y``, plus the bias; no gradient passes through it.

    On the CPU by oneDNN: in float32 on processors with AVX-512 that are not Intel's, where MKL, which torch takes, leaves it
    aside and needs up to twice as long; in bfloat16 with a bias, which torch copies first.
    """
    if suits(x_MI, y_IK, bias_K):
        return torch.ops.mkldnn._linear_pointwise(x_MI.contiguous(), y_IK.T, bias_K, "none", [], "")  # type: ignore[no-any-return]
    return x_MI @ y_IK if bias_K is None else torch.addmm(bias_K, x_MI, y_IK)


def suits(x_MI: Tensor, y_IK: Tensor, bias_K: Tensor | None = None) -> bool:
    """Whether oneDNN pays: the product is large, and the second factor is small enough to be copied and has no gaps between its
    rows (with gaps oneDNN takes a thousand times longer)."""
    like = x_MI.dtype
    alike = all(t is None or (t.dtype == like and t.device.type == "cpu") for t in (x_MI, y_IK, bias_K))
    if not alike or not _faster(like, bias_K is not None):
        return False
    (M, I), K = x_MI.shape, y_IK.shape[1]
    dense = y_IK.is_contiguous() or y_IK.T.is_contiguous()
    return dense and min(M, I, K) >= SHORT and M * I * K >= SMALL and y_IK.nbytes <= PACKED_BYTES


def _faster(dtype: torch.dtype, bias: bool) -> bool:
    return (WIDE_ONEDNN and dtype == torch.float32) or (NARROW_ONEDNN and dtype == torch.bfloat16 and bias)


def add_second_moment(total_II: Tensor, x_MI: Tensor) -> None:
    """Add ``sum_m x_m x_m^T`` to the lower triangle of ``total_II``, in its dtype.

    Half the multiplications of the full product: by BLAS ``syrk`` for wide ones on the CPU; by block rows elsewhere, where oneDNN
    is faster, where the threads of two libraries would wait for each other (narrow ones), and for half precision, whose
    products (each summed in float32 by the library, then rounded once) are faster by more than the conversion costs.
    """
    same, I = x_MI.dtype == total_II.dtype, x_MI.shape[1]
    if not x_MI.numel():
        return
    if same and I >= BROAD and suits(x_MI.T, x_MI):
        x_IM = x_MI.T.contiguous()
        step = max(BLOCK, -(-I // BLOCKS))
        for i in range(0, I, step):
            total_II[i : i + step, : i + step] += matmul(x_IM[i : i + step], x_IM[: i + step].T)
    elif same and total_II.device.type == "cpu" and I >= SYRK:
        # column-major, as BLAS sees it, both are transposed: the upper triangle there is the lower one here
        total, x = total_II.numpy().T, x_MI.contiguous().numpy().T
        syrk: Any = get_blas_funcs("syrk", (total,))
        syrk(1.0, x, beta=1.0, c=total, overwrite_c=True)
    else:
        count = -(-I // max(COLUMNS, -(-I // BLOCKS)))
        for first, end in pairwise(i * I // count for i in range(count + 1)):
            left_iM, right_MI, part = x_MI[:, first:end].T, x_MI[:, :end], total_II[first:end, :end]
            if same:
                part.addmm_(left_iM, right_MI)
            else:
                part += left_iM @ right_MI


def syevd(matrix_II: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix of which only the lower triangle is read.

    By divide and conquer.  Either library lets other threads run meanwhile, so that each core can have a matrix of its own:
    torch's, MKL, takes a sixth less time than NumPy's, OpenBLAS, on processors of MKL's maker, and more on others.  A GPU's
    own library does it there; where torch's fails, NumPy takes over.

    Raises:
        numpy.linalg.LinAlgError: it did not converge.
    """
    if matrix_II.device.type != "cpu" or MKL_AT_HOME:
        try:
            return torch.linalg.eigh(matrix_II)
        except RuntimeError:  # cuSOLVER and MKL give up on some matrices, and a device runs out of memory
            pass
    values, vectors = (torch.from_numpy(x) for x in np.linalg.eigh(matrix_II.cpu().numpy()))
    return values.to(matrix_II), vectors.to(matrix_II)


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """``map`` on the CPU's cores in two halves, because one piece of work does not keep all busy; elsewhere one by one."""
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores < SIDES:
        yield from map(work, items)
        return

    def with_its_share(item: Item) -> Result:
        torch.set_num_threads(cores // SIDES)  # of this thread
        return work(item)

    try:
        with ThreadPoolExecutor(SIDES) as pool:
            yield from pool.map(with_its_share, items)
    finally:
        torch.set_num_threads(cores)


@contextmanager
def one_core_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that work with one core each, in NumPy and in torch."""
    cores, one = torch.get_num_threads(), {"initializer": torch.set_num_threads, "initargs": (1,)}
    try:
        with threadpool_limits(1), ThreadPoolExecutor(workers, **one) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


class FastKernels(TorchFunctionMode):
    """Inside, attention, and linear layers whose parameters are frozen, are computed here where that is faster and as exact."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours, kwargs = OURS.get(function), kwargs or {}
        found = None if ours is None else ours(*args, **kwargs)
        return function(*args, **kwargs) if found is None else found


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """``torch.nn.functional.linear``; None where it is better left to torch."""
    return Linear.apply(input, weight.T, bias) if _replaceable(input, weight, bias) else None  # type: ignore[no-any-return]


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Tensor | None:
    """``torch.addmm``, as the layers of GPT-2 call it."""
    plain = beta == alpha == 1 and out is None and _replaceable(mat1, mat2, input) and input.ndim == 1
    return Linear.apply(mat1, mat2, input) if plain else None  # type: ignore[no-any-return]


def _replaceable(x: Any, weight: Any, bias: Any) -> bool:
    """Plain tensors on the CPU, differentiated at most to ``x``, and in a type whose product is faster."""
    if (
        type(x) is not Tensor
        or x.device.type != "cpu"
        or x.dtype != weight.dtype
        or not _faster(x.dtype, bias is not None)
    ):
        return False
    parameters = [weight] if bias is None else [weight, bias]
    frozen = all(type(p) in (Tensor, torch.nn.Parameter) and not p.requires_grad for p in parameters)
    return frozen and not torch.is_autocast_enabled("cpu") and not torch._C._are_functorch_transforms_active()


class Linear(torch.autograd.Function):
    """``x W + b`` of ``[..., I]``, ``[I, O]`` and ``[O]``, which has a gradient to ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_IO: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(W_IO)
        out = matmul(x.reshape(-1, x.shape[-1]), W_IO, bias_O)
        # a view could not be written over afterwards
        return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], W_IO.shape[1]])

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (W_IO,) = ctx.saved_tensors
        return Linear.apply(outer[0], W_IO.T, None), None, None  # type: ignore[no-any-return]


def attend(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """``scaled_dot_product_attention``; None where it is better left to torch.

    torch's fused kernel forms the probabilities again when it goes backward, and is slow at it, in bfloat16 above all.  Sequences
    of a few hundred tokens have room to keep them, in the type of the model; what is left are plain products.  In bfloat16 the
    scores before the softmax are float32, so the error is that of torch's kernel.
    """
    if query.device.type != "cpu":
        return None
    if _by_blocks(query, key, value, attn_mask, dropout_p, enable_gqa):
        shared = query.shape[1] // key.shape[1]
        k, v = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return Attend.apply(query, k, v, scale, is_causal)  # type: ignore[no-any-return]
    if query.dtype == torch.bfloat16 and query.shape[-2] < BRIEF:
        q, k, v, mask = (
            x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
            for x in (query, key, value, attn_mask)
        )
        wide = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return wide.to(torch.bfloat16)
    return None


def _by_blocks(q: Any, k: Any, v: Any, mask: Any, dropout: float, shares: bool) -> bool:
    """Whether it is plain attention of middle length, differentiated at most once."""
    plain = mask is None and not dropout and q.ndim == k.ndim == v.ndim == 4
    if not plain or type(q) is not Tensor or q.dtype not in FROM:
        return False
    same = len(q) == len(k) and q.shape[2] == k.shape[2] and (shares or q.shape[1] == k.shape[1])
    once = torch.backends.cuda.flash_sdp_enabled() and not torch._C._are_functorch_transforms_active()
    return same and once and FROM[q.dtype] <= q.shape[2] <= LONGEST


class Attend(torch.autograd.Function):
    """``softmax(scale q k^T) v`` of ``[N, H, T, D]``, row ``t`` up to token ``t`` where it is causal, by blocks of rows."""

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


OURS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: attend,
    F.linear: linear,
    torch.addmm: addmm,
}
