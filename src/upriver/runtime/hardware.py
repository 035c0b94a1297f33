"""What a machine can do: this one, as measured, or one of the table in ``hardware.toml`` that need not be there."""

import ctypes
import difflib
import os
import re
import shutil
import sys
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from upriver.errors import ConfigError
from upriver.runtime import dist
from upriver.runtime.config import MIXED

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
DEFAULT_SHARE = 0.8  # of the available memory, when no limit is given
LIBRARIES = 1_000_000_000  # bytes: Python, torch and a device's context, where nothing could be measured
EIGEN_OPERATIONS = 9  # n^3: the convention that the table's share of the peak is given in


class Rates(NamedTuple):
    """What is reached in one compute type on one device."""

    model: float  # FLOP/s, forward and backward through the model
    product: float  # FLOP/s, tokens times a square matrix
    symmetric: float  # FLOP/s, second moments as counted in :func:`upriver.runtime.counts.symmetric`
    gradient: float  # FLOP/s, the gradients of single sequences
    bandwidth: float  # bytes/s of numbers read and written by an elementwise operation


class Machine(NamedTuple):
    """Where a run takes place, or would."""

    name: str
    devices: int
    memory: int  # bytes of one device that may be used
    cores: int  # eigendecompositions at once
    eigen: float  # seconds / n^3, float64, one at a time
    disk: float  # bytes/s
    space: int  # bytes free on the disk
    start: float  # seconds until model and corpus are there
    rates: dict[str, Rates]  # by dtype
    resident: int | None  # bytes in use now, with the model; None: not measured
    loaded: str  # the type that it is in
    peak: int  # the most bytes that were in use so far
    accelerator: bool = False  # with a memory of its own, so that sums may stay in the one beside it

    def of(self, dtype: str) -> Rates:
        if dtype == MIXED and dtype not in self.rates:
            return self.of("bfloat16")._replace(model=self.of("float32").model)
        return self.rates.get(dtype) or self.rates["float32"]


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size such as ``8GB``, ``2GiB`` or ``500MB``; None where none is given.

    Raises:
        ConfigError: not a positive number with one of the units.

    Example:
        >>> parse_memory("8GB")
        8000000000
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "?")
    if unit not in UNITS or not 1 <= number * UNITS[unit] < 2**63:
        raise ConfigError(f"bad size of memory: got {text!r}; give a number with its unit, such as 8GB, 2GiB or 500MB")
    return int(number * UNITS[unit])


ROUNDS_UP = 0.9995  # of a unit: three digits would show a thousand of the one below


def in_units(n: float, *units: tuple[float, str]) -> str:
    """``n`` in three digits, in the first of the descending units that it makes one of, or else in the last."""
    unit, name = next(((u, s) for u, s in units if n >= ROUNDS_UP * u), units[-1])
    return f"{n / unit:.3g}{name}"


def show_bytes(n: float) -> str:
    return in_units(n, (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def available_memory() -> int | None:
    """Bytes that this process may still take: what the system has left, or what its control group allows if that is less."""
    found = [_system_available(Path("/proc/meminfo")), *map(_group_left, _groups())]
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


def free_space(folder: Path) -> int:
    """Bytes free on the disk of ``folder``."""
    return shutil.disk_usage(folder).free


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


def _system_available(path: Path) -> int | None:
    try:
        line = next(x for x in path.read_text().splitlines() if x.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError, StopIteration):
        return None


def _groups() -> list[tuple[Path, Path]]:
    """Files (limit, in use) of the control groups that this process may be in, versions 2 and 1."""
    top = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = [x.split(":", 2)[2].strip("/") for x in lines if x.startswith("0::") or ":memory:" in x]
    places = [top / name for name in ["", *own]]
    new = [(p / "memory.max", p / "memory.current") for p in places]
    old = [top / "memory" / name for name in ["", *own]]
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


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(Path(__file__).with_name("hardware.toml").read_text(encoding="utf-8"))


def hardware_names() -> list[str]:
    return [name for name in _table() if name != "assumed"]


def hardware(name: str) -> Machine:
    """A machine of the table: ``h100``, or ``h100x8`` for eight of them.

    Raises:
        ConfigError: no such entry; the nearest known ones are named.
    """
    kind, count = name.strip().lower(), 1
    match = re.fullmatch(r"(.+)x([1-9]\d{0,5})", kind)
    if match and kind not in hardware_names():
        kind, count = match[1], int(match[2])
    if kind not in hardware_names():
        near = difflib.get_close_matches(kind, hardware_names(), 3, 0.4) or hardware_names()
        raise ConfigError(
            f"unknown hardware: got {name!r}; give one of {', '.join(near)}, with x8 behind it for eight devices"
        )
    entry, assumed = _table()[kind], _table()["assumed"]
    rates = {dtype: _rates(entry, assumed, dtype) for dtype in ("float32", "bfloat16", "float64")}
    return Machine(
        name=name,
        devices=count,
        memory=int(entry["memory"]),
        cores=entry["cores"],
        eigen=EIGEN_OPERATIONS / (assumed["eigen"] * entry["float64"] / entry["cores"]),
        disk=assumed["disk"],
        space=int(assumed["space"]),
        start=assumed["start"],
        rates=rates,
        resident=None,
        loaded="float32",
        peak=0,
        accelerator=not entry.get("cpu", False),
    )


def _rates(entry: dict[str, Any], assumed: dict[str, Any], dtype: str) -> Rates:
    peak = entry[dtype]
    product = assumed["product"] * peak
    sums = assumed["product"] * entry["float64" if dtype == "float64" else "float32"]  # whatever the compute type
    return Rates(assumed["model"] * peak, product, sums, product, entry["bandwidth"])
