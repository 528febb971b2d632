"""What several runs have in common, and where they differ."""

from collections.abc import Mapping
from typing import Any

Table = Mapping[str, Any]
_NAME = 60  # letters


def side_by_side(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """name -> run -> value, for the names that two runs or more have."""
    names = dict.fromkeys(name for own in values.values() for name in own)
    found = {name: {run: own[name] for run, own in values.items() if name in own} for name in names}
    return {name: by_run for name, by_run in found.items() if len(by_run) > 1}


def differing(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, for the names that have different values; a run that lacks a shared name counts as different, unless
    the name is empty in the others."""
    shared = side_by_side(values)
    return {
        name: by_run
        for name, by_run in shared.items()
        if any(value != next(iter(by_run.values())) for value in by_run.values())
        or (len(by_run) < len(values) and next(iter(by_run.values())) not in ("", None, []))
    }


def merged_tables(tables: Mapping[str, Mapping[str, Table]]) -> tuple[dict[str, Table], dict[str, dict[str, Table]]]:
    """(tables that several runs have, rows of all of them with the run's name in front; run -> its other tables).

    Tables of texts stay with their run: side by side they are read, not compared.
    """
    owners: dict[str, list[str]] = {}
    for run, own in tables.items():
        for name in own:
            owners.setdefault(name, []).append(run)
    several = {name: runs for name, runs in owners.items() if len(runs) > 1}
    shared = {
        name: _joined(name, {run: tables[run][name] for run in runs})
        for name, runs in several.items()
        if not any(_wordy(tables[run][name]) for run in runs)
    }
    rest = {run: {name: table for name, table in own.items() if name not in shared} for run, own in tables.items()}
    return shared, rest


def _wordy(table: Table) -> bool:
    """Whether it holds passages rather than names."""
    return any(isinstance(value, str) and len(value) > _NAME for row in table["rows"] for value in row.values())


def _joined(name: str, members: Mapping[str, Table]) -> Table:
    """One table of all rows."""
    titles = dict.fromkeys(table["title"] for table in members.values())
    columns = dict.fromkeys(column for table in members.values() for column in table["columns"])
    return {
        "title": next(iter(titles)) if len(titles) == 1 else name.replace("-", " "),
        "columns": ["run", *columns],
        "rows": [{"run": run, **row} for run, table in members.items() for row in table["rows"]],
    }
