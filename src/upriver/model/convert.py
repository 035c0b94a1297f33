"""A copy of a model in another floating-point type, made one weight at a time."""

import copy

import torch
from torch import nn

FREQUENCIES = "inv_freq"  # what transformers calls them


def in_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether every floating-point weight is of ``dtype``."""
    return all(p.dtype == dtype for p in module.parameters() if p.is_floating_point())


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` with its floating-point weights and buffers in ``dtype``; weights that are shared stay shared.

    Never is there a second copy in the old type beside it.  Rotary frequencies stay as they are where ``dtype`` is narrower, as
    ``from_pretrained(dtype=...)`` has it: in bfloat16 they would turn a token 500 positions on by up to half a radian too much.
    """
    narrower = dtype.itemsize < torch.float32.itemsize
    buffers = [x for name, x in module.named_buffers() if not (narrower and FREQUENCIES in name)]
    made: dict[int, object] = {}
    for x in [*module.parameters(), *buffers]:
        if id(x) not in made and x.is_floating_point():
            as_wanted = x.detach().to(dtype, copy=True)
            made[id(x)] = nn.Parameter(as_wanted, x.requires_grad) if isinstance(x, nn.Parameter) else as_wanted
    return copy.deepcopy(module, made)
