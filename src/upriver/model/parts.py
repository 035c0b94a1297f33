"""Weights that no linear module holds, and that are those of a linear layer all the same.

A vector ``l_O`` that scales activations ``h`` is a layer with one input, which is 1, and ``g h`` for the gradient at its output.
Vectors of IA3 are such, and the scales of a norm with its shift behind them.  While a pass is captured, the module that holds a
:class:`Part` calls it, so that the hook of capture sees it.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, "Part"]] = weakref.WeakKeyDictionary()


class Part(nn.Module):
    """A matrix in parameters of another module, which it does not hold itself."""

    number = 0  # of several in one parameter

    def __init__(self, owner: nn.Module, part: str):
        super().__init__()
        self.part, self._owner = part, weakref.ref(owner)

    @property
    def owner(self) -> Any:
        found = self._owner()
        assert found is not None
        return found

    @property
    def key(self) -> str:
        """Its name in its owner."""
        return self.part

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        """The parameters that hold this matrix and its bias, by their names in its owner."""
        raise NotImplementedError

    @property
    def index(self) -> tuple[Any, ...]:
        """Where in a stored parameter this matrix stands."""
        return (...,)

    def pieces(self, p: Tensor) -> list[Tensor]:
        """A stored parameter as those of the single matrices; :meth:`joined` puts them together again."""
        return [p]

    def joined(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0]

    @property
    def transposed(self) -> bool:
        return False

    @property
    def bias(self) -> Tensor | None:
        return None

    @property
    def weight(self) -> Tensor:
        """``[O, I]``."""
        weight = next(iter(self.stored.values()))[self.index]
        return weight.T if self.transposed else weight


class Vector(Part):
    """A vector of IA3, ``[O, 1]``: on the input of a layer it is stored as ``[1, O]``."""

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        return {self.part: self.owner.ia3_l[self.part.removeprefix("ia3_l.")]}

    @property
    def transposed(self) -> bool:
        return self.owner.is_feedforward

    def forward(self, h: Tensor) -> Tensor:
        return (h * next(iter(self.stored.values())).flatten()).to(h.dtype)


def parts_of(module: Any) -> dict[str, Part]:
    """The parts of a module by their names in it; those of experts are elsewhere."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.tuners.ia3.layer.IA3Layer):
        return {}
    known = _KNOWN.setdefault(module, {})
    keys = [f"ia3_l.{adapter}" for adapter, p in module.ia3_l.items() if p.ndim == 2]
    known |= {key: Vector(module, key) for key in keys if key not in known}
    return {key: known[key] for key in keys}


def calling_parts(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward pass of a module, through its parts."""
    held = parts_of(module)
    vectors = [held[key] for adapter in module.active_adapters if (key := f"ia3_l.{adapter}") in held]
    if module.disable_adapters or module.merged or len(vectors) < len(module.ia3_l.keys() & module.active_adapters):
        return type(module).forward(module, x, *args, **kwargs)
    if not module.is_feedforward:
        x = module.base_layer(x, *args, **kwargs)
    for vector in vectors:
        x = vector(x)
    return module.base_layer(x, *args, **kwargs) if module.is_feedforward else x


def is_vector(module: nn.Module) -> bool:
    """Whether the weights of a module scale, and shift, what it gives."""
    weight = None if isinstance(module, Part) else module._parameters.get("weight")
    return isinstance(module, Vector) or (weight is not None and weight.ndim == 1)


@torch.no_grad()
def scaled_by(module: Any, args: tuple, kwargs: dict) -> Tensor:
    """What the weights of a module scale: what it gives with ones for them, less what it gives with zeros."""
    if isinstance(module, Vector):
        return args[0]
    held = module._parameters["weight"]

    def given_by(value: float) -> Tensor:
        module._parameters["weight"] = torch.full_like(held, value)
        return module.forward(*args, **kwargs)

    try:
        return given_by(1.0) - given_by(0.0)
    finally:
        module._parameters["weight"] = held


def vector_gradient(module: nn.Module, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs 1 and the gradients ``g h`` of a vector, those of a shift behind them."""
    g_O = g * h if getattr(module, "bias", None) is None else torch.cat([g * h, g], -1)
    return g.new_ones(*g.shape[:-1], 1), g_O
