"""Work on many matrices, some of them side by side, each with its share of the cores, because one does not keep all busy."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from upriver.runtime.split import SIDES

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """``map`` on the CPU's cores in two halves; on another device one after the other."""
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores < SIDES:
        yield from map(work, items)
        return

    def with_its_share(item: Item) -> Result:
        torch.set_num_threads(cores // SIDES)  # of this thread
        return work(item)

    try:
        with ThreadPoolExecutor(SIDES) as pool:
            yield from pool.map(with_its_share, items)
    finally:
        torch.set_num_threads(cores)


@contextmanager
def one_core_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that work with one core each, in NumPy and in torch."""
    cores = torch.get_num_threads()
    try:
        with (
            threadpool_limits(1),
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield pool
    finally:
        torch.set_num_threads(cores)
