"""The command ``upriver``: sets what the libraries read when they are loaded, then loads them."""

import os
import signal
from typing import Any

INTERRUPTED = b"error: interrupted before anything was begun; give the command again\n"


def main() -> None:
    """Run the command line with threads that do not wait busily for longer than a moment.

    Idle worker threads spin for milliseconds by default and slow down the busy ones: NumPy's and SciPy's those of torch, torch's
    those of NumPy and of other programs.  Waking one that sleeps takes longer than a small operation, so torch's spin for a
    moment, until the next one comes (``benchmarks/waiting.py``).  What the environment says already stays.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    usual = signal.getsignal(signal.SIGINT)  # none where the shell lets a command go on in the background
    if usual is signal.default_int_handler:
        signal.signal(
            signal.SIGINT, _end
        )  # libraries make all kinds of errors of an interruption while they are loaded
    from upriver.cli import main as command

    signal.signal(signal.SIGINT, usual)
    command()


def _end(*_: Any) -> None:
    os.write(2, INTERRUPTED)
    os._exit(1)
