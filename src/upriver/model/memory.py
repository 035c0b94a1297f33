"""How much memory a run may take, how much is taken before it starts, and the division of its work that it keeps to."""

from pathlib import Path

import torch

from upriver.model.load import Model, dtype_named
from upriver.runtime import dist
from upriver.runtime.artifact import read_json, write_json
from upriver.runtime.config import parse_memory, weights_in
from upriver.runtime.divide import SEQUENCE_BYTES, Budget, Division, still_fits
from upriver.runtime.progress import Say, show_bytes
from upriver.runtime.system import DEFAULT_SHARE, default_limit, give_back, resident_memory, settle_memory
from upriver.text.batch import Sequences

ROOMY = 1.2  # times the planned peak under the limit: freed memory may be kept, with the holes in it


def memory_budget(model: Model, data: Sequences, batch_tokens: int, memory: str | None, dtype: str = "") -> Budget:
    """What the division of the work depends on: on a GPU its own memory, else that of the process.

    Args:
        memory: a limit such as ``8GB``; None: 80 % of what is free.
        dtype: of the passes, where it is not the model's: a copy of the weights is made for them.

    Raises:
        ConfigError: not a size.
    """
    asked, accelerator = parse_memory(memory), model.device.type == "cuda"
    if accelerator:
        torch.cuda.empty_cache()  # what an earlier phase left is not free before
        fixed = torch.cuda.memory_allocated(model.device)
        limit = asked or fixed + int(DEFAULT_SHARE * torch.cuda.mem_get_info(model.device)[0])
    else:
        settle_memory()
        give_back()
        resident = resident_memory() or 0
        fixed = resident + SEQUENCE_BYTES * len(data)
        limit = asked or default_limit(resident)
    own = str(model.dtype).removeprefix("torch.")
    weights = weights_in(dtype or own)
    copy = model.n_parameters * dtype_named(weights).itemsize if weights != own else 0
    cores = 1 if accelerator else torch.get_num_threads()
    most = max(map(len, data.plan(batch_tokens)))
    # queries and the top stay in the model's type, whatever the scan is in
    widest = own if own == "float64" else dtype or own
    return Budget(limit, fixed, batch_tokens, int(data.lengths_N.max()), widest, cores, most, copy, accelerator)


def division_file(folder: Path) -> Path:
    """Where a run that is not done keeps the division of its work."""
    return folder / ".division.json"


def settled(folder: Path, made: Division, device: torch.device, say: Say) -> Division:
    """The division that an interrupted run in ``folder`` began with, if it still fits; otherwise ``made``.

    Finished units are of use in their own division only.  How much memory is free differs from run to run, and from process to
    process: the first process decides for all.  On the CPU the allocator is told what to do with freed memory: to keep it for
    the next tensors where the limit leaves room for holes (:func:`upriver.runtime.system.settle_memory`).
    """
    file = division_file(folder)

    def decide() -> None:
        begun = _read(file)
        if begun is None or not still_fits(begun, made):
            folder.mkdir(exist_ok=True)
            write_json(file, made._asdict())
        elif begun.limit != made.limit:
            limit = show_bytes(begun.limit)
            say(f"memory: the work stays divided as it was when it began, for {limit}; another --out divides it anew")

    dist.on_first(decide)
    found = _read(file)
    assert found is not None
    if device.type != "cuda":
        settle_memory(reuse=ROOMY * max(found.peak.values()) <= made.limit)
    return found


def _read(file: Path) -> Division | None:
    """None: there is none, or what another version wrote."""
    try:
        return Division(**read_json(file)) if file.exists() else None
    except TypeError:
        return None
