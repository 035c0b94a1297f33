"""Standard output and error of a command, which never end its work: what cannot be written any more is let go."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Steady:
    """A text stream that takes whatever is written: what it cannot encode is written out, what it cannot write is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream
        with suppress(AttributeError, OSError, ValueError):  # a stream of somebody else
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, AttributeError):  # a closed pipe, a full device, a closed stream, none at all
            with suppress(
                AttributeError, OSError, ValueError
            ):  # what is held back would fail again at the end of Python
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def steady_output() -> Iterator[None]:
    """Let no trouble with standard output or error end what the block does."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Steady, before)  # pyright: ignore
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
