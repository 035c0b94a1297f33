"""What a run says while it goes on, on standard error: lines, and progress bars with rate and remaining time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line; what no terminal can show of the name of a file is written out."""
    stderr.print(line.encode("utf-8", "backslashreplace").decode(), markup=False)


@contextmanager
def bars(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error with rate and remaining time, and one line at the end."""
    start = time.perf_counter()
    with _bar() as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
    seconds = time.perf_counter() - start
    say(f"{name}: {total:,} in {seconds:.1f} s ({total / max(seconds, 1e-9):,.0f}/s)")


@contextmanager
def running_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """The same for work that tells how far it is and how much there is."""
    with _bar() as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _bar() -> Progress:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


class Rate(ProgressColumn):
    """How much is done in a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")
