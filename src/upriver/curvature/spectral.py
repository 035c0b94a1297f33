"""Curvatures held as eigenvalues and eigenvectors over all tracked weights: exact, Arnoldi and Nystrom are one class.

``G ~ U_PR diag(lam_R) U_PR^T``: what differs is where ``U`` and ``lam`` come from.

    exact      the whole matrix, assembled column by column     P = R; small models
    arnoldi    a Krylov space, fully re-orthogonalised          Schioppa et al. 2022 (arXiv 2112.03052)
    nystrom    a random sketch                                  Frangella et al. 2021 (arXiv 2110.02820)

What ``U`` does not span has eigenvalue zero and is damped like the rest, or it is dropped (the projected form).  Every solution
is judged by one more product with the matrix itself.  Axes: P tracked parameters, R eigenvectors, K of a Krylov space.
"""

from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from upriver.curvature.base import Curvature, Damping, Grads, Solution
from upriver.curvature.blocks import SINGULAR
from upriver.curvature.products import Products, diagonal
from upriver.errors import ConfigError, ModelError, NumericalError

EXACT_PARAMETERS = 8_192  # float64: half a gigabyte, and minutes for the eigenvectors
NEGLIGIBLE = 500  # times the rounding of the largest eigenvalue
CLOSED = 1e-11  # of the largest eigenvalue, or its rounding: what is left outside a Krylov space that has closed


class Spectral(Curvature):
    """``U diag(lam) U^T`` in place of the matrix of ``product``.

    Args:
        outside: of the span of ``U``: ``damped`` by ``1 / lambda``, or ``projected``, which drops it.
        negative: eigenvalues that a Hessian has: ``refuse`` them in a solve that does not damp them away, or ``drop`` them here.
        tolerance: of the relative residual; a solution above it has not converged.

    Example:
        >>> Spectral.exact(Products(model, layers, data)).solve(q, Damping.parse(1e-3))
    """

    def __init__(
        self,
        product: Products,
        U_PR: Tensor,
        lam_R: Tensor,
        *,
        outside: Literal["damped", "projected"] = "damped",
        negative: Literal["refuse", "drop"] = "refuse",
        tolerance: float = 1e-3,
    ):
        self.product, self.space, self.outside, self.tolerance = product, product.space, outside, tolerance
        drop = negative == "drop" or product.kind == "gauss-newton"  # which has none but for rounding
        self.U_PR, self.lam_R = U_PR, lam_R.clamp(min=0) if drop else lam_R
        self.dropped_R = lam_R.clamp(max=0) if negative == "drop" else torch.zeros_like(lam_R)
        self.built = product.done

    @classmethod
    def exact(cls, product: Products, **how: Any) -> "Spectral":
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
        lam_P, U_PP = _eigh(product(torch.eye(P, dtype=torch.float64, device=product.theta_P.device)))
        return cls(product, U_PP, lam_P, **how)

    @classmethod
    def arnoldi(
        cls, product: Products, rank: int, iterations: int | None = None, seed: int = 0, **how: Any
    ) -> "Spectral":
        """The ``rank`` eigenvalues of largest magnitude in a Krylov space of ``iterations`` (default twice the rank) products."""
        basis_KP, projected_KK = _krylov(product, min(product.space.P, iterations or 2 * rank), seed)
        lam_K, vectors_KK = _eigh(projected_KK)
        top = lam_K.abs().argsort(descending=True)[:rank]
        return cls(product, basis_KP.T @ vectors_KK[:, top].to(basis_KP), lam_K[top].to(basis_KP), **how)

    @classmethod
    def nystrom(cls, product: Products, rank: int, seed: int = 0, **how: Any) -> "Spectral":
        """``(G X) (X^T G X)^+ (G X)^T`` for a random orthonormal ``X`` of ``rank`` columns.

        Raises:
            ConfigError: a Hessian, which has negative eigenvalues.
        """
        if product.kind == "hessian":
            raise ConfigError("the Nystrom sketch needs a positive semi-definite matrix; use the Gauss-Newton matrix")
        P = product.space.P
        X_PR = torch.linalg.qr(_random(min(rank, P), product, seed).T).Q
        Y_PR = product(X_PR.T.contiguous()).T
        core_R, vectors_RR = _eigh(X_PR.T @ Y_PR)
        kept = core_R > NEGLIGIBLE * torch.finfo(Y_PR.dtype).eps * core_R.max()
        U_PR, root_R, _ = torch.linalg.svd(
            Y_PR @ (vectors_RR[:, kept] / core_R[kept].sqrt()).to(Y_PR), full_matrices=False
        )
        return cls(product, U_PR, root_R.square(), **how)

    def solve(self, q: Grads, damping: Damping) -> Solution:
        """``(G + lambda I)^-1 q``.

        Raises:
            NumericalError: an eigenvalue plus the damping is zero or negative; or the relative damping is negative.
        """
        q_QP, done = self.space.flatten(q).to(self.U_PR), self.product.done
        lambda_P = self.space.spread(self.lambdas(damping), self.U_PR)
        middle, U_PR, lam_R, scale_P = float(lambda_P.mean()), self.U_PR, self.lam_R, torch.ones_like(lambda_P)
        uniform = bool((lambda_P == lambda_P[0]).all())
        if not uniform:  # G + lambda = scale (scale^-1 G scale^-1 + middle) scale
            scale_P = (lambda_P / middle).clamp(min=SINGULAR).sqrt()
            U_PR, lam_R = self._scaled(scale_P)
        outside = [middle] if uniform and self.outside == "damped" and not self._whole else []
        self._check(lam_R + middle, outside if uniform else [float(lambda_P.min())])
        x_QP = q_QP / scale_P
        along_QR = x_QP @ U_PR
        v_QP = along_QR / (lam_R + middle) @ U_PR.T
        if self.outside == "damped" and not self._whole:
            v_QP += (x_QP - along_QR @ U_PR.T) / middle
        v_QP /= scale_P
        left_QP = self.product(v_QP) - (v_QP @ self.U_PR * self.dropped_R) @ self.U_PR.T + lambda_P * v_QP - q_QP
        residual_Q = left_QP.norm(dim=1) / q_QP.norm(dim=1).clamp(min=torch.finfo(q_QP.dtype).tiny)
        stats: dict[str, Any] = {
            "rank": len(self.lam_R), "products": self.product.done - done, "products_to_build": self.built,
            "residual": residual_Q.tolist(), "tolerance": self.tolerance,
        }  # fmt: skip
        if int((self.dropped_R < 0).sum()):
            stats["dropped"] = int((self.dropped_R < 0).sum())
        converged = bool((residual_Q <= self.tolerance).all())
        if not converged:
            stats["why"] = (
                f"the relative residual is {float(residual_Q.max()):.1e} at rank {len(self.lam_R)}, above the tolerance of "
                f"{self.tolerance:.0e}; give a higher rank or a larger damping, or use conjugate gradients"
            )
        return Solution(self._like(v_QP, q), converged, stats)

    def matvec(self, q: Grads, damping: Damping) -> Grads:
        q_QP = self.space.flatten(q).to(self.U_PR)
        lambda_P = self.space.spread(self.lambdas(damping), self.U_PR)
        return self._like((q_QP @ self.U_PR * self.lam_R) @ self.U_PR.T + lambda_P * q_QP, q)

    def lambdas(self, damping: Damping) -> dict[str, float]:
        """Relative damping is per layer, from the mean eigenvalue of the layer's own block: that of ``U``, and of what it leaves
        as :func:`diagonal` finds it.

        Raises:
            NumericalError: it is negative, as that mean is.
        """
        if not damping.relative:
            return dict.fromkeys(self.space.shapes, damping.value)
        lambdas = {name: damping.of(mean) for name, mean in self._means.items()}
        name = min(lambdas, key=lambda x: lambdas[x])
        if lambdas[name] < 0:
            raise NumericalError(
                f"relative damping of layer {name!r} is negative, as the mean of its eigenvalues is: got {lambdas[name]:.1e}; "
                "give an absolute damping"
            )
        return lambdas

    @property
    def _whole(self) -> bool:
        return len(self.lam_R) == self.space.P

    @cached_property
    def _means(self) -> dict[str, float]:
        own_P = self.U_PR.square() @ self.lam_R

        def rest(v_QP: Tensor) -> Tensor:
            return self.product(v_QP) - (v_QP @ self.U_PR * (self.lam_R + self.dropped_R)) @ self.U_PR.T

        return self.space.means(own_P if self._whole else own_P + diagonal(rest, self.space.P, own_P))

    def _scaled(self, scale_P: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenvectors and eigenvalues of ``scale^-1 U diag(lam) U^T scale^-1``."""
        Q_PR, R_RR = torch.linalg.qr(self.U_PR / scale_P[:, None])
        lam_R, vectors_RR = _eigh((R_RR * self.lam_R) @ R_RR.T)
        return Q_PR @ vectors_RR.to(Q_PR), lam_R.to(Q_PR)

    def _check(self, damped_R: Tensor, outside: list[float]) -> None:
        least, smallest = min([float(damped_R.min()), *outside]), min([float(damped_R.abs().min()), *outside])
        mean = float(self.lam_R.abs().sum()) / self.space.P
        if least < -SINGULAR * mean:
            raise NumericalError(
                f"the damped matrix is not positive definite: got {int((damped_R < 0).sum())} negative eigenvalues, the lowest "
                f"{least:.1e}; drop them (negative='drop'), give a larger --damping, or use the Gauss-Newton matrix"
            )
        if not smallest > SINGULAR * mean:
            raise NumericalError(
                f"the damped curvature is singular: got an eigenvalue plus damping of {smallest:.1e} where their mean is "
                f"{mean:.1e}; give a larger --damping, such as 0.1x"
            )

    def _like(self, v_QP: Tensor, q: Grads) -> Grads:
        return {name: v.to(q[name]) for name, v in self.space.unflatten(v_QP).items()}


def _krylov(product: Products, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """An orthonormal Krylov basis ``[K, P]`` and the matrix in it ``[K, K]``.

    When the space closes before ``steps`` it is restarted from a new random vector, so that repeated eigenvalues are found;
    it ends when the matrix sends such a vector to nothing.
    """
    basis_KP = torch.zeros(steps, product.space.P, dtype=product.theta_P.dtype, device=product.theta_P.device)
    upper_KK = torch.zeros(steps, steps, dtype=torch.float64)
    rounding = torch.finfo(basis_KP.dtype).eps
    q_1P, largest, filled = None, 0.0, 0
    for k in range(steps):
        restarted = q_1P is None
        if q_1P is None:
            q_1P = _outside(_random(1, product, seed + k), basis_KP, CLOSED)
        if q_1P is None:
            break
        image_1P = product(q_1P)
        size = float(image_1P.norm())
        largest = max(largest, size)
        if restarted and size <= NEGLIGIBLE * rounding * largest:
            break
        basis_KP[k], filled = q_1P[0], k + 1
        upper_KK[: k + 1, k] = (basis_KP[: k + 1] @ image_1P[0]).cpu()
        q_1P = _outside(image_1P, basis_KP[:filled], max(CLOSED, 10 * rounding) * largest)
    upper_KK = upper_KK[:filled, :filled].triu()
    return basis_KP[:filled], (upper_KK + upper_KK.triu(1).T).to(basis_KP.device)


def _outside(x_1P: Tensor, basis_KP: Tensor, least: float) -> Tensor | None:
    """The unit vector along the part of ``x`` orthogonal to the basis, None when less than ``least`` is left of it."""
    for _ in range(2):  # the second time removes what rounding left of the first
        x_1P = x_1P - (x_1P @ basis_KP.T) @ basis_KP
    norm = float(x_1P.norm())
    return None if norm <= least else x_1P / norm


def _random(rows: int, product: Products, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, product.space.P, generator=generator, dtype=torch.float64).to(product.theta_P)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors, in float64, negative ones kept."""
    if not torch.isfinite(matrix).all():
        raise NumericalError("the curvature holds NaN or infinity; check the weights")
    return torch.linalg.eigh((matrix + matrix.T).double() / 2)
