"""One or more run folders -> one self-contained HTML file: configuration, tables, plots; no script, no network."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from structkd.errors import DataError
from structkd.files import write_text
from structkd.runs import Figure, Run, Series

# Okabe and Ito's palette without yellow and black: distinct for colour-blind readers, on white and on dark grey
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_INK = "#010203"  # stands for the page's text colour in a drawing; replaced by currentColor
_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class _Drawing:
    """A figure ready for the page."""

    figure: Figure
    svg: str


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
    page = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            title=title,
            runs=[
                {
                    "name": name,
                    "info": run.info,
                    "config": run.config(),
                    "tables": run.tables(),
                    "summary": _flat(run.info["summary"]),
                }
                for name, run in runs.items()
            ],
            drawings=[_Drawing(figure, draw(figure, f"f{i}")) for i, figure in enumerate(_merged(runs))],
            cell=_cell,
        )
    )
    write_text(out, page)
    return Path(out)


def draw(figure: Figure, prefix: str = "f") -> str:
    """A figure as SVG text in the page's own ink; `prefix` keeps element ids apart when a page holds several."""
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        canvas = Canvas(figsize=(6.6, 3.9), layout="constrained")
        axes = canvas.add_subplot()
        _PAINTERS[figure.kind](axes, figure)
        axes.set_xlabel(figure.x_label)
        axes.set_ylabel(figure.y_label)
        if figure.x_log:
            axes.set_xscale("log")
        if figure.y_log:
            axes.set_yscale("log")
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="y", alpha=0.25, color=_INK, linewidth=0.6)
        if len(figure.series) > 1:
            canvas.legend(loc="outside lower center", ncols=min(3, len(figure.series)))
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embed(buffer.getvalue(), prefix, figure)


def _paint_lines(axes: Axes, figure: Figure) -> None:
    for i, series in enumerate(figure.series):
        colour = _COLOURS[i % len(_COLOURS)]
        line = _LINES[i % len(_LINES)]
        axes.plot(series.x, series.y, linestyle=line, color=colour, label=series.name, linewidth=1.8)
        if series.y_error is not None:
            low = [y - e for y, e in zip(series.y, series.y_error, strict=True)]
            high = [y + e for y, e in zip(series.y, series.y_error, strict=True)]
            axes.fill_between(series.x, low, high, color=colour, alpha=0.18, linewidth=0)


def _paint_bars(axes: Axes, figure: Figure) -> None:
    labels = list(dict.fromkeys(str(x) for series in figure.series for x in series.x))
    width = 0.8 / max(1, len(figure.series))
    for i, series in enumerate(figure.series):
        places = [labels.index(str(x)) + (i - (len(figure.series) - 1) / 2) * width for x in series.x]
        bars = axes.bar(
            places,
            series.y,
            width * 0.92,
            color=_COLOURS[i % len(_COLOURS)],
            label=series.name,
            yerr=series.y_error,
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
        )
        if len(labels) * len(figure.series) <= 16:
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(range(len(labels)), labels)


def _paint_scatter(axes: Axes, figure: Figure) -> None:
    for i, series in enumerate(figure.series):
        axes.errorbar(
            series.x,
            series.y,
            yerr=series.y_error,
            fmt=_MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
            label=series.name,
            capsize=2,
        )


def _paint_histogram(axes: Axes, figure: Figure) -> None:
    values = [value for series in figure.series for value in series.y]
    bins = min(60, max(8, int(len(values) ** 0.5)))
    span = (min(values), max(values)) if values else (0.0, 1.0)
    for i, series in enumerate(figure.series):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.hist(series.y, bins=bins, range=span, color=colour, alpha=0.45, label=series.name, density=True)
        axes.hist(series.y, bins=bins, range=span, color=colour, histtype="step", density=True)


_PAINTERS = {"lines": _paint_lines, "bars": _paint_bars, "scatter": _paint_scatter, "histogram": _paint_histogram}


def _embed(svg: str, prefix: str, figure: Figure) -> str:
    """Inline form of matplotlib's SVG: no XML header, unique ids, the page's ink, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor")
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    label = escape(f"{figure.title}. {figure.note}".strip(), quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _merged(runs: Mapping[str, Run]) -> list[Figure]:
    """All figures; those of one name and kind from several runs share their axes."""
    grouped: dict[tuple[str, str], list[tuple[str, Figure]]] = {}
    for run_name, run in runs.items():
        for name, figure in run.figures().items():
            grouped.setdefault((name, figure.kind), []).append((run_name, figure))
    out = []
    for members in grouped.values():
        first = members[0][1]
        if len(members) > 1:
            series = [
                Series(f"{run_name}: {s.name}", s.x, s.y, s.y_error)
                for run_name, figure in members
                for s in figure.series
            ]
            first = replace(first, series=series)
        out.append(first)
    return out


def _names(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Shortest distinct name of each folder."""
    paths = [Path(folder).resolve() for folder in folders]
    short = [path.name for path in paths]
    return {name if short.count(name) == 1 else str(path): path for name, path in zip(short, paths, strict=True)}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key} ")
        elif not isinstance(item, list):
            flat[f"{prefix}{key}"] = item
    return flat


def _cell(value: Any) -> str:
    """A table cell: four significant decimals for fractions, nothing for nothing, lists joined."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1000 or 0 < abs(value) < 0.001 else f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return str(value)
