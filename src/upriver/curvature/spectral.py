"""Curvatures held as eigenvalues and eigenvectors over all tracked weights: exact, Arnoldi and Nystrom are one class.

``G ~ U_PR diag(lam_R) U_PR^T``: what differs is where ``U`` and ``lam`` come from.

    exact      the whole matrix, assembled column by column     P = R; small models
    arnoldi    a Krylov space, fully re-orthogonalised          Schioppa et al. 2022 (arXiv 2112.03052)
    nystrom    a random sketch                                  Frangella et al. 2021 (arXiv 2110.02820)

What ``U`` does not span has eigenvalue zero and is damped like the rest.  Axes: P tracked parameters, R eigenvectors.
"""

import torch
from torch import Tensor

from upriver.curvature.base import Curvature, Damping, Grads, Solution
from upriver.curvature.blocks import SINGULAR
from upriver.curvature.products import Products, Space
from upriver.errors import ConfigError, ModelError, NumericalError

EXACT_PARAMETERS = 8_192  # float64: half a gigabyte, and minutes for the eigenvectors
NEGLIGIBLE = 1e-13  # of the largest eigenvalue, in float64
CLOSED = 1e-11  # of the largest eigenvalue: what is left outside a Krylov space that has closed


class Spectral(Curvature):
    """``U diag(lam) U^T``, with ``lam_R`` in float64; only the exact Hessian may have negative eigenvalues.

    Example:
        >>> Spectral.exact(Products(model, layers, data)).solve(q, Damping.parse(1e-3))
    """

    def __init__(self, space: Space, U_PR: Tensor, lam_R: Tensor):
        self.space, self.U_PR, self.lam_R = space, U_PR, lam_R

    @classmethod
    def exact(cls, product: Products) -> "Spectral":
        """Every eigenvalue of the matrix.

        Raises:
            ModelError: more tracked parameters than can be held as a dense matrix.
        """
        P = product.space.P
        if P > EXACT_PARAMETERS:
            raise ModelError(
                f"too many parameters for the exact curvature: got {P:,}, at most {EXACT_PARAMETERS:,} "
                "fit in a dense matrix; track fewer with --layers, or use conjugate gradients"
            )
        matrix_PP = product(torch.eye(P, dtype=torch.float64, device=product.device))
        lam_P, U_PP = _eigh(matrix_PP)
        return cls(product.space, U_PP, lam_P.clamp(min=0) if product.kind == "gauss-newton" else lam_P)

    @classmethod
    def arnoldi(cls, product: Products, rank: int, iterations: int | None = None, seed: int = 0) -> "Spectral":
        """The ``rank`` eigenvalues of largest magnitude in a Krylov space of ``iterations`` (default twice the rank) products."""
        P = product.space.P
        basis_KP, projected_KK = _krylov(product, min(P, iterations or 2 * rank), seed)
        lam_K, vectors_KK = _eigh(projected_KK)
        top = lam_K.abs().argsort(descending=True)[:rank]
        return cls(product.space, basis_KP.T @ vectors_KK[:, top], lam_K[top])

    @classmethod
    def nystrom(cls, product: Products, rank: int, seed: int = 0) -> "Spectral":
        """``(G X) (X^T G X)^+ (G X)^T`` for a random orthonormal ``X`` of ``rank`` columns.

        Raises:
            ConfigError: a Hessian, which has negative eigenvalues.
        """
        if product.kind == "hessian":
            raise ConfigError("the Nystrom sketch needs a positive semi-definite matrix; use the Gauss-Newton matrix")
        P = product.space.P
        X_PR = torch.linalg.qr(_random(P, min(rank, P), seed, product.device)).Q
        Y_PR = product(X_PR.T.contiguous()).T
        core_R, vectors_RR = _eigh(X_PR.T @ Y_PR)
        kept = core_R > NEGLIGIBLE * core_R.max()
        U_PR, root_R, _ = torch.linalg.svd(Y_PR @ (vectors_RR[:, kept] / core_R[kept].sqrt()), full_matrices=False)
        return cls(product.space, U_PR, root_R.square())

    def solve(self, q: Grads, damping: Damping) -> Solution:
        """``(G + lambda I)^-1 q``; relative damping is per layer, from the mean eigenvalue of the layer's own block.

        Raises:
            NumericalError: an eigenvalue plus the damping is zero, so there is no inverse; or relative damping is negative.
        """
        q_QP, lambda_P = self.space.flatten(q).double(), self._lambda(damping)
        uniform = bool((lambda_P == lambda_P[0]).all())
        smallest = self._smallest(lambda_P[0]) if uniform else float(lambda_P.min())
        mean = float(self.lam_R.abs().sum()) / self.space.P
        if not smallest > SINGULAR * mean:
            raise NumericalError(
                f"the damped curvature is singular: got an eigenvalue plus damping of {smallest:.1e} where their mean is "
                f"{mean:.1e}; give a larger --damping, such as 0.1x"
            )
        v_QP = self._solve_uniform(q_QP, lambda_P[0]) if uniform else self._solve_by_layer(q_QP, lambda_P)
        return Solution(self._like(v_QP, q), True, {"rank": len(self.lam_R)})

    def matvec(self, q: Grads, damping: Damping) -> Grads:
        q_QP = self.space.flatten(q).double()
        return self._like((q_QP @ self.U_PR * self.lam_R) @ self.U_PR.T + self._lambda(damping) * q_QP, q)

    def _smallest(self, damping: Tensor) -> float:
        outside = [] if len(self.lam_R) == self.space.P else [float(damping)]
        return min([float((self.lam_R + damping).abs().min()), *outside])

    def _solve_uniform(self, q_QP: Tensor, damping: Tensor) -> Tensor:
        along_QR = q_QP @ self.U_PR
        inside_QP = along_QR / (self.lam_R + damping) @ self.U_PR.T
        if len(self.lam_R) == self.space.P:
            return inside_QP
        return inside_QP + (q_QP - along_QR @ self.U_PR.T) / damping

    def _solve_by_layer(self, q_QP: Tensor, lambda_P: Tensor) -> Tensor:
        """Woodbury's identity with ``W = U sqrt|lam|`` and the signs of ``lam`` between."""
        W_PR = self.U_PR * self.lam_R.abs().sqrt()
        scaled_PR = W_PR / lambda_P[:, None]
        signs_R = torch.where(self.lam_R < 0, -1.0, 1.0).to(W_PR)
        small_RR = torch.diag(signs_R) + W_PR.T @ scaled_PR
        return q_QP / lambda_P - torch.linalg.solve(small_RR, (q_QP @ scaled_PR).T).T @ scaled_PR.T

    def _lambda(self, damping: Damping) -> Tensor:
        diagonal_P = self.U_PR.square() @ self.lam_R
        blocks = self.space.unflatten(diagonal_P[None])
        lambdas = {name: damping.of(block) for name, block in blocks.items()}
        name = min(lambdas, key=lambda x: lambdas[x])
        if lambdas[name] < 0:
            raise NumericalError(
                f"relative damping of layer {name!r} is negative, as the mean of its eigenvalues is: got {lambdas[name]:.1e}; "
                "give an absolute damping"
            )
        return self.space.spread(lambdas, diagonal_P)

    def _like(self, v_QP: Tensor, q: Grads) -> Grads:
        return {name: v.to(q[name]) for name, v in self.space.unflatten(v_QP).items()}


def _krylov(product: Products, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """An orthonormal Krylov basis ``[K, P]`` and the matrix in it ``[K, K]``.

    When the space closes before ``steps`` it is restarted from a new random vector, so that repeated eigenvalues are found;
    it ends when the matrix sends such a vector to nothing.
    """
    fresh_KP = _random(steps, product.space.P, seed, product.device)
    basis_KP, images_KP = torch.zeros_like(fresh_KP), torch.zeros_like(fresh_KP)
    q_1P, largest, filled = None, 0.0, 0
    for k in range(steps):
        restarted = q_1P is None
        if q_1P is None:
            q_1P = _outside(fresh_KP[k : k + 1], basis_KP, 1.0)
        if q_1P is None:
            break
        image_1P = product(q_1P)
        size = float(image_1P.norm())
        largest = max(largest, size)
        if restarted and size <= NEGLIGIBLE * largest:
            break
        basis_KP[k], images_KP[k] = q_1P[0], image_1P[0]
        filled = k + 1
        q_1P = _outside(image_1P, basis_KP, largest)
    return basis_KP[:filled], basis_KP[:filled] @ images_KP[:filled].T


def _outside(x_1P: Tensor, basis_KP: Tensor, scale: float) -> Tensor | None:
    """The unit vector along the part of ``x`` orthogonal to the basis, None when less than rounding is left of it."""
    for _ in range(2):  # the second time removes what rounding left of the first
        x_1P = x_1P - (x_1P @ basis_KP.T) @ basis_KP
    norm = float(x_1P.norm())
    return None if norm <= CLOSED * scale else x_1P / norm


def _random(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(device)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors, in float64, negative ones kept."""
    if not torch.isfinite(matrix).all():
        raise NumericalError("the curvature holds NaN or infinity; check the weights")
    return torch.linalg.eigh((matrix + matrix.T).double() / 2)
