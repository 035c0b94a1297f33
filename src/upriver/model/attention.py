"""Attention in bfloat16 on the CPU: over short sequences in float32 inside, as torch's kernel goes backward faster so.

torch 2.13, two threads of a Xeon with AMX, forward and backward, milliseconds: 16 x 5 heads x 128 tokens x 32: 13.8 in bfloat16,
5.8 turned to float32 and back; 12 x 9 x 160 x 64: 25.5 and 15.8; 8 x 8 x 256 x 64: 17.4 and 19.5.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHORT = 256  # tokens, from which on bfloat16 is as fast


class ShortAttention(TorchFunctionMode):
    """Inside, ``scaled_dot_product_attention`` of short bfloat16 sequences on the CPU computes in float32."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and args and _short(args[0]):
            wide = {name: _float(x) for name, x in kwargs.items()}
            return function(*map(_float, args), **wide).to(torch.bfloat16)
        return function(*args, **kwargs)


def _short(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] < SHORT


def _float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x
