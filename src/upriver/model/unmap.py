"""Copy a model out of the files that it is mapped from: ``transformers`` maps safetensors where it can."""

import ctypes
import mmap
from pathlib import Path

from torch import Tensor, nn


def leave_files(module: nn.Module) -> None:
    """Copy what is mapped from files into memory, one tensor at a time: who writes to such a file would write to the model.

    What has been copied is given back at once, so that no second model is held; what is tied stays so.
    """
    mapped = _mapped_files()
    copies: dict[tuple, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
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
