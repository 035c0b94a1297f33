"""Weights in memory: copied out of the files that they are mapped from, and in another floating-point type."""

import copy
import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

from upriver.errors import ConfigError
from upriver.model.packed import any_packed, floating, held_beside


def leave_files(module: nn.Module) -> None:
    """Copy what is mapped from files into memory, one tensor at a time: who writes to such a file would write to the model.

    What has been copied is given back at once, so that no second model is held; what is tied stays so.
    """
    mapped = _mapped_files()
    copies: dict[tuple, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers(), *held_beside(module)):
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or (mapped is not None and not any(a <= start < b for a, b in mapped)):
            continue
        at = start, tensor.dtype, tensor.shape, tensor.stride()
        if at not in copies:
            copies[at] = tensor.detach().clone()
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if mapped is not None and first < last:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
        tensor.data = copies[at]


def _mapped_files() -> list[tuple[int, int]] | None:
    """Where files are mapped in this process; None where the system does not tell."""
    try:
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()]
    except OSError:
        return None
    found = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/")]
    return [(int(start, 16), int(end, 16)) for start, end in found]


FREQUENCIES = "inv_freq"  # what transformers calls them


def in_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether every floating-point weight is of ``dtype``."""
    return all(p.dtype == dtype for p in floating(module))


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` with its floating-point weights and buffers in ``dtype``; weights that are shared stay shared.

    Never is there a second copy in the old type beside it.  Rotary frequencies stay as they are where ``dtype`` is narrower, as
    ``from_pretrained(dtype=...)`` has it: in bfloat16 they would turn a token 500 positions on by up to half a radian too much.

    Raises:
        ConfigError: some weights are packed in 8 or 4 bits, which are no numbers of any such type.
    """
    if any_packed(module):
        wanted, own = (str(x).removeprefix("torch.") for x in (dtype, next(floating(module)).dtype))
        raise ConfigError(
            f"a model of packed weights computes in the type that it was loaded in: got {wanted}, not {own}; ask for {own}"
        )
    narrower = dtype.itemsize < torch.float32.itemsize
    buffers = [x for name, x in module.named_buffers() if not (narrower and FREQUENCIES in name)]
    made: dict[int, object] = {}
    for x in [*module.parameters(), *buffers]:
        if id(x) not in made and x.is_floating_point():
            as_wanted = x.detach().to(dtype, copy=True)
            made[id(x)] = nn.Parameter(as_wanted, x.requires_grad) if isinstance(x, nn.Parameter) else as_wanted
    return copy.deepcopy(module, made)
