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
        drawn = RichTable()
        columns = list(dict.fromkeys(key for row in table.rows for key in row))
        for column in columns:
            number = any(isinstance(row.get(column), (int, float)) for row in table.rows)
            drawn.add_column(column.replace("_", " "), justify="right" if number else "left")
        for row in table.rows:
            drawn.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(drawn)
    for line in output.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return (
            f"{value:.4g}" if abs(value) >= 1000 or 0 < abs(value) < 0.001 else f"{value:.4f}".rstrip("0").rstrip(".")
        )
    return str(value)
