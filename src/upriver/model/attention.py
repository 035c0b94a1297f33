"""Attention in bfloat16 on the CPU: over short sequences in float32 inside, as torch's kernel goes backward faster so.

``benchmarks/kernels.py`` prints by how much, ``SHORT`` is where the two met on a Xeon with AMX (torch 2.13, two threads).
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
