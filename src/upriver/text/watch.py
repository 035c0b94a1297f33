"""A chat template is a program of somebody else: it is run here for a bounded time, and with a bounded amount of memory."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SECONDS = 10.0  # that a template may take for one conversation
MORE = 1 << 30  # bytes of address space that it may take besides


class TooLongError(Exception):
    """A template ran for too long."""


@contextmanager
def bounded(seconds: float = SECONDS, more: int = MORE) -> Iterator[None]:
    """Stop the block, wherever in Python it is, after so many seconds, or where it takes so much memory more.

    Memory is bounded on Linux, for the process: nothing else should be at work meanwhile that needs much.

    Raises:
        TooLongError: the time is over.
        MemoryError: the memory is.
    """
    turn = _Turn(threading.get_ident(), time.monotonic() + seconds)
    _WATCH.add(turn)
    limit = _limit_memory(more)
    try:
        try:
            yield
        finally:
            _WATCH.remove(turn)
    finally:
        _limit_memory(limit=limit)


class _Turn:
    def __init__(self, thread: int, end: float):
        self.thread, self.end, self.stopped = thread, end, False


class _Watch:
    """A thread that raises an error in others whose time is over; it ends when there is nothing to watch for a while."""

    def __init__(self) -> None:
        self.lock, self.turns = threading.Lock(), set[_Turn]()
        self.runs = False

    def add(self, turn: _Turn) -> None:
        with self.lock:
            self.turns.add(turn)
            if not self.runs:
                self.runs = True
                threading.Thread(target=self._watch, name="upriver-watch", daemon=True).start()

    def remove(self, turn: _Turn) -> None:
        while turn in self.turns:
            with suppress(TooLongError), self.lock:  # it may come as late as here
                self.turns.discard(turn)
                if turn.stopped:  # what was not yet raised is not to be raised outside
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(turn.thread), None)
        if turn.stopped:
            raise TooLongError

    def _watch(self) -> None:
        idle = 0
        while idle < 100:
            time.sleep(0.05)
            with self.lock:
                idle = 0 if self.turns else idle + 1
                for turn in self.turns:
                    if time.monotonic() > turn.end:
                        turn.stopped, turn.end = True, time.monotonic() + 1  # and again, where it was swallowed
                        error = ctypes.py_object(TooLongError)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(turn.thread), error)
                if idle == 100:
                    self.runs = False


_WATCH = _Watch()


def _limit_memory(more: int | None = None, limit: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Allow ``more`` address space than is taken now, or set a ``limit`` again; and return the one that was set before."""
    try:
        import resource

        before = resource.getrlimit(resource.RLIMIT_AS)
        if more is not None:
            with open("/proc/self/statm") as told:
                taken = int(told.read().split()[0]) * resource.getpagesize()
            most = [x for x in (taken + more, *before) if x != resource.RLIM_INFINITY]
            limit = (min(most), before[1])
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, limit)
    except (ImportError, OSError, ValueError):  # not Linux
        return None
    return before
