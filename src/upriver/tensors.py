"""Contractions, eigendecompositions and weighted low rank: pure functions of tensors.

Axes: N sequences, T positions, M real tokens, I inputs of a layer (+1 with a bias), O outputs, Q queries, R rank.
``a_NTI`` is a layer's input, ``g_NTO`` the gradient at its output, ``q_QOI`` a query gradient, ``v_QOI`` the solved one.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from upriver.errors import NumericalError

OVERSAMPLE, POWER_ITERATIONS = 16, 4
FLOOR = 1e-6  # of the largest eigenvalue: the smallest weight a direction has in the low-rank factorisation


class LowRank(NamedTuple):
    """``v_QOI = U_QOR @ V_QRI``."""

    U_QOR: Tensor
    V_QRI: Tensor

    def dense(self) -> Tensor:
        return self.U_QOR @ self.V_QRI


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float32 or wider, whatever the compute type (bfloat16 sums are off by 78 % after 2,048 batches)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequence_gradients(a_NTI: Tensor, g_NTO: Tensor) -> Tensor:
    """Each sequence's weight gradient, ``[N, O, I]``: tokens are summed here, before anything is squared."""
    return g_NTO.transpose(1, 2) @ a_NTI


def second_moment(x_MI: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_m x_m x_m^T``, ``[I, I]``, in ``dtype``."""
    x_MI = x_MI.to(dtype)
    return x_MI.T @ x_MI


def rotated_gradients(a_NTI: Tensor, g_NTO: Tensor, Q_A_II: Tensor, Q_S_OO: Tensor) -> Tensor:
    """``Q_S^T (sum_t g_t a_t^T) Q_A`` for each sequence, ``[N, O, I]``, by the cheaper of two orders.

    Rotating the tokens costs ``T (I^2 + O^2)`` multiplications a sequence, rotating the gradient ``O I (I + O)``.
    """
    (T, I), O = a_NTI.shape[1:], g_NTO.shape[2]
    if T * (I * I + O * O) <= O * I * (I + O):
        return sequence_gradients(a_NTI @ Q_A_II, g_NTO @ Q_S_OO)
    return Q_S_OO.T @ sequence_gradients(a_NTI, g_NTO) @ Q_A_II


def eigh(matrix_II: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (ascending, clamped at zero), eigenvectors, and the most negative eigenvalue over the largest.

    In float64: SciPy's divide and conquer on the CPU (about three quarters of the time of torch's), torch on a GPU.

    Raises:
        NumericalError: the matrix holds a NaN or an infinity, or the decomposition failed.
    """
    symmetric = (matrix_II.double() + matrix_II.double().T) / 2
    if not torch.isfinite(symmetric).all():
        raise NumericalError("a covariance holds NaN or infinity; check the weights, or fit with --dtype float32")
    try:
        if symmetric.is_cuda:
            values, vectors = torch.linalg.eigh(symmetric)
        else:
            w, z = scipy.linalg.eigh(symmetric.numpy(), driver="evd", overwrite_a=True, check_finite=False)
            values, vectors = torch.from_numpy(np.ascontiguousarray(w)), torch.from_numpy(np.ascontiguousarray(z))
    except (np.linalg.LinAlgError, RuntimeError) as error:
        raise NumericalError(f"an eigendecomposition did not converge: {error}") from error
    largest = float(values[-1].clamp(min=torch.finfo(torch.float64).tiny))
    return values.clamp(min=0), vectors, min(0.0, float(values[0]) / largest)


def weighted_low_rank(v_QOI: Tensor, rank: int, eig_S_O: Tensor, eig_A_I: Tensor) -> LowRank:
    """The rank-``rank`` factors of ``v`` (in the eigenbases) that keep the *score* best.

    A score is ``<v, sum_t g_t a_t^T>``; with ``E[g g^T] = diag(s)`` and ``E[a a^T] = diag(a)`` the expected squared error of a
    truncation is its Frobenius norm after weighting by ``sqrt(s)`` and ``sqrt(a)``.  So: weight, truncate, weight back.

    Shapes: ``v_QOI`` in the eigenbases, ``eig_S_O``, ``eig_A_I`` -> ``U_QOR``, ``V_QRI`` (with ``R = min(rank, O, I)``).
    """
    s_O = eig_S_O.clamp(min=FLOOR * eig_S_O.max()).sqrt().to(v_QOI)
    a_I = eig_A_I.clamp(min=FLOOR * eig_A_I.max()).sqrt().to(v_QOI)
    U_QOR, V_QRI = truncated_svd(s_O[:, None] * v_QOI * a_I, rank)
    return LowRank(U_QOR / s_O[:, None], V_QRI / a_I)


def truncated_svd(w_QOI: Tensor, rank: int) -> LowRank:
    """The best rank-``rank`` factors of each matrix: exact for small ones, randomised subspace iteration for large ones.

    The random start depends on the shape alone, so neither the number nor the order of the queries changes a result.
    """
    O, I = w_QOI.shape[1:]
    width = rank + OVERSAMPLE
    if width >= min(O, I) // 2:
        U, s, Vh = torch.linalg.svd(w_QOI, full_matrices=False)
        return LowRank(U[..., :rank] * s[:, None, :rank], Vh[:, :rank])
    generator = torch.Generator().manual_seed(0)
    basis = w_QOI @ torch.randn(I, width, generator=generator).to(w_QOI)
    for _ in range(POWER_ITERATIONS):
        basis = w_QOI @ (w_QOI.mT @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    U, s, Vh = torch.linalg.svd(basis.mT @ w_QOI, full_matrices=False)
    return LowRank(basis @ (U[..., :rank] * s[:, None, :rank]), Vh[:, :rank])
