"""Seconds and peak resident memory of the phases of one process (Linux)."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Meter:
    """Seconds and peak resident bytes by phase; a phase that begins inside another interrupts it.

    Example:
        >>> meter = Meter()
        >>> with meter("fit"), meter("covariance"):
        ...     work()
        >>> meter.seconds["covariance"], meter.peak["covariance"]
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._stop()
        self._open.append(phase)
        self._start()
        try:
            yield
        finally:
            self._stop()
            self._open.pop()
            self._start()

    def _start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._open:
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - self._since
            self.peak[phase] = max(self.peak.get(phase, 0), resident("VmHWM"))


def resident(field: str = "VmRSS") -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since it was reset) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def settle() -> None:
    """Give back what is no longer used, so that a phase is not charged for the one before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
