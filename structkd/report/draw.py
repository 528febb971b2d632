"""A figure as SVG that takes its colours from the page, so that one drawing serves light, dark and paper."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from structkd.report.statistics import interval
from structkd.runs import Figure, Series

INK = "#010203"  # stands for the page's text colour in a drawing; replaced by currentColor
COLOURS = tuple(f"#0f0e{number:02x}" for number in range(6))  # stand for the page's --c0 to --c5
_LINES: Sequence[Any] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_DASHES = ("none", "7 3", "7 3 2 3", "2 3", "9 2", "1 2")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GLYPHS = ("\u25cf", "\u25a0", "\u25b2", "\u25c6", "\u25bc", "\u271a")
_WIDTH, _HEIGHT = 5.0, 3.3  # inches; small, so that text stays readable when a phone scales the drawing down
_SIZE = 11.0  # points
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": _SIZE,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(figure: Figure, prefix: str = "f") -> str:
    """A figure as SVG text in the page's own ink; `prefix` keeps element ids apart when a page holds several."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": prefix}):
        labels = _categories(figure)
        # one row per category, its name at the left: names of any length stay readable
        height = _HEIGHT if labels is None else max(1.6, 0.75 + 0.3 * len(labels) * _rows(figure))
        canvas = Canvas(figsize=(_WIDTH, height))
        axes = canvas.add_subplot()
        _PAINTERS[figure.kind](axes, figure, looks(figure))
        across, up = figure.x_label, figure.y_label
        if labels is not None:
            across, up = figure.y_label, ""
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        for wanted, scale, axis in (
            (figure.x_log, axes.set_xscale, axes.xaxis),
            (figure.y_log, axes.set_yscale, axes.yaxis),
        ):
            if wanted:
                scale("log")
                _sparse_labels(axis)
        axes.set_axisbelow(True)
        axes.grid(visible=True, axis="y" if labels is None else "x", alpha=0.25, color=INK, linewidth=0.6)
        _leave_room(canvas, axes, bool(up), height)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embed(buffer.getvalue(), prefix, figure)


def _sparse_labels(axis: Axis) -> None:
    """Labels of a logarithmic axis that do not run into each other: 1, 2, 5 within two decades, else the decades.

    Within a factor of five that may be one label or none, for which matplotlib puts many: then a few even steps.
    """
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        axis.set_major_locator(MaxNLocator(4, prune="upper") if high < 5 * low else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")


@dataclass(frozen=True)
class Look:
    """How a series is told apart: by colour, and by line, marker or glyph for those who do not see it."""

    colour: int
    style: int

    @property
    def ink(self) -> str:
        """Stand-in of the colour."""
        return COLOURS[self.colour]

    @property
    def line(self) -> Any:
        """Matplotlib's line style."""
        return _LINES[self.style]

    @property
    def marker(self) -> str:
        """Matplotlib's marker."""
        return _MARKERS[self.style]

    @property
    def dashes(self) -> str:
        """SVG's stroke-dasharray of the line."""
        return _DASHES[self.style]

    @property
    def glyph(self) -> str:
        """The marker as a character."""
        return _GLYPHS[self.style]


def looks(figure: Figure) -> list[Look]:
    """One a series: colours by group, styles by place in the group."""
    groups = [series.name if series.group is None else series.group for series in figure.series]
    order, seen, found = list(dict.fromkeys(groups)), dict.fromkeys(groups, 0), []
    alone = len(order) == len(groups)
    for group in groups:
        number = order.index(group)
        found.append(Look(number % len(COLOURS), (number if alone else seen[group]) % len(_LINES)))
        seen[group] += 1
    return found


def _leave_room(canvas: Canvas, axes: Axes, labelled: bool, height: float) -> None:
    """Margins from the length of the tick labels; matplotlib's own layout draws everything twice for it."""
    ticks = axes.yaxis.get_major_formatter().format_ticks(list(axes.get_yticks()))
    longest = max((len(text) for text in ticks if "$" not in text), default=5)
    left = min(0.5, ((longest * 0.56 + 0.9) * _SIZE + 1.5 * _SIZE * labelled) / (72 * _WIDTH))
    canvas.subplots_adjust(left=left, right=0.97, top=1 - 0.12 / height, bottom=0.58 / height)


def _categories(figure: Figure) -> list[str] | None:
    """Names down the side, for kinds that compare names."""
    if figure.kind not in ("bars", "samples"):
        return None
    return list(dict.fromkeys(str(x) for series in figure.series for x in series.x))


def _rows(figure: Figure) -> float:
    """Height of a category in rows."""
    return 1.0 if figure.kind == "samples" else max(1.0, 0.6 * len(figure.series))


def _paint_lines(axes: Axes, figure: Figure, looks: Sequence[Look]) -> None:
    for look, series in zip(looks, figure.series, strict=True):
        x, y = thinned(series)
        axes.plot(x, y, linestyle=look.line, color=look.ink, linewidth=1.8)
        if series.y_error is not None:
            low = [y - e for y, e in zip(series.y, series.y_error, strict=True)]
            high = [y + e for y, e in zip(series.y, series.y_error, strict=True)]
            axes.fill_between(series.x, low, high, color=look.ink, alpha=0.18, linewidth=0)


def _paint_bars(axes: Axes, figure: Figure, looks: Sequence[Look]) -> None:
    labels = _categories(figure) or []
    width = 0.8 / max(1, len(figure.series))
    for i, series in enumerate(figure.series):
        places = [labels.index(str(x)) + (i - (len(figure.series) - 1) / 2) * width for x in series.x]
        bars = axes.barh(
            places,
            [float(y) for y in series.y],
            width * 0.9,
            color=looks[i].ink,
            xerr=series.y_error,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )
        if len(labels) * len(figure.series) <= 24:
            axes.bar_label(bars, fmt=_count, padding=3, fontsize=9)
    axes.margins(x=0.2)  # the labels stand beyond the bars
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _paint_samples(axes: Axes, figure: Figure, looks: Sequence[Look]) -> None:
    """Every sample as a faint dot, their mean as a marker, its 95 % confidence interval as a bar."""
    labels = _categories(figure) or []
    for i, series in enumerate(figure.series):
        shift = (i - (len(figure.series) - 1) / 2) * 0.6 / max(1, len(figure.series))
        for name in dict.fromkeys(map(str, series.x)):
            values = np.asarray([y for x, y in zip(series.x, series.y, strict=True) if str(x) == name])
            place = labels.index(name) + shift
            axes.plot(values, np.full(len(values), place), "o", color=looks[i].ink, alpha=0.35, markersize=5)
            half = interval(values)
            axes.errorbar(
                values.mean(), place, xerr=None if half is None else half, fmt=looks[i].marker,
                color=looks[i].ink, ecolor=INK, capsize=3, markersize=7,
            )  # fmt: skip


def _paint_scatter(axes: Axes, figure: Figure, looks: Sequence[Look]) -> None:
    for look, series in zip(looks, figure.series, strict=True):
        axes.errorbar(series.x, series.y, yerr=series.y_error, fmt=look.marker, color=look.ink, capsize=2, markersize=8)
    axes.margins(0.12)


def _paint_cloud(axes: Axes, figure: Figure, looks: Sequence[Look]) -> None:
    """Many points; lines at nought part agreement in sign (upper right, lower left) from disagreement."""
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
    for look, series in zip(looks, figure.series, strict=True):
        axes.plot(series.x, series.y, look.marker, color=look.ink, alpha=0.4, markersize=4, markeredgewidth=0)


def _paint_histogram(axes: Axes, figure: Figure, looks: Sequence[Look]) -> None:
    values = [value for series in figure.series for value in series.y]
    bins = min(60, max(8, int(len(values) ** 0.5)))
    span = (min(values), max(values)) if values else (0.0, 1.0)
    for look, series in zip(looks, figure.series, strict=True):
        axes.hist(series.y, bins=bins, range=span, color=look.ink, alpha=0.25, density=True, histtype="stepfilled")
        axes.hist(series.y, bins=bins, range=span, color=look.ink, histtype="step", density=True, linestyle=look.line)


_PAINTERS: dict[str, Callable[[Axes, Figure, Sequence[Look]], None]] = {
    "lines": _paint_lines,
    "bars": _paint_bars,
    "samples": _paint_samples,
    "scatter": _paint_scatter,
    "cloud": _paint_cloud,
    "histogram": _paint_histogram,
}


def thinned(series: Series, most: int = 300) -> tuple[list[Any], list[float]]:
    """At most so many points of a curve, evenly spread, the last one kept."""
    if len(series.x) <= most:
        return list(series.x), list(series.y)
    rows: NDArray[np.int64] = np.unique(np.linspace(0, len(series.x) - 1, most).astype(np.int64))
    return [series.x[row] for row in rows], [series.y[row] for row in rows]


def _embed(svg: str, prefix: str, figure: Figure) -> str:
    """Inline form of matplotlib's SVG: no XML header, unique ids, the page's colours, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    for number, sentinel in enumerate(COLOURS):
        svg = svg.replace(sentinel, f"var(--c{number})")
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    label = escape(f"{figure.title}. {figure.note}".strip(), quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
