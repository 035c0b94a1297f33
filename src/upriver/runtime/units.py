"""The two loops that run every pass: :func:`each` keeps the result of every unit, :func:`total` adds them up.

A unit is a span of consecutive rows.  Both loops deal units to the processes of the job, resume after the last committed one,
and commit atomically, so that a kill at any moment costs at most the work since.  A process adds up its own units in their
order; the processes' sums are added in the order of their ranks at the end.  A run that goes on equals one that was never
stopped, bit for bit.  Where the memory of the device runs out, the process goes on in the same way from what it committed, with
batches of half the size for the rest of the pass: those results equal the others to rounding.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from upriver.errors import UpriverError
from upriver.runtime import dist
from upriver.runtime.artifact import Artifact, Tensors, read_tensors, storage_error, write_tensors
from upriver.runtime.config import COMMIT_SHARE, UNIT_TOKENS
from upriver.runtime.device import within_memory

UNITS = "units"  # in a file of sums: how many of this process's units are in them

_stopping, _running = threading.Event(), threading.Event()


class Stopped(UpriverError):  # noqa: N818 - asked for, no error
    """The run was asked to stop; what was finished is committed."""

    exit_status = 75


def stop(*_: object) -> None:
    """Stop after the unit in hand, or at once where no unit is; a handler for SIGTERM."""
    _stopping.set()
    if not _running.is_set():
        _end()


def _end() -> NoReturn:
    _stopping.clear()
    _running.clear()
    raise Stopped("stopped; what was finished is kept, and the same command goes on from there")


def spans(
    lengths_N: Sequence[int] | np.ndarray, most_rows: int | None = None, unit_tokens: int | None = None
) -> list[slice]:
    """Places of consecutive sequences in units of about ``unit_tokens`` tokens, and at most ``most_rows`` sequences."""
    place_N = np.cumsum(np.asarray(lengths_N), dtype=np.int64)
    unit_N = (place_N - 1) // (unit_tokens or UNIT_TOKENS)
    starts = np.flatnonzero(np.diff(unit_N, prepend=-1)).tolist()
    found = []
    for start, end in zip(starts, [*starts[1:], len(place_N)], strict=True):
        step = most_rows or end - start
        found += [slice(i, min(i + step, end)) for i in range(start, end, step)]
    return found


def each(stage: Artifact, count: int, compute: Callable[[int], Tensors]) -> list[Path]:
    """The files of ``compute(unit)`` for each of ``count`` units; those that are there already are left."""

    def go_on() -> None:
        for unit in dist.dealt(count):
            if not stage.has(unit):
                _running.set()
                stage.commit(unit, compute(unit))
                _running.clear()
                if _stopping.is_set():
                    _end()

    with dist.together():
        within_memory(go_on, stage.key)
    dist.barrier()
    return [stage.unit_path(unit) for unit in range(count)]


class Claims:
    """Who does what among processes of one machine that know nothing of each other: a lock a unit, gone with its process."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / ".claims", "ab")  # noqa: SIM115 - closed at the end of the block
        except OSError as error:
            raise storage_error(folder, error) from error

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not (self.folder / "key.json").exists():  # a folder that was refused is left as it was
            (self.folder / ".claims").unlink(missing_ok=True)

    @contextmanager
    def of(self, unit: int, wait: bool = False) -> Iterator[bool]:
        """Hold a unit; whether it was free. With ``wait`` it is waited for."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, unit + 1)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, unit + 1)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Hold what comes before and after all units."""
        with self.of(-1, wait=True):
            yield


def shared(stage: Artifact, claims: Claims, count: int, compute: Callable[[int], Tensors]) -> None:
    """As :func:`each`, for any number of processes, whoever started them: each takes the next unit that nobody works on.

    All units are there when it returns: those that others hold are waited for, and done here if those processes end before.
    """
    for wait in (False, True):
        for unit in range(count):
            if stage.has(unit):
                continue
            with claims.of(unit, wait) as mine:
                if mine and not stage.has(unit) and not stage.done:  # whoever ended it removed the units
                    _running.set()
                    stage.commit(unit, compute(unit))
                    _running.clear()
            if _stopping.is_set():
                _end()


def total(stage: Artifact, count: int, add: Callable[[int, Tensors], None], device: torch.device) -> Path:
    """The file with the sums over ``count`` units: ``add(unit, sums)`` adds a unit in place, on ``device``.

    The sums so far are committed after a unit, where writing them takes little of the time since they were written last.
    """
    mine, path = dist.dealt(count), _sum_path(stage, dist.rank())

    def go_on() -> None:
        sums = {name: x.to(device) for name, x in read_tensors(path).items()} if path.exists() else {}
        done = int(sums.pop(UNITS, torch.zeros(1)))
        written, cost = time.perf_counter(), 0.0
        for at, unit in enumerate(mine[done:], done + 1):
            _running.set()
            add(unit, sums)
            now = time.perf_counter()
            if at == len(mine) or _stopping.is_set() or cost <= COMMIT_SHARE * (now - written):
                write_tensors(path, {name: x.cpu() for name, x in sums.items()} | {UNITS: torch.tensor([at])})
                written = time.perf_counter()
                cost = written - now
            _running.clear()
            if _stopping.is_set():
                _end()
        sums.clear()  # what still knows of them, in a cycle that is not collected yet, must not hold them

    with dist.together():
        within_memory(go_on, stage.key)
    dist.barrier()
    if dist.world() == 1:
        return path
    whole = stage.path / "sum.safetensors"
    dist.on_first(lambda: (whole.exists() and _count(whole) == count) or _add_up(stage, whole))
    return whole


def remaining(stage: Artifact, count: int) -> list[int]:
    """The units of this process that :func:`each` or :func:`total` still have to compute."""
    mine, path = dist.dealt(count), _sum_path(stage, dist.rank())
    return mine[_count(path) :] if path.exists() else [unit for unit in mine if not stage.has(unit)]


def _sum_path(stage: Artifact, rank: int) -> Path:
    return stage.path / f"sum-{rank}-of-{dist.world()}.safetensors"


def _count(path: Path) -> int:
    return int(read_tensors(path)[UNITS])


def _add_up(stage: Artifact, whole: Path) -> None:
    """Add the processes' sums; a layer may be called in the units of some of them only."""
    sums: Tensors = {}
    for rank in range(dist.world()):
        path = _sum_path(stage, rank)
        for name, x in read_tensors(path).items() if path.exists() else ():
            sums[name] = sums[name].add_(x) if name in sums else x
    write_tensors(whole, sums)
