"""The device that work runs on: which one it is, how exact its products are, and what is done when its memory runs out."""

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from upriver.errors import ConfigError, ResourceError

TAKEN = "use auto, cpu, cuda or cuda:N"
ASKED = re.compile(r"[Tt]ried to allocate [\d.]+ \w+")  # in what torch says
# torch's own settings of float32 products, each inheriting from those before it; older versions have none of them
PRECISIONS = [(x, "all") for x in ("generic", "cuda", "mkldnn")]
PRECISIONS += [("cuda", x) for x in ("matmul", "conv", "rnn")] + [("mkldnn", x) for x in ("matmul", "conv", "rnn")]

_parts: ContextVar[int] = ContextVar("parts", default=1)  # that a batch is cut into


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU when there is one, else the CPU; ``cuda`` and ``auto`` are the process's own GPU under ``torchrun``.

    Raises:
        ConfigError: no such device on this machine, or one of a kind that is not supported.
    """
    own = os.environ.get("LOCAL_RANK", "")
    if name == "auto" and not torch.cuda.is_available():
        name = "cpu"
    if name in ("auto", "cuda"):
        name = f"cuda:{own if own.isdecimal() else 0}"
    else:
        own = ""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no such device: got {name!r}; {TAKEN}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"the device {device.type} is not supported: got {name!r}; {TAKEN}")
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= there:
            raise ConfigError(f"no such device here: got {name!r}, and this machine has {there} GPUs for CUDA; {TAKEN}")
        if own:
            torch.cuda.set_device(device)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device cannot compute: got {name!r} ({error}); {TAKEN}") from error
    return device


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Inside, products of float32 on CUDA are rounded to TF32 or not, whatever the process says; its settings come back.

    torch keeps an older and a newer account of them, and does not read the older one where the two differ: both are set.
    """
    cudnn: Any = torch.backends.cudnn
    newer = PRECISIONS if hasattr(torch._C, "_get_fp32_precision_getter") else []
    kept = []
    with warnings.catch_warnings(action="ignore"):  # some versions advise against the older one
        for at in newer:
            kept.append((at, torch._C._get_fp32_precision_getter(*at)))
            _set_precision(at, "none")
        for at in newer:  # so that the older one can be read
            _set_precision(at, "ieee")
        matmul = torch.get_float32_matmul_precision()
        try:
            convolutions = cudnn.allow_tf32
        except RuntimeError:  # it is not that of "ieee"
            convolutions = True
        torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            torch.set_float32_matmul_precision(matmul)
            cudnn.allow_tf32 = convolutions
            for at, value in kept:
                _set_precision(at, value)


def _set_precision(at: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*at, value)


def in_parts(batch: np.ndarray) -> list[np.ndarray]:
    """The rows of a batch: together, or in halves where the memory has run out; a row alone stays one."""
    return np.array_split(batch, min(_parts.get(), len(batch)))


def within_memory(go_on: Callable[[], None], key: dict[str, Any]) -> None:
    """Run ``go_on``, which starts from what is committed; once more, with batches cut in halves, if the device's memory runs out.

    Args:
        key: of the stage whose units are computed.

    Raises:
        ResourceError: it ran out again.
    """
    try:
        return go_on()
    except torch.OutOfMemoryError:
        pass
    gc.collect()  # what failed and its hooks know each other
    torch.cuda.empty_cache()
    known = key.get("options", {}) | key.get("split", {}) | key
    before = _parts.set(2 * _parts.get())
    try:
        with memory_told(
            f"the pass {key['stage']!r}, with batches of half the size too", known.get("batch_tokens", 0) // 4
        ):
            go_on()
    finally:
        _parts.reset(before)


@contextmanager
def memory_told(what: str, batch_tokens: int) -> Iterator[None]:
    """Say in one sentence that the device's memory ran out inside.

    Raises:
        ResourceError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = ASKED.search(str(error))
        raise ResourceError(
            f"the memory of the device ran out in {what}: got {(asked[0] if asked else str(error)[:200])!r}; give "
            f"--batch-tokens {max(1, batch_tokens)} or less, or a lower --memory, which divides the work further"
        ) from error
