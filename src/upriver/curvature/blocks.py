"""Curvatures that are diagonal in a Kronecker basis, layer by layer: identity, diagonal, K-FAC and EK-FAC are one class.

``G = (Q_S x Q_A) diag(lam_OI) (Q_S x Q_A)^T``: what differs is ``lam`` and the basis.

    ekfac      lam measured in the eigenbasis                       eq. 20
    kfac       lam = T_mean x outer(eig S, eig A)                   eq. 17, in the units of eq. 20
    diagonal   lam measured in the weights' own basis
    identity   lam = 1, no damping: the gradient dot product
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from upriver.curvature.base import Curvature, Damping, Grads, Moments, Solution, compress
from upriver.errors import NumericalError
from upriver.tensors import LowRank, product, root_weights, truncated_svd

SINGULAR = 1e-12  # of the mean eigenvalue: what a float32 fit leaves where the true eigenvalue is zero


class TokenGradient(NamedTuple):
    """A query's gradient as it arises, a sum over tokens: ``q_OI = sum_m g_m a_m^T``."""

    a_MI: Tensor
    g_MO: Tensor

    def dense(self) -> Tensor:
        return self.g_MO.T @ self.a_MI


def rotate_tokens(basis: Moments, queries: list[TokenGradient]) -> list[TokenGradient]:
    """The same queries in the eigenbases; all their tokens go through one product."""
    sizes = [len(q.a_MI) for q in queries]
    a_MI = product(torch.cat([q.a_MI for q in queries]), basis.Q_A_II)
    g_MO = product(torch.cat([q.g_MO for q in queries]), basis.Q_S_OO)
    return list(map(TokenGradient, a_MI.split(sizes), g_MO.split(sizes)))


class Eigenblock(NamedTuple):
    """One layer's curvature: eigenvalues ``lam_OI`` in the basis of ``basis`` (None: the weights' own)."""

    lam_OI: Tensor
    basis: Moments | None
    mean: float | None = None  # the eigenvalue of which a relative damping is a multiple; None: the mean of ``lam_OI``

    @classmethod
    def ekfac(cls, moments: Moments, lam_OI: Tensor) -> "Eigenblock":
        return cls(lam_OI, moments)

    @classmethod
    def kfac(cls, moments: Moments) -> "Eigenblock":
        """``T_mean x outer(eig S, eig A)``: ``A`` and ``S`` are means per token, ``lam`` is one per sequence, so the mean
        number of positions makes the two comparable and one damping mean the same for both."""
        return cls(moments.T_mean * torch.outer(moments.eig_S_O, moments.eig_A_I), moments)

    @classmethod
    def diagonal(cls, lam_OI: Tensor) -> "Eigenblock":
        return cls(lam_OI, None)

    @classmethod
    def identity(cls, O: int, I: int) -> "Eigenblock":
        return cls(torch.ones(O, I), None)

    def to(self, like: Tensor) -> "Eigenblock":
        return Eigenblock(self.lam_OI.to(like), None if self.basis is None else self.basis.to(like), self.mean)

    def damped(self, damping: Damping) -> float:
        """``lambda`` of the layer."""
        return damping.of(self.lam_OI if self.mean is None else self.mean)

    def matvec(self, q_QOI: Tensor, damping: Damping) -> Tensor:
        return self._back(self._rotate(q_QOI) * (self.lam_OI + self.damped(damping)))

    def solve(self, q_QOI: Tensor, damping: Damping) -> Tensor:
        """``(G + lambda I)^-1 q`` (eq. 21), ``[Q, O, I]``.

        Raises:
            NumericalError: ``lam + lambda`` is zero somewhere, so there is no inverse.
        """
        return self._back(self._rotate(q_QOI) / self.denominator(damping))

    def solve_tokens(self, queries: list[TokenGradient], damping: Damping) -> Tensor:
        """The solutions ``[Q, O, I]`` of queries given by their tokens, which are rotated instead of the dense gradients."""
        denominator_OI = self.denominator(damping)
        if self.basis is not None:
            queries = rotate_tokens(self.basis, queries)
        return torch.stack([self._back(q.dense().div_(denominator_OI)) for q in queries])

    def solve_low_rank(
        self, queries: list[TokenGradient], damping: Damping, rank: int, metric: Moments | None
    ) -> LowRank:
        """The solutions at rank ``rank``, truncated in the metric of the layer's second moments; see :func:`weighted_low_rank`.

        All is done in the eigenbasis, where curvature and weights are diagonal; only the factors are rotated back.
        """
        denominator_OI = self.denominator(damping)
        if self.basis is None:
            parts = [
                compress(q.dense().div_(denominator_OI)[None], rank, metric) for q in queries
            ]  # one at a time is whole
            return LowRank(*map(torch.cat, zip(*parts, strict=True)))
        metric = self.basis
        s_O, a_I = root_weights(metric.eig_S_O), root_weights(metric.eig_A_I)
        weight_OI = torch.outer(s_O, a_I).div_(denominator_OI)
        start_I = a_I / denominator_OI.mean(0)  # what the weights do to the tokens, on average over outputs
        w_OI = torch.empty_like(weight_OI)  # one for all queries: fresh memory would cost as much as the product
        found = []
        for q in rotate_tokens(self.basis, queries):
            torch.mm(q.g_MO.T, q.a_MI, out=w_OI).mul_(weight_OI)
            found.append(truncated_svd(w_OI, rank, (q.a_MI * start_I).T))
        U_QOR, V_QRI = (torch.stack(x) for x in zip(*found, strict=True))
        return metric.back_factors(LowRank(U_QOR.div_(s_O[:, None]), V_QRI.div_(a_I)))

    def energies(self, queries: list[TokenGradient], damping: Damping) -> Tensor:
        """``q^T (G + lambda I)^-1 q`` of queries given by their tokens, float64 ``[Q]``."""
        denominator_OI = self.denominator(damping)
        if self.basis is not None:
            queries = rotate_tokens(self.basis, queries)
        return torch.stack([(q.dense().square() / denominator_OI).sum(dtype=torch.float64) for q in queries])

    def denominator(self, damping: Damping) -> Tensor:
        """``lam_OI + lambda``, refused where it is zero."""
        denominator_OI = self.lam_OI + self.damped(damping)
        mean = float(self.lam_OI.double().mean()) if self.mean is None else self.mean
        smallest = float(denominator_OI.min())
        if not smallest > SINGULAR * mean:
            raise NumericalError(
                f"the damped curvature is singular: got an eigenvalue plus damping of {smallest:.1e} where their mean is "
                f"{mean:.1e}; give a larger --damping, such as 0.1x"
            )
        return denominator_OI

    def _rotate(self, q_QOI: Tensor) -> Tensor:
        return q_QOI if self.basis is None else self.basis.rotate(q_QOI)

    def _back(self, v_QOI: Tensor) -> Tensor:
        return v_QOI if self.basis is None else self.basis.back(v_QOI)


class BlockCurvature(Curvature):
    """One :class:`Eigenblock` per layer, fetched when its turn comes and let go after; it takes the dtype of what it is given."""

    def __init__(self, names: Iterable[str], block: Callable[[str], Eigenblock]):
        self.names = list(names)
        self.block = block

    def solve(self, q: Grads, damping: Damping) -> Solution:
        solved = {name: self.block(name).to(q[name]).solve(q[name], damping) for name in self.names}
        return Solution(solved, True, {})

    def matvec(self, q: Grads, damping: Damping) -> Grads:
        return {name: self.block(name).to(q[name]).matvec(q[name], damping) for name in self.names}

    def lambdas(self, damping: Damping) -> dict[str, float]:
        return {name: self.block(name).damped(damping) for name in self.names}
