"""How much memory a run may take, how much is taken before it starts, and how its work is divided for that."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from upriver.model.load import Model, dtype_named
from upriver.runtime import dist
from upriver.runtime.artifact import read_json, write_json
from upriver.runtime.config import parse_memory, weights_in
from upriver.runtime.progress import Say, show_bytes
from upriver.runtime.split import SEQUENCE_BYTES, Budget, FitSplit, TraceSplit, fits
from upriver.runtime.system import DEFAULT_SHARE, default_limit, give_back, resident_memory, settle_memory
from upriver.text.batch import Sequences

Split = TypeVar("Split", FitSplit, TraceSplit)
DIVISION = ".split.json"  # in the folder of a run that is not done
ROOMY = 1.2  # times the planned peak under the limit: freed memory may be kept, with the holes in it


def memory_budget(model: Model, data: Sequences, batch_tokens: int, memory: str | None, dtype: str = "") -> Budget:
    """What the division of the work depends on: on a GPU its own memory, else that of the process.

    Args:
        memory: a limit such as ``8GB``; None: 80 % of what is free.
        dtype: of the passes, where it is not the model's: a copy of the weights is made for them.

    Raises:
        ConfigError: not a size.
    """
    asked = parse_memory(memory)
    if model.device.type == "cuda":
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
    parameters = model.n_parameters
    copy = parameters * dtype_named(weights).itemsize if weights != own else 0
    cores = 1 if model.device.type == "cuda" else torch.get_num_threads()
    most = max(map(len, data.plan(batch_tokens)))
    longest, accelerator = int(data.lengths_N.max()), model.device.type != "cpu"
    # queries and the top stay in the model's type, whatever the scan is in
    widest = own if own == "float64" else dtype or own
    return Budget(limit, fixed, batch_tokens, longest, widest, cores, most, copy, accelerator)


def settle(peak: Mapping[str, int], budget: Budget, device: torch.device) -> None:
    """Keep freed memory for the next tensors where the limit leaves room for holes; see :func:`settle_memory`.

    On a GPU the limit is that of its own memory, which says nothing of this process's.
    """
    if device.type != "cuda":
        settle_memory(reuse=ROOMY * max(peak.values()) <= budget.limit)


def settled_split(folder: Path, kind: type[Split], make: Callable[[], Split], budget: Budget, say: Say) -> Split:
    """The division that an interrupted run in ``folder`` began with, if it still fits; otherwise the one that ``make`` gives.

    Finished units are of use in their own division only.  How much memory is free differs from run to run, and from process to
    process: the first process decides for all.

    Raises:
        ConfigError: of ``make``: the memory is too small.
    """
    file = folder / DIVISION

    def decide() -> None:
        begun = _read(file, kind) if file.exists() else None
        if begun is None or not fits(begun, budget):
            made = make()
            folder.mkdir(exist_ok=True)
            write_json(file, made._asdict() | {"made_for": made.made_for._asdict()})
        elif begun.made_for.limit != budget.limit:
            limit = show_bytes(begun.made_for.limit)
            say(f"memory: the work stays divided as it was when it began, for {limit}; another --out divides it anew")

    dist.on_first(decide)
    found = _read(file, kind)
    assert found is not None
    return found


def _read(file: Path, kind: type[Split]) -> Split | None:
    """None: what another version wrote."""
    found = read_json(file)
    try:
        return kind(**found | {"made_for": Budget(**found["made_for"])})
    except (TypeError, KeyError):
        return None
