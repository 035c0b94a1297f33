"""What every solver of ``(G + lambda I) v = q`` is: fit apart from solve, and damping an argument of ``solve``.

Axes: Q queries, O outputs and I inputs of a layer, R rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upriver.errors import ConfigError
from upriver.runtime.config import parse_damping
from upriver.tensors import LowRank, Square, product, truncated_svd, weighted_low_rank

Grads = dict[str, Tensor]  # layer name -> q_QOI


class Damping(NamedTuple):
    """``lambda``: absolute, or a multiple of the mean eigenvalue of each layer (``0.1x``, the default)."""

    value: float = 0.1
    relative: bool = True

    @classmethod
    def parse(cls, text: "str | float | Damping") -> "Damping":
        """``"0.1x"`` or ``1e-3``.

        Raises:
            ConfigError: not a number from 0.
        """
        if isinstance(text, Damping):
            return text
        try:
            return cls(*parse_damping(text))
        except ValueError as error:
            raise ConfigError(f"bad damping: got {text!r}; {error}") from error

    def of(self, lam: Tensor | float) -> float:
        """``lambda`` of a layer with the eigenvalues ``lam``, or with that mean of them."""
        mean = float(lam.double().mean()) if isinstance(lam, Tensor) else lam
        return self.value * mean if self.relative else self.value


class Moments(NamedTuple):
    """The eigendecompositions of one layer's ``A`` and ``S``: bases, eigenvalues, and the mean positions per sequence.

    Where ``A`` and ``S`` are kept in diagonal blocks, so are the bases, and eigenvalues ascend within each block.
    """

    Q_A_II: Square
    Q_S_OO: Square
    eig_A_I: Tensor
    eig_S_O: Tensor
    T_mean: float

    def rotate(self, q_QOI: Tensor) -> Tensor:
        return self.Q_S_OO.T @ q_QOI @ self.Q_A_II

    def back(self, v_QOI: Tensor) -> Tensor:
        return self.Q_S_OO @ v_QOI @ self.Q_A_II.T

    def back_factors(self, low: LowRank) -> LowRank:
        """All queries in one product for each side: many small ones reach two thirds of its speed."""
        (Q, O, R), I = low.U_QOR.shape, low.V_QRI.shape[2]
        U_QRO = product(low.U_QOR.transpose(1, 2).reshape(Q * R, O), self.Q_S_OO.T)
        V_QRI = product(low.V_QRI.reshape(Q * R, I), self.Q_A_II.T)
        return LowRank(U_QRO.unflatten(0, (Q, R)).transpose(1, 2), V_QRI.unflatten(0, (Q, R)))

    def to(self, like: Tensor) -> "Moments":
        Q_A, Q_S, eig_A, eig_S, T_mean = self
        return Moments(Q_A.to(like), Q_S.to(like), eig_A.to(like), eig_S.to(like), T_mean)


class Solution(NamedTuple):
    """``value`` solves the system for every layer; when it does not, ``converged`` is False and ``stats["why"]`` says why."""

    value: Grads
    converged: bool
    stats: dict[str, Any]


class Curvature(ABC):
    """A positive semi-definite matrix over the tracked weights that can be applied and inverted."""

    @abstractmethod
    def solve(self, q: Grads, damping: Damping) -> Solution:
        """``(G + lambda I)^-1 q`` for every layer and query, shapes as given."""

    @abstractmethod
    def matvec(self, q: Grads, damping: Damping) -> Grads:
        """``(G + lambda I) q``."""

    @abstractmethod
    def lambdas(self, damping: Damping) -> dict[str, float]:
        """``lambda`` of every layer: a relative damping is a multiple of the mean eigenvalue of the layer's own block."""

    def solve_low_rank(
        self, q: Grads, damping: Damping, rank: int, metric: Callable[[str], Moments | None] = lambda name: None
    ) -> tuple[dict[str, LowRank], Solution]:
        """Solve, then compress each layer; see :func:`compress`.  The solution is given without its value."""
        solution = self.solve(q, damping)
        low = {name: compress(v_QOI, rank, metric(name)) for name, v_QOI in solution.value.items()}
        return low, solution._replace(value={})


def compress(v_QOI: Tensor, rank: int, metric: Moments | None) -> LowRank:
    """``v`` at rank ``rank``: in the metric of the layer's second moments where a fit gives them, else plainly."""
    if metric is None:
        return LowRank(*(torch.stack(x) for x in zip(*(truncated_svd(v, rank) for v in v_QOI), strict=True)))
    m = metric.to(v_QOI)
    return m.back_factors(weighted_low_rank(m.rotate(v_QOI), rank, m.eig_S_O, m.eig_A_I))
