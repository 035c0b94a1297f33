"""Work on many small matrices: two of them side by side, each with half of the cores, because one does not keep all busy."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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
