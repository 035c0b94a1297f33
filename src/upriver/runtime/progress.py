"""A run tells its progress, without saying how that is shown, and its sizes and times in words.

The library is silent; the command line shows bars.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # progress(name, total) -> advance(done)
Say = Callable[[str], None]
ROUNDS_UP = 0.9995  # of a unit: three digits would show a thousand of the one below


@contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    yield lambda done: None


def mute(line: str) -> None:
    pass


class Times(dict[str, float]):
    """The seconds of each phase are added up where it comes more than once."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self[name] = self.get(name, 0.0) + time.perf_counter() - start


def in_units(n: float, *units: tuple[float, str]) -> str:
    """Write ``n`` in three digits, in the first of the descending units that it makes one of, or else in the last."""
    unit, name = next(((u, s) for u, s in units if n >= ROUNDS_UP * u), units[-1])
    return f"{n / unit:.3g}{name}"


def show_bytes(n: float) -> str:
    return in_units(n, (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def show_count(n: float) -> str:
    return in_units(n, (1e9, "G tokens"), (1e6, "M tokens"), (1e3, "k tokens"), (1, " tokens"))


def show_flop(n: float) -> str:
    prefixes = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
    return in_units(n, *((size, f" {name}FLOP") for size, name in prefixes))


def show_seconds(s: float) -> str:
    if s < 99.5:
        return f"{s:.2g} s" if s < 9.95 else f"{s:.0f} s"
    return next(f"{s / u:.3g} {name}" for u, name in ((86400, "days"), (3600, "h"), (60, "min")) if s >= u)
