"""One or more run folders -> one HTML file. What several runs share is compared: settings, summaries, tables, plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from structkd.errors import DataError
from structkd.files import write_text
from structkd.report.compare import differing, merged_tables, side_by_side
from structkd.report.draw import Look, draw, looks, thinned
from structkd.runs import Figure, Run
from structkd.text import cell, flat, time_text

PAGE = "report.html"
_TEMPLATE = Path(__file__).with_name(PAGE)
_LISTED = 60  # points of a curve in the table below its plot


@dataclass(frozen=True)
class _Drawing:
    """A figure ready for the page: svg, names and looks of its series, and its points as a table."""

    figure: Figure
    svg: str
    legend: list[tuple[str, Look]]
    points: list[tuple[str, Any, float]]
    thinned: bool


def write(folders: Sequence[str | Path], out: str | Path, title: str = "structkd report") -> Path:
    """Write the report of these run folders; plots of the same name are drawn together, one colour a run.

    Args:
        folders: run folders (each holds run.json).
        out: the HTML file; written atomically.
        title: heading of the page.

    Returns:
        The path written.

    Raises:
        DataError: no folder given, or one of them is no run folder.
    """
    if not folders:
        raise DataError("no run folder given; expected at least one --out folder of a structkd command.")
    runs = {name: Run.open(folder) for name, folder in _names(folders).items()}
    shared, own = merged_tables({name: run.tables() for name, run in runs.items()})
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=title,
            runs=[_run(name, run, own[name]) for name, run in runs.items()],
            summaries=side_by_side({name: flat(run.info["summary"]) for name, run in runs.items()}),
            differing=differing({name: flat(run.config()) for name, run in runs.items()}),
            shared=shared,
            drawings=[_drawing(figure, f"f{i}") for i, figure in enumerate(_merged(runs))],
            cell=cell,
        )
    )
    write_text(out, page)
    return Path(out)


def finish(run: Run, summary: Mapping[str, Any]) -> None:
    """Write what came out of a run, and its page, FOLDER/report.html."""
    run.finish(summary)
    write([run.folder], run.folder / PAGE, title=f"structkd {run.info['command']}")


def _run(name: str, run: Run, tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says of one run."""
    return {
        "name": name,
        "info": run.info,
        "when": _when(run.info),
        "config": flat(run.config()),
        "tables": tables,
        "teachers": [flat(teacher) for teacher in run.teachers()],
        "summary": flat(run.info["summary"]),
    }


def _when(info: Mapping[str, Any]) -> str:
    """Start and wall-clock time of a run."""
    started = datetime.fromisoformat(info["started"])
    said = f"started {started:%Y-%m-%d %H:%M:%S} UTC, "
    if not info["finished"]:
        return said + "not finished"
    seconds = (datetime.fromisoformat(info["finished"]) - started).total_seconds()
    return said + f"took {time_text(seconds)}"


def _drawing(figure: Figure, prefix: str) -> _Drawing:
    names = [series.name for series in figure.series]
    legend = list(zip(names, looks(figure), strict=True)) if len(names) > 1 else []
    listed = [] if figure.kind in ("histogram", "cloud") else [(s.name, *thinned(s, _LISTED)) for s in figure.series]
    points = [(name, x, y) for name, xs, ys in listed for x, y in zip(xs, ys, strict=True)]
    shorter = any(len(series.x) > _LISTED for series in figure.series)
    return _Drawing(figure, draw(figure, prefix), legend, points, shorter)


def _merged(runs: Mapping[str, Run]) -> list[Figure]:
    """All figures; those of one name, kind and axes from several runs are drawn together."""
    grouped: dict[tuple[str, ...], list[tuple[str, Figure]]] = {}
    for run_name, run in runs.items():
        for name, figure in run.figures().items():
            key = (name, figure.kind, figure.x_label, figure.y_label)
            grouped.setdefault(key, []).append((run_name, figure))
    out = []
    for members in grouped.values():
        first = members[0][1]
        if len(members) > 1:
            series = [
                replace(s, name=f"{run_name}: {s.name}", group=None if s.group is None else f"{run_name}: {s.group}")
                for run_name, figure in members
                for s in figure.series
            ]
            first = replace(first, series=series)
        out.append(first)
    return out


def _names(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Each folder under the shortest end of its path that no other one has."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    names = {}
    for path in paths:
        depth = 1
        while depth < len(path.parts) and sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
            depth += 1
        names["/".join(path.parts[-depth:])] = path
    return names
