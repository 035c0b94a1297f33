"""Weights that no linear module holds, and that are those of a linear layer all the same.

A vector ``l_O`` that scales activations ``h`` is a layer with one input, which is 1, and ``g h`` for the gradient at its output.
Vectors of IA3 are such, and the scales of a norm with its shift behind them.  While a pass is captured, the module that holds a
:class:`Part` calls it, so that the hook of capture sees it.
"""

import re
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upriver.errors import ModelError

ROUTER_CLASS = re.compile(r"(Router|Gate)$")
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[str, "Part"]] = weakref.WeakKeyDictionary()


class Part(nn.Module):
    """A matrix in parameters of another module, which it does not hold itself."""

    stored: Any  # the parameters that hold this matrix and its bias, by their names in its owner
    number = 0  # of several in one parameter
    index: Any = (...,)  # where in a stored parameter this matrix stands
    transposed: Any = False
    bias: Any = None

    def __init__(self, owner: nn.Module, part: str, key: str | None = None):
        super().__init__()
        self.part, self._owner = part, weakref.ref(owner)
        self.key = part if key is None else key  # its name in its owner; of what is the owner's own weight none

    @property
    def owner(self) -> Any:
        found = self._owner()
        assert found is not None
        return found

    def pieces(self, p: Tensor) -> list[Tensor]:
        """A stored parameter as those of the single matrices; :meth:`joined` puts them together again."""
        return [p]

    def joined(self, pieces: list[Tensor]) -> Tensor:
        return pieces[0]

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


class Router(Part):
    """The bare matrix of a router, which multiplies with it by :func:`torch.nn.functional.linear`."""

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        return {name: p for name in ("weight", "bias") if (p := self.owner._parameters.get(name)) is not None}

    @property
    def bias(self) -> Tensor | None:
        return self.stored.get("bias")

    def forward(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(a, weight, bias)


class Multiplying(TorchFunctionMode):
    """Products with the matrix of a router go through it inside."""

    def __init__(self, router: Part):
        super().__init__()
        self.router, self.shape = router, router.weight.shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = func is nn.functional.linear and len(args) > 1 and args[1].shape == self.shape
        return (self.router if own else func)(*args, **(kwargs or {}))


def parts_of(module: Any) -> dict[str, Part]:
    """The parts of a module by their names in it, but for experts."""
    if ROUTER_CLASS.search(type(module).__name__):
        weight = module._parameters.get("weight")
        bare = weight is not None and weight.ndim == 2 and not isinstance(module, nn.Linear)
        return {"": _KNOWN.setdefault(module, {"": Router(module, "weight", "")})[""]} if bare else {}
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
    if "" in held:
        with Multiplying(held[""]):
            return type(module).forward(module, x, *args, **kwargs)
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


def given(args: tuple, kwargs: dict) -> Any:
    """What a layer is called with."""
    return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def kept(module: Any, args: tuple, kwargs: dict) -> Tensor:
    """What is kept of a call: the input, or of a norm what its weights scale, which ones for them give and zeros do not."""
    if isinstance(module, Vector) or not is_vector(module):
        return given(args, kwargs)
    held = module._parameters["weight"]

    def given_by(value: float) -> Tensor:
        module._parameters["weight"] = torch.full_like(held, value)
        return module.forward(*args, **kwargs)

    try:
        return given_by(1.0) - given_by(0.0)
    finally:
        module._parameters["weight"] = held


def unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight with at each position: its input, of a convolution the patches ``[N, positions, I]``.

    Raises:
        ModelError: a convolution is given one image instead of a batch.
    """
    if not isinstance(module, nn.Conv2d):
        return x
    if x.ndim != 4:
        raise ModelError(
            f"a convolution sees no batch of images: got an input of shape {tuple(x.shape)}; give [N, C, H, W]"
        )
    how = "constant" if module.padding_mode == "zeros" else module.padding_mode
    around = module._reversed_padding_repeated_twice  # as numbers, also of padding="same"
    padded = torch.nn.functional.pad(x, around, mode=how)
    found = torch.nn.functional.unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return found.transpose(1, 2)


def by_position(module: nn.Module, g: Tensor) -> Tensor:
    """The gradient at a layer's output with the outputs last: of a convolution ``[N, positions, O]``."""
    return g.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else g


def as_matrix(module: nn.Module, x: Tensor, g: Tensor, T: int | None) -> tuple[Tensor, Tensor]:
    """The inputs of a layer and the gradients at its output as those of one matrix, position by position.

    Args:
        x: what was :func:`kept`.
        T: positions of a sequence, by which they are told from heads that share a vector.
    """
    if is_vector(module):
        g_O = g * x if getattr(module, "bias", None) is None else torch.cat([g * x, g], -1)
        if g_O.ndim == 4:
            behind = x.shape[2] == T and (x.shape[1] != T or x.stride(1) < x.stride(2))
            g_O = g_O.sum(1 if behind else 2)
        return g.new_ones(*g_O.shape[:-1], 1), g_O
    if isinstance(module, nn.Embedding):  # a token is a column of the matrix, but for that of padding
        real = (x != (-1 if module.padding_idx is None else module.padding_idx)).to(g.dtype)
        return g.new_zeros(*x.shape, len(module.weight)).scatter_(-1, x[..., None], real[..., None]), g
    return unfolded(module, x), by_position(module, g)
