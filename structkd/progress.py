"""Progress on stderr: a bar with rate and time left on a terminal, a line a minute in a log; notes of what was done.

Loops may stand inside each other: the outermost one opens the display, inner ones add their bars to it.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from structkd.text import rate_text, time_text

Item = TypeVar("Item")

LINE_SECONDS = 60.0
"Seconds between two lines of one loop in a log."

LATE_SECONDS = 0.5
"How long a loop of many short calls runs before its bar appears."

_open: list[Progress] = []  # the display of the outermost loop, while there is one


class _Rate(ProgressColumn):
    """Items per second, or seconds per item where that is slower."""

    def render(self, task: Task) -> Text:
        return Text(rate_text(task.speed or task.finished_speed), style="progress.data.speed")


def track(
    items: Iterable[Item], description: str, total: int | None = None, *, lines: bool = True, late: bool = False
) -> Iterator[Item]:
    """Iterate with a bar: count, rate, elapsed time, time left. In a log: a line a minute, none for short loops.

    Args:
        total: number of items, where they have no length.
        lines: whether a log gets lines; False for loops that report by themselves.
        late: whether the bar waits half a second: for loops that mostly end before, a search for example.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        yield from _late(iter(items), description, total) if late else _bar(items, description, total)
    elif lines:
        yield from _lines(items, description, total)
    else:
        yield from items


def _late(items: Iterator[Item], description: str, total: int | None) -> Iterator[Item]:
    started = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - started >= LATE_SECONDS and done != total:
            yield from _bar(items, description, total, done)
            return


def _bar(items: Iterable[Item], description: str, total: int | None, done: int = 0) -> Iterator[Item]:
    if _open:
        display = _open[0]
        task = display.add_task(description, total=total, completed=done)
        try:
            yield from display.track(items, total=total, completed=done, task_id=task)
        finally:
            display.remove_task(task)
        return
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    columns = (*bar, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        _open.append(display)
        try:
            yield from display.track(items, total=total, completed=done, description=description)
        finally:
            _open.clear()


def _lines(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    last = started = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - last >= LINE_SECONDS and done != total:
            last, rate = now, done / (now - started)
            left = "" if total is None else f" of {total:,}, {time_text((total - done) / rate)} left"
            note(f"{description}: {done:,}{left}, {rate_text(rate)}")


def note(message: str) -> None:
    """One plain line on stderr: what was cached, skipped, chosen."""
    print(message, file=sys.stderr, flush=True)
