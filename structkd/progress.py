"""Progress bars and notes on stderr; no bar when stderr is no terminal, so logs stay readable."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a bar that shows count, elapsed time and time left."""
    if not sys.stderr.isatty():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    columns = (*bar, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, total=total, description=description)


def note(message: str) -> None:
    """One plain line on stderr: what was cached, skipped, chosen."""
    print(message, file=sys.stderr, flush=True)
