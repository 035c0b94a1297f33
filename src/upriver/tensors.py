"""Contractions, eigendecompositions and weighted low rank: pure functions of tensors.

Axes: N sequences, T positions, M real tokens, I inputs of a layer (+1 with a bias), O outputs, Q queries, R rank.
``a_NTI`` is a layer's input, ``g_NTO`` the gradient at its output, ``q_QOI`` a query gradient, ``v_QOI`` the solved one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from upriver.errors import NumericalError
from upriver.kernels import aligned, matmul, suits, syevd

OVERSAMPLE, RANDOM_STEPS = 16, 4
FLOOR = 1e-6  # of the largest eigenvalue: the smallest weight a direction has in the low-rank factorisation


class LowRank(NamedTuple):
    """``v_QOI = U_QOR @ V_QRI``."""

    U_QOR: Tensor
    V_QRI: Tensor

    def dense(self) -> Tensor:
        return self.U_QOR @ self.V_QRI


@dataclass(frozen=True)
class BlockDiagonal:
    """A square matrix that is zero but for ``blocks`` along its diagonal; ``x @ Q``, ``Q @ x`` and ``Q.T`` as with a tensor."""

    blocks: tuple[Tensor, ...]

    @property
    def sides(self) -> list[int]:
        return [len(block) for block in self.blocks]

    @property
    def T(self) -> "BlockDiagonal":
        return BlockDiagonal(tuple(block.T for block in self.blocks))

    def to(self, like: Tensor) -> "BlockDiagonal":
        return BlockDiagonal(tuple(block.to(like) for block in self.blocks))

    def __matmul__(self, x: Tensor) -> Tensor:
        return torch.cat([Q @ part for Q, part in zip(self.blocks, x.split(self.sides, -2), strict=True)], -2)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.cat([part @ Q for Q, part in zip(self.blocks, x.split(self.sides, -1), strict=True)], -1)


Square = Tensor | BlockDiagonal


def numbered(name: str, count: int) -> list[str]:
    """The names of the blocks of a matrix in a file: its own where it is one block, else ``name.0``, ``name.1``, ..."""
    return [name] if count == 1 else [f"{name}.{k}" for k in range(count)]


def square(blocks: Sequence[Tensor]) -> Square:
    """The square matrix with ``blocks`` along its diagonal: the tensor itself where it is one block."""
    return blocks[0] if len(blocks) == 1 else BlockDiagonal(tuple(blocks))


class Scratch:
    """Memory that is used again and again: pages that were given back to the system would have to be had afresh."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size, held = math.prod(shape), self._held.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            self._held.pop(name, None)
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)

    def rows(self, name: str, like_NTI: Tensor, width: int) -> Tensor:
        """``[N, T, aligned(width)]``, to be filled up to ``width``; zeros beyond."""
        out_NTW = self.take(name, (*like_NTI.shape[:2], aligned(width)), like_NTI)
        out_NTW[..., width:] = 0
        return out_NTW

    def padded(self, name: str, x_NTI: Tensor) -> Tensor:
        """A copy with rows laid out :func:`aligned`, zeros at their ends: ``[N, T, aligned(I)]``."""
        I = x_NTI.shape[2]
        out_NTW = self.rows(name, x_NTI, I)
        out_NTW[..., :I] = x_NTI
        return out_NTW

    def product(self, name: str, x_NTI: Tensor, y_IK: Square, width: int | None = None) -> Tensor:
        """``x @ y`` with rows laid out :func:`aligned`: ``[N, T, K]``, or ``[N, T, width]`` with zeros beyond K."""
        x_MI = x_NTI.flatten(0, 1)
        if isinstance(y_IK, BlockDiagonal):
            K, sides = sum(y_IK.sides), y_IK.sides
            out_NTW = self.rows(name, x_NTI, K)
            outs = out_NTW.flatten(0, 1)[:, :K].split(sides, 1)
            for out, part, block in zip(outs, x_MI.split(sides, 1), y_IK.blocks, strict=True):
                out.copy_(matmul(part, block))
            return out_NTW[..., : width or K]
        K = y_IK.shape[1]
        if suits(x_MI, y_IK):  # a second factor that is laid out by columns needs none beyond them
            wide_IW = pad(y_IK, (0, aligned(K) - K)) if y_IK.is_contiguous() else y_IK
            return matmul(x_MI, wide_IW).unflatten(0, x_NTI.shape[:2])[..., : width or K]
        out_NTW = self.rows(name, x_NTI, K)
        torch.mm(x_MI, y_IK, out=out_NTW.flatten(0, 1)[:, :K])
        return out_NTW[..., : width or K]


def product(x_MI: Tensor, y_IK: Square) -> Tensor:
    """``x @ y`` with rows laid out :func:`aligned`."""
    return Scratch().product("", x_MI[None], y_IK)[0]


def even_parts(total: int, most: int) -> list[slice]:
    """As few parts of ``total`` as with ``most`` in each, of about equal size."""
    count = -(-total // most)
    bounds = [i * total // max(1, count) for i in range(count + 1)]
    return [slice(*ends) for ends in pairwise(bounds)]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float32 or wider, whatever the compute type (bfloat16 sums are off by 78 % after 2,048 batches)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequence_gradients(a_NTI: Tensor, g_NTO: Tensor, out_NOI: Tensor | None = None) -> Tensor:
    """Each sequence's weight gradient, ``[N, O, I]``: tokens are summed here, before anything is squared.

    Args:
        out_NOI: where they are put.
    """
    g_NOT = g_NTO.transpose(1, 2)
    if not (len(a_NTI) and suits(g_NOT[0], a_NTI[0])):
        return g_NOT @ a_NTI if out_NOI is None else torch.bmm(g_NOT, a_NTI, out=out_NOI)
    if len(a_NTI) == 1 and out_NOI is None:
        return matmul(g_NOT[0], a_NTI[0])[None]
    out_NOI = a_NTI.new_empty(len(a_NTI), g_NTO.shape[2], a_NTI.shape[2]) if out_NOI is None else out_NOI
    for out_OI, g_OT, a_TI in zip(out_NOI, g_NOT, a_NTI, strict=True):
        out_OI.copy_(matmul(g_OT, a_TI))
    return out_NOI


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; the host goes on at once, which CUDA allows from pinned memory only."""
    ahead = device.type == "cuda" and on_cpu(x)
    return x.pin_memory().to(device, non_blocking=True) if ahead else x.to(device)


def symmetric(lower_II: Tensor) -> Tensor:
    """The symmetric matrix of which ``lower_II`` holds the lower triangle."""
    return lower_II.tril() + lower_II.tril(-1).T


def rotated_gradients(
    a_NTI: Tensor, g_NTO: Tensor, Q_A_II: Square | None, Q_S_OO: Square | None, scratch: Scratch | None = None
) -> Tensor:
    """``Q_S^T (sum_t g_t a_t^T) Q_A`` for each sequence, ``[N, O, I]``, each side rotated where it is cheaper.

    Multiplications a sequence: on the tokens ``T I^2`` and ``T O^2``, on the gradient ``O I^2`` and ``O^2 I``.

    Args:
        Q_A_II, Q_S_OO: None when the inputs, or the gradients at the outputs, are rotated already.
        scratch: memory for rotated tokens.
    """
    (T, I), O, scratch = a_NTI.shape[1:], g_NTO.shape[2], scratch or Scratch()
    if Q_A_II is not None and T <= O:
        a_NTI, Q_A_II = scratch.product("a", a_NTI, Q_A_II), None
    if Q_S_OO is not None and T <= I:
        g_NTO, Q_S_OO = scratch.product("g", g_NTO, Q_S_OO), None
    G_NOI = sequence_gradients(a_NTI, g_NTO)
    if isinstance(Q_A_II, BlockDiagonal):
        G_NOI = G_NOI @ Q_A_II
    elif Q_A_II is not None:
        G_NOI = matmul(G_NOI.flatten(0, 1), Q_A_II).view_as(G_NOI)
    return G_NOI if Q_S_OO is None else Q_S_OO.T @ G_NOI


def eigh(matrix_II: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (ascending, clamped at zero), eigenvectors, and the most negative eigenvalue over the largest, in its type.

    Raises:
        NumericalError: the matrix holds a NaN or an infinity, or the decomposition failed.
    """
    if not torch.isfinite(matrix_II).all():
        raise NumericalError("a covariance holds NaN or infinity; check the weights, or fit with --dtype float32")
    try:
        values, vectors = syevd(matrix_II)
    except torch.OutOfMemoryError:
        raise
    except (np.linalg.LinAlgError, RuntimeError) as error:
        raise NumericalError(f"an eigendecomposition did not converge: {error}") from error
    largest = float(values[-1].clamp(min=torch.finfo(values.dtype).tiny))
    return values.clamp(min=0), vectors, min(0.0, float(values[0]) / largest)


def root_weights(eig_I: Tensor) -> Tensor:
    """Square roots of eigenvalues, none below a floor: how much an error along each direction moves a score."""
    return eig_I.clamp(min=FLOOR * eig_I.max()).sqrt()


def weighted_low_rank(v_QOI: Tensor, rank: int, eig_S_O: Tensor, eig_A_I: Tensor) -> LowRank:
    """The rank-``rank`` factors of ``v`` (in the eigenbases) that keep the *score* best.

    A score is ``<v, sum_t g_t a_t^T>``; with ``E[g g^T] = diag(s)`` and ``E[a a^T] = diag(a)`` the expected squared error of a
    truncation is its Frobenius norm after weighting by ``sqrt(s)`` and ``sqrt(a)``.  So: weight, truncate, weight back.

    Shapes: ``v_QOI`` in the eigenbases, ``eig_S_O``, ``eig_A_I`` -> ``U_QOR``, ``V_QRI`` (with ``R = min(rank, O, I)``).
    """
    s_O, a_I = root_weights(eig_S_O).to(v_QOI), root_weights(eig_A_I).to(v_QOI)
    found = [truncated_svd(s_O[:, None] * v_OI * a_I, rank) for v_OI in v_QOI]
    U_QOR, V_QRI = (torch.stack(x) for x in zip(*found, strict=True))
    return LowRank(U_QOR / s_O[:, None], V_QRI / a_I)


def truncated_svd(w_OI: Tensor, rank: int, start_IK: Tensor | None = None) -> LowRank:
    """The best rank-``rank`` factors ``U_OR``, ``V_RI`` of a matrix: exact for small ones, by subspace iteration for large ones.

    Args:
        start_IK: columns that span most of what ``w`` acts on, where they are known: one step from there is as good as four
            from random ones (0.2 to 2 % above the least error on slowly decaying spectra).

    The random numbers depend on the shape alone, so the other queries of a run change nothing.
    """
    O, I = w_OI.shape
    width = rank + OVERSAMPLE
    if width >= min(O, I) // 2:
        U, s, Vh = torch.linalg.svd(w_OI, full_matrices=False)
        return LowRank(U[:, :rank] * s[:rank], Vh[:rank])
    basis_OW = matmul(w_OI, _start(I, width, start_IK).to(w_OI))
    for _ in range(RANDOM_STEPS if start_IK is None else 1):
        basis_OW = matmul(w_OI, matmul(orthonormal(basis_OW).T, w_OI).T)
    basis_OW = orthonormal(orthonormal(basis_OW))  # twice: once leaves the rounding of a squared condition number
    core_WI = matmul(basis_OW.T, w_OI)
    even_WI = _of_size_one(core_WI)
    _, U_WW = torch.linalg.eigh((even_WI @ even_WI.T).double())
    U_WR = U_WW.flip(1)[:, :rank].to(w_OI)
    return LowRank(basis_OW @ U_WR, U_WR.T @ core_WI)


def _start(I: int, width: int, given_IK: Tensor | None) -> Tensor:
    """Known columns, mixed when there are more than ``width`` of them, random ones to fill up: ``[I, width]``."""
    generator = torch.Generator().manual_seed(0)
    if given_IK is None:
        return torch.randn(I, width, generator=generator)
    given_IK = given_IK / given_IK.norm(dim=0).clamp(min=torch.finfo(given_IK.dtype).tiny)
    K = given_IK.shape[1]
    if width <= K:
        return given_IK @ torch.randn(K, width, generator=generator).to(given_IK)
    return torch.cat([given_IK, torch.randn(I, width - K, generator=generator).to(given_IK) / I**0.5], 1)


def orthonormal(x_OW: Tensor) -> Tensor:
    """Columns that span those of a tall ``x``: from the eigenvectors of its small Gram matrix, cheaper than QR; zero for zero."""
    x_OW = _of_size_one(x_OW)
    values_W, vectors_WW = torch.linalg.eigh((x_OW.T @ x_OW).double())
    scale_W = values_W.clamp(min=1e-14 * values_W[-1].clamp(min=1.0)).rsqrt()
    return x_OW @ (vectors_WW * scale_W).to(x_OW)


def _of_size_one(x: Tensor) -> Tensor:
    """``x`` with a largest entry of 1, whose squares neither vanish nor overflow; zero stays zero."""
    return x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
