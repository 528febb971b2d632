"""What every command shares: the common flags, and how a result becomes a table or one JSON object on stdout."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table as RichTable

from structkd.runs import plain
from structkd.text import cell


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Flags that every command takes."""

    config: Path | None = None
    "TOML file with values for this command's flags; flags on the command line win."

    json: Annotated[bool, Parameter(negative=())] = False
    "Print one JSON object on stdout and nothing else there."

    dry_run: Annotated[bool, Parameter(negative=())] = False
    "Print the resolved configuration and stop."

    seed: int = 0
    "Seed of all randomness."


@dataclass(frozen=True)
class Table:
    """Rows to show; columns are the keys of the rows in order of appearance."""

    title: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Output:
    """What a command returns: `data` for --json, `tables` and `lines` for people. `ok=False` means exit status 1."""

    data: Mapping[str, Any]
    tables: Sequence[Table] = field(default_factory=tuple)
    lines: Sequence[str] = field(default_factory=tuple)
    ok: bool = True


def show(output: Output, as_json: bool) -> None:
    """Print an output on stdout."""
    if as_json:
        print(json.dumps(plain(output.data), allow_nan=False))
        return
    console = Console()
    for table in output.tables:
        console.print(table.title, style="bold", markup=False, highlight=False, soft_wrap=True)
        drawn, turned = _across(table), _down(table)
        fits = _width(console, turned) <= console.width or len(table.rows) == 1  # one row's long values fold
        if _width(console, drawn) > console.width and fits:
            drawn = turned  # names stay readable on a narrow terminal
        console.print(drawn)
    for line in output.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _width(console: Console, table: RichTable) -> int:
    """Columns of the terminal that a table would take."""
    return console.measure(table, options=console.options.update(max_width=1 << 16)).maximum


def _across(table: Table) -> RichTable:
    """Columns as they are."""
    drawn = RichTable()
    for column in _columns(table):
        number = any(isinstance(row.get(column), (int, float)) for row in table.rows)
        drawn.add_column(column.replace("_", " "), justify="right" if number else "left")
    for row in table.rows:
        drawn.add_row(*(cell(row.get(column), column) for column in _columns(table)))
    return drawn


def _down(table: Table) -> RichTable:
    """The same, turned: the first column's values as headings."""
    first, *others = _columns(table)
    drawn = RichTable()
    drawn.add_column(first.replace("_", " "), overflow="fold")
    for row in table.rows:
        drawn.add_column(cell(row.get(first), first), justify="right", overflow="fold")
    for column in others:
        drawn.add_row(column.replace("_", " "), *(cell(row.get(column), column) for row in table.rows))
    return drawn


def _columns(table: Table) -> list[str]:
    return list(dict.fromkeys(key for row in table.rows for key in row))
