"""Several processes on one job: the only importer of ``torch.distributed``.

Units of work are dealt out by number, every process writes its own, and the first one adds them up in unit order: so the
number of processes changes no bit of a result.  All processes see the same output folder.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def neighbours() -> int:
    """Processes of this job on this machine, this one included: ``torchrun`` tells; else all of them."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world())))


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def on_first(work: Callable[[], Any]) -> None:
    """Run ``work`` on the first process while the others wait; its error is raised on all of them."""
    if world() == 1:
        work()
        return
    failed: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as error:  # raised again below, here and on every other process
            failed = error
    failed = broadcast(failed)
    if failed is not None:
        raise failed


def broadcast(value: Any) -> Any:
    """What the first process found, on all of them: they decide the same, though their last bits may differ."""
    held = [value]
    if world() > 1:
        dist.broadcast_object_list(held)
    return held[0]


@contextmanager
def together() -> Iterator[None]:
    """Around what each process does for itself: they leave it together, and the error of one is raised on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # raised again below, here and on every other process
        error = raised
    errors = [error]
    if world() > 1:
        errors = [None] * world()
        dist.all_gather_object(errors, error)
    failed = error or next((e for e in errors if e is not None), None)
    if failed is not None:
        raise failed


def dealt(n_units: int) -> list[int]:
    """The units of this process."""
    return list(range(rank(), n_units, world()))


def sharded(tensor: Any) -> bool:
    """Whether a tensor is divided over processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def reshard(module: Any) -> None:
    """Put an FSDP2 module's weights back into their shards, which are the parameters that its owner knows.

    The root keeps the gathered weights after a forward pass; what is done to those is lost with them.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for m in module.modules():
            if isinstance(m, FSDPModule):
                m.reshard()
