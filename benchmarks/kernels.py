"""Where the code prefers one way of computing the same over another: both in one run, on this machine.

    python benchmarks/kernels.py [--repeats 9]

Each line is the time of the other way over the time of ours, the median of the repeats in alternation.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scan import timed
from scipy.linalg.blas import ssyrk

import upriver  # noqa: F401 - sets how threads wait
from upriver.influence.score import dots
from upriver.kernels import MKL_AT_HOME, FastKernels, add_second_moment, matmul, one_core_each
from upriver.runtime.system import settle_memory
from upriver.tensors import Scratch, eigh, sequence_gradients

Work = Callable[[], object]


def rotation() -> tuple[str, Work, Work]:
    """Tokens turned into an eigenbasis of odd size, as a bias makes it."""
    scratch, x_NTI, Q_II = Scratch(), torch.randn(8, 256, 2049), torch.randn(2049, 2049)
    out_NTI = torch.empty(8, 256, 2049)
    return (
        "8 x 256 tokens turned, 2,049 wide: torch's product into rows as long as they are, over ours",
        lambda: torch.mm(x_NTI.flatten(0, 1), Q_II, out=out_NTI.flatten(0, 1)),
        lambda: scratch.product("x", x_NTI, Q_II),
    )


def gradients(O: int, I: int) -> tuple[str, Work, Work]:
    """Gradients of the sequences of a batch."""
    a_NTI, g_NTO, out_NOI = torch.randn(8, 256, I), torch.randn(8, 256, O), torch.empty(8, O, I)
    return (
        f"gradients of 8 sequences of 256 tokens, {O:,} x {I:,}: torch's product, over ours",
        lambda: torch.bmm(g_NTO.mT, a_NTI, out=out_NOI),
        lambda: sequence_gradients(a_NTI, g_NTO, out_NOI),
    )


def second_moments(I: int) -> tuple[str, Work, Work]:
    """Second moments of a batch."""
    x_MI, total_II = torch.randn(2048, I), torch.zeros(I, I)
    total, x = total_II.numpy().T, x_MI.numpy().T
    return (
        f"second moments of 2,048 tokens, {I:,} wide: BLAS, over ours",
        lambda: ssyrk(1.0, x, beta=1.0, c=total, overwrite_c=True),
        lambda: add_second_moment(total_II, x_MI),
    )


def linear(width: int, outputs: int, dtype: torch.dtype) -> tuple[str, Work, Work]:
    """A linear layer on 2,048 tokens."""
    x_MI, bias_O = torch.randn(2048, width, dtype=dtype), torch.randn(outputs, dtype=dtype)
    W_IO = torch.randn(outputs, width, dtype=dtype).T
    kind = str(dtype).removeprefix("torch.")
    return (
        f"a linear layer in {kind}, 2,048 tokens, {width:,} to {outputs:,}: torch's product, over ours",
        lambda: torch.addmm(bias_O, x_MI, W_IO),
        lambda: matmul(x_MI, W_IO, bias_O),
    )


def many_products() -> tuple[str, Work, Work]:
    """Many sequences times many queries, along some rows of their gradients."""
    G_NP, v_QP = torch.randn(64, 256 * 528)[:, : 32 * 528], torch.randn(256, 32 * 528)
    return (
        "64 sequences times 256 queries, along 32 x 528 of 256 x 528: torch's product, over ours",
        lambda: v_QP @ G_NP.T,
        lambda: matmul(G_NP, v_QP.T),
    )


def eigendecompositions() -> tuple[str, Work, Work]:
    """Two matrices side by side, one core each."""
    x = torch.randn(1024, 1024, dtype=torch.float64)
    matrix = x @ x.T

    def twice(eigh: Callable[[Any], object], of: Any) -> None:
        with one_core_each(2) as pool:
            list(pool.map(eigh, [of] * 2))

    numpy, mkl = partial(twice, np.linalg.eigh, matrix.numpy()), partial(twice, torch.linalg.eigh, matrix)
    what = "two eigendecompositions of 1,024 side by side"
    return (f"{what}: NumPy over torch", numpy, mkl) if MKL_AT_HOME else (f"{what}: torch over NumPy", mkl, numpy)


def narrow_eigendecomposition() -> tuple[str, Work, Work]:
    """As a fit in bfloat16 does it."""
    x = torch.randn(2048, 2048, dtype=torch.float64)
    matrix = x @ x.T
    narrow = matrix.float()
    return "an eigendecomposition of 2,048: in float64, over in float32", lambda: eigh(matrix), lambda: eigh(narrow)


def few_products(N: int, Q: int, O: int, I: int) -> tuple[str, Work, Work]:
    """Few sequences times few queries."""
    G_NOI, v_QOI = torch.randn(N, O, I), torch.randn(Q, O, I)
    return (
        f"{N} sequences times {Q} queries, {O:,} x {I:,}: one product, over parts side by side",
        lambda: v_QOI.flatten(1) @ G_NOI.flatten(1).T,
        lambda: dots(G_NOI, v_QOI),
    )


def attention(length: int, heads: int, width: int, dtype: torch.dtype) -> tuple[str, Work, Work]:
    """Forward and backward of 2,048 tokens, laid out as models do it."""
    N = 2048 // length
    qkv = [torch.randn(N, length, heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    outer = torch.randn(N, length, heads, width, dtype=dtype).transpose(1, 2)

    def plain() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*qkv, is_causal=True), qkv, outer)

    def ours() -> None:
        with FastKernels():
            plain()

    kind = str(dtype).removeprefix("torch.")
    return (
        f"attention in {kind}, {N} x {heads} heads of {length} tokens x {width}: torch's kernel, over blocks",
        plain,
        ours,
    )


def masked_attention() -> tuple[str, Work, Work]:
    """Short sequences with a mask of their own, forward and backward."""
    qkv = [torch.randn(16, 5, 128, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(128, 128, dtype=torch.bfloat16)

    def plain() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*qkv, attn_mask=mask).sum(), qkv)

    def ours() -> None:
        with FastKernels():
            plain()

    return (
        "attention in bfloat16 with a mask, 16 x 5 heads of 128 tokens x 32: as it is, over float32 inside",
        plain,
        ours,
    )


def ratio(other: Work, ours: Work, repeats: int) -> float:
    timed(other), timed(ours)  # warm up
    return statistics.median(timed(other) / timed(ours) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    settle_memory(reuse=True)  # as a pass does where the memory allows
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for what, other, ours in (
        rotation(), gradients(2048, 513), gradients(512, 2049), second_moments(513), second_moments(2049),
        eigendecompositions(), narrow_eigendecomposition(), many_products(),
        few_products(8, 16, 2048, 513), few_products(16, 3, 1536, 576),
        linear(512, 2048, torch.float32), linear(2048, 512, torch.float32), linear(512, 8192, torch.float32),
        linear(160, 432, torch.float32), linear(512, 2048, torch.bfloat16),
        attention(128, 5, 32, torch.bfloat16), attention(256, 8, 64, torch.bfloat16), attention(512, 8, 64, torch.bfloat16),
        attention(256, 8, 64, torch.float32), attention(512, 8, 64, torch.float32), masked_attention(),
    ):  # fmt: skip
        print(f"{ratio(other, ours, args.repeats):5.2f}  {what}")


if __name__ == "__main__":
    main()
