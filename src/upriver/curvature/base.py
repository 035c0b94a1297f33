"""What every solver of ``(G + lambda I) v = q`` is: fit apart from solve, and damping an argument of ``solve``."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from upriver.errors import ConfigError
from upriver.runtime.config import parse_damping

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

    def of(self, lam: Tensor) -> float:
        return self.value * float(lam.double().mean()) if self.relative else self.value


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
