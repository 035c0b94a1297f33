"""This process and what is left to it: memory, disk and time, as the system tells."""

import ctypes
import os
import sys
import time
from pathlib import Path

from upriver.runtime import dist

DEFAULT_SHARE = 0.8  # of the available memory, when no limit is given


def available_memory() -> int | None:
    """Bytes that this process may still take: what the system has left, or what its control group allows if that is less."""
    found = [_told(Path("/proc/meminfo"), "MemAvailable:"), *map(_group_left, _groups())]
    known = [x for x in found if x is not None]
    return min(known) if known else None


def default_limit(resident: int | None) -> int:
    """The memory of a run that was given none: what it has, and its share of 80 % of what is left, among the processes of the
    job on this machine (8 GB where the system does not tell)."""
    left = available_memory()
    return 8 * 10**9 if left is None else (resident or 0) + int(DEFAULT_SHARE * left / dist.neighbours())


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory so far; None where the system does not tell."""
    most = _told(Path("/proc/self/status"), "VmHWM:")
    if most is not None:  # the figure below may be that of the process which started this one
        return most
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of mallopt
LARGE, KEPT = 16 << 20, 64 << 20
NEVER = (1 << 31) - 1


def settle_memory(reuse: bool = False) -> None:
    """What the C library of Linux does with freed memory.

    Left alone it raises its limit to 32 MB with what it sees, and keeps what is smaller in heaps that holes make larger by a
    tenth and more, from run to run another one.

    Args:
        reuse: keep it for the next tensors until :func:`give_back`, so that a pass does not touch fresh pages all the time.
            Else large tensors lie in mappings of their own, which are gone when they are freed: the peak is then what is
            alive at once, and not the holes besides.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(MMAP_THRESHOLD, NEVER if reuse else LARGE)
            set_option(TRIM_THRESHOLD, NEVER if reuse else KEPT)


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it: what was freed by one phase must not add to the next."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def start_seconds() -> float:
    """Seconds since this process was started, or since its last :func:`work_ended`: a command may fit and then trace."""
    return _process_seconds() - _ended


def work_ended() -> None:
    """What comes next starts now."""
    global _ended
    _ended = _process_seconds()


_ended = 0.0  # seconds of this process


def _process_seconds() -> float:
    """Seconds since this process was started; of its processor where the system does not tell."""
    try:
        started = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return time.process_time()


def _told(path: Path, name: str) -> int | None:
    """The bytes that a file of the system tells under a name."""
    try:
        line = next(x for x in path.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError, StopIteration):
        return None


def _groups() -> list[tuple[Path, Path]]:
    """Files (limit, in use) of the control groups that this process may be in, and of those around them, versions 2 and 1."""
    top = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = [x.split(":", 2)[2].strip("/") for x in lines if x.startswith("0::") or ":memory:" in x]
    names = {place for name in own for place in (Path(name), *Path(name).parents)} | {Path()}
    new = [(top / p / "memory.max", top / p / "memory.current") for p in names]
    old = [top / "memory" / p for p in names]
    return new + [(p / "memory.limit_in_bytes", p / "memory.usage_in_bytes") for p in old]


def _group_left(files: tuple[Path, Path]) -> int | None:
    try:
        limit, used = (path.read_text().strip() for path in files)
        if limit == "max" or int(limit) >= 1 << 60:
            return None
        return min(int(limit), max(0, int(limit) - int(used) + _reclaimable(files[1].with_name("memory.stat"))))
    except (OSError, ValueError):
        return None


def _reclaimable(statistics: Path) -> int:
    """Bytes that a control group holds of files, and lets go where memory is short: a run reads and writes many."""
    try:
        found = dict(line.split() for line in statistics.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))  # version 1 counts groups inside apart
