"""A copy of a model in another floating-point type, made one weight at a time."""

import copy

import torch
from torch import nn


def in_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether every floating-point weight is of ``dtype``."""
    return all(p.dtype == dtype for p in module.parameters() if p.is_floating_point())


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` with its floating-point weights and saved buffers in ``dtype``; weights that are shared stay shared.

    Never is there a second copy in the old type beside it.  What a model of ``transformers`` keeps without saving it stays as
    it is where ``dtype`` is narrower, as ``from_pretrained(dtype=...)`` has it: rotary frequencies in bfloat16 would turn a
    token 500 positions on by up to half a radian too much.
    """
    saved = [x for x in module.state_dict(keep_vars=True).values() if isinstance(x, torch.Tensor)]
    narrower = hasattr(module, "config") and dtype.itemsize < torch.float32.itemsize
    noted = [] if narrower else list(module.buffers())
    made: dict[int, object] = {}
    for x in [*module.parameters(), *saved, *noted]:
        if id(x) not in made and x.is_floating_point():
            as_wanted = x.detach().to(dtype, copy=True)
            made[id(x)] = nn.Parameter(as_wanted, x.requires_grad) if isinstance(x, nn.Parameter) else as_wanted
    return copy.deepcopy(module, made)
