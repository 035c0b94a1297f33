"""Progress of a pass, without saying how it is shown: the library is silent, the command line shows bars."""

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
