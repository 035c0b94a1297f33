"""Progress of a pass, without saying how it is shown: the library is silent, the command line shows bars."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # progress(name, total) -> advance(done)
Say = Callable[[str], None]


@contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    yield lambda done: None


def mute(line: str) -> None:
    pass


class Times(dict[str, float]):
    """Seconds by phase, added up where a phase comes more than once."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - start
