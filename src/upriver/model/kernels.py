"""What a model's own operations are replaced by while its layers are looked at: the same numbers, faster on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from upriver.model import attention
from upriver.tensors import gains, matmul, on_cpu


class FastKernels(TorchFunctionMode):
    """Inside, attention, and linear layers whose parameters are frozen, are computed here where that is faster and as exact."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = OURS.get(function)
        found = None if ours is None else ours(*args, **kwargs)
        return function(*args, **kwargs) if found is None else found


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """``torch.nn.functional.linear``; None where it is better left to torch."""
    return Linear.apply(input, weight.T, bias) if _gains(input, weight, bias) else None  # type: ignore[no-any-return]


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Tensor | None:
    """``torch.addmm``, as the layers of GPT-2 call it."""
    plain = beta == alpha == 1 and out is None and _gains(mat1, mat2, input) and input.ndim == 1
    return Linear.apply(mat1, mat2, input) if plain else None  # type: ignore[no-any-return]


def _gains(x: Any, weight: Any, bias: Any) -> bool:
    """Plain tensors on the CPU, differentiated at most to ``x``, and in a type whose product is faster."""
    if type(x) is not Tensor or not on_cpu(x) or x.dtype != weight.dtype or not gains(x.dtype, bias is not None):
        return False
    parameters = [weight] if bias is None else [weight, bias]
    frozen = all(type(p) in (Tensor, torch.nn.Parameter) and not p.requires_grad for p in parameters)
    return frozen and not torch.is_autocast_enabled("cpu") and not torch._C._are_functorch_transforms_active()


class Linear(torch.autograd.Function):
    """``x W + b`` of ``[..., I]``, ``[I, O]`` and ``[O]``, which has a gradient to ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_IO: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(W_IO)
        out = matmul(x.reshape(-1, x.shape[-1]), W_IO, bias_O)
        return torch.ops.aten._unsafe_view(
            out, [*x.shape[:-1], W_IO.shape[1]]
        )  # a view could not be written over afterwards

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (W_IO,) = ctx.saved_tensors
        return Linear.apply(outer[0], W_IO.T, None), None, None  # type: ignore[no-any-return]


OURS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: attention.attend,
    F.linear: linear,
    torch.addmm: addmm,
}
