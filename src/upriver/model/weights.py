"""Weights in memory: copied out of the files that they are mapped from, and in another floating-point type."""

import copy
import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from upriver.errors import ConfigError, MismatchError
from upriver.model.fingerprint import tensor_hash
from upriver.model.packed import any_packed, floating, held_beside, scales

FREQUENCIES = "inv_freq"  # of rotary positions, as transformers calls them
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(NamedTuple):
    """What a module was loaded from, so that its weights can be had again."""

    open: Callable[[], nn.Module]  # the module once more, its weights mapped from the files
    dtype: torch.dtype  # of the weights there


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The most precise type of the weights in a folder's safetensors files; None where there are none that tell."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with (
            suppress(SafetensorError, OSError),
            safe_open(file, "pt") as held,
        ):  # who loads it says what is wrong with it
            found |= {STORED.get(held.get_slice(name).get_dtype()) for name in held.keys()}  # noqa: SIM118 - not a mapping
    return min(found - {None}, key=lambda kind: torch.finfo(kind).eps, default=None)  # type: ignore[arg-type]


def loses(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether numbers of the type ``wide`` are rounded in the type ``narrow``."""
    return torch.finfo(narrow).eps > torch.finfo(wide).eps


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, and the buffers that are stored with them: not what a forward pass may note for itself."""
    lasting = module.state_dict().keys()
    held = dict(module.named_parameters()) | {n: x for n, x in module.named_buffers() if n in lasting}
    return held | scales(module)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether every floating-point weight is of ``dtype``."""
    return all(p.dtype == dtype for p in floating(module))


def _wanted(module: nn.Module, dtype: torch.dtype) -> list[tuple[Tensor, torch.dtype]]:
    """Parameters and buffers with the type that each is to have: those that are no floating-point numbers keep their own.

    Rotary frequencies stay as they are where ``dtype`` is narrower, as ``from_pretrained(dtype=...)`` has it: in bfloat16 they
    would turn a token 500 positions on by up to half a radian too much.
    """
    narrower = dtype.itemsize < torch.float32.itemsize
    buffers = [x for name, x in module.named_buffers() if not (narrower and FREQUENCIES in name)]
    return [(x, dtype) for x in [*floating(module), *(x for x in buffers if x.is_floating_point())]]


def leave_files(module: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[int, str]:
    """Put a module on a device in a type, one tensor at a time, and nothing of it stays mapped from files.

    Who writes to such a file would write to the model.  What has been copied is given back at once, so that no second model is
    held; what is tied stays so.

    Returns:
        Where weights are rounded by this, a hash of each as it was, by its ``id``.
    """
    mapped, copies, hashes = _mapped_files(), {}, {}
    kinds = {id(x): kind for x, kind in _wanted(module, dtype)}
    for x in (*module.parameters(), *module.buffers(), *held_beside(module)):
        kind, at = kinds.get(id(x), x.dtype), (x.data_ptr(), x.dtype, x.shape, x.stride())
        inside = x.device.type == "cpu" and (mapped is None or any(a <= x.data_ptr() < b for a, b in mapped))
        if kind != x.dtype and loses(kind, x.dtype):
            hashes[id(x)] = tensor_hash(x)
        if at not in copies:
            copies[at] = x.detach().to(device, kind, copy=inside)
            if inside and mapped is not None:
                _give_back(x)
        x.data = copies[at]
    return hashes


def _give_back(x: Tensor) -> None:
    """Let the pages of a tensor go that is mapped from a file: they would count as memory of this process."""
    start, end = x.data_ptr(), x.data_ptr() + x.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _mapped_files() -> list[tuple[int, int]] | None:
    """Where files are mapped in this process; None where the system does not tell."""
    try:
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()]
    except OSError:
        return None
    found = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/")]
    return [(int(start, 16), int(end, 16)) for start, end in found]


@contextmanager
def in_place(module: nn.Module, dtype: torch.dtype, source: Checkpoint, hashes: list[str]) -> Iterator[None]:
    """The weights of a module in another type while the block lasts; one tensor at a time, so that they are never there twice.

    What was rounded, or will have been, is read again from the files.

    Args:
        hashes: of the weights, in the order of :func:`weights_of`, as the files held them.

    Raises:
        MismatchError: the files hold other weights than they did.
    """
    kept = [(x, x.data) for x in module.buffers()]
    before: list[tuple[Tensor, torch.dtype]] = [(x, x.dtype) for x in floating(module)]
    try:
        _fill(module, _wanted(module, dtype), source, hashes)
        yield
    finally:
        _fill(module, before, source, hashes)
        for x, data in kept:
            x.data = data


def _fill(module: nn.Module, wanted: list[tuple[Tensor, torch.dtype]], source: Checkpoint, hashes: list[str]) -> None:
    finer = [loses(x.dtype, kind) and loses(x.dtype, source.dtype) for x, kind in wanted]
    held = weights_of(module)
    fresh = weights_of(source.open()) if any(finer) else {}
    names = {id(x): (name, told) for (name, x), told in zip(held.items(), hashes, strict=True)}
    for (x, kind), again in zip(wanted, finer, strict=True):
        found, (name, told) = x, names.get(id(x), ("", ""))
        if again and name in fresh:
            found = fresh.pop(name)
            if tensor_hash(found) != told:
                raise MismatchError(
                    f"the model's files were changed while they were in use: got other numbers in {name!r} than when it was "
                    "loaded; give the same command again"
                )
        x.data = found.detach().to(x.device, kind)
        if found is not x:
            _give_back(found)


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` with its floating-point weights and buffers in ``dtype``; weights that are shared stay shared.

    Never is there a second copy in the old type beside it.

    Raises:
        ConfigError: some weights are packed in 8 or 4 bits, which are no numbers of any such type.
    """
    if any_packed(module):
        wanted, own = (str(x).removeprefix("torch.") for x in (dtype, next(floating(module)).dtype))
        raise ConfigError(
            f"a model of packed weights computes in the type that it was loaded in: got {wanted}, not {own}; ask for {own}"
        )
    made: dict[int, object] = {}
    for x, kind in _wanted(module, dtype):
        if id(x) not in made:
            as_wanted = x.detach().to(kind, copy=True)
            made[id(x)] = nn.Parameter(as_wanted, x.requires_grad) if isinstance(x, nn.Parameter) else as_wanted
    for m in module.modules():  # what is computed of weights for each pass, as under the older weight normalisation
        made |= {id(x): x.detach() for x in vars(m).values() if isinstance(x, Tensor) and not x.is_leaf}
    return copy.deepcopy(module, made)
