"""Run the command line in a process of its own, and say what it took."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

# what the command ``upriver`` sets before it loads anything (src/upriver/run.py)
THREADS = {"OPENBLAS_THREAD_TIMEOUT": "4", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "30000"}


class Ran(NamedTuple):
    """``seconds`` from start to end, and the ``peak`` resident memory in bytes."""

    seconds: float
    peak: int


def upriver(*args: object, env: Mapping[str, str] | None = None, quiet: bool = False) -> Ran:
    """Run ``upriver ARGS`` with ``env`` added to the environment; a command that fails ends the benchmark.

    A ``quiet`` one shows what it said only when it fails.  Linux only: ``ru_maxrss`` is in KiB there.
    """
    status, ran, said = run(*args, env=env, quiet=quiet)
    if status:
        sys.exit(f"upriver {args[0]} failed\n{said}")
    return ran


def run(*args: object, env: Mapping[str, str] | None = None, quiet: bool = True) -> tuple[int, Ran, str]:
    """Do the same and return the exit status, whatever it is, what the command took, and what a ``quiet`` one said."""
    command = [sys.executable, "-m", "upriver.cli", *map(str, args)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        said = log if quiet else None
        start = time.perf_counter()
        process = subprocess.Popen(command, env=THREADS | os.environ | dict(env or {}), stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        ran = Ran(time.perf_counter() - start, usage.ru_maxrss * 1024)
        log.seek(0)
        return os.waitstatus_to_exitcode(status), ran, log.read()
