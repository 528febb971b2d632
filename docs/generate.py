"""Write what comes from code and results, cli.md, results.md, pictures: python docs/generate.py [--check]."""

import json
import sys
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from structkd.cli.app import app
from structkd.report.draw import draw, looks
from structkd.runs import Figure, Series

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"


def cli() -> str:
    """The command reference."""
    text: str = app.generate_docs(output_format="markdown", recursive=True)
    return text.replace("# structkd\n", "# Commands\n", 1).rstrip() + "\n"


def results() -> str:
    """Tables of what benchmarks/results holds."""
    parts = [
        "# Results",
        "",
        "Generated from `benchmarks/results/*.json`, each with its command, commit and machine. Graph figures are test",
        "accuracy at best validation, mean and population standard deviation over seeds, one shared teacher per seed.",
        "",
    ]
    for path in sorted(RESULTS.glob("graph_*_*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        if "seeds" in value:
            parts += _graph(path.name, value)
    parts += _default_method(json.loads((RESULTS / "graph_default_method.json").read_text(encoding="utf-8")))
    parts += _reproduction(json.loads((RESULTS / "graph_reproduction.json").read_text(encoding="utf-8")))
    for path in sorted(RESULTS.glob("quality_*.json")):
        parts += _ranking(path.name, json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(parts).rstrip() + "\n"


def _ranking(name: str, value: dict[str, Any]) -> list[str]:
    rows = [{key: cell for key, cell in row.items() if key != "seconds" and _shown(cell)} for row in value["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    seeds = max((len(row["seeds"]) for row in value["rows"] if "seeds" in row), default=1)
    lines = [f"## {value['dataset']}", "", f"{'One seed' if seeds == 1 else f'{seeds} seeds'}. `{name}`", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return [*lines, ""]


def _shown(cell: Any) -> bool:
    """Numbers and words fit a table; the values of each seed and counts stay in the file."""
    return isinstance(cell, str | int | float)


def _graph(name: str, value: dict[str, Any]) -> list[str]:
    teacher = value["rows"][0]
    lines = [
        f"## {value['dataset']}, {value['split']} split, {value['setting']}, teacher {teacher['teacher']}",
        "",
        f"Seeds {value['seeds'][0]} to {value['seeds'][-1]}; teacher {teacher['teacher_test_mean']:.4f}. `{name}`",
        "",
        "| method | test | std | validation | cos low | cos high | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in value["rows"]:
        keys = ("test_mean", "test_std", "valid_mean", "cos_low", "cos_high", "cpu_seconds")
        cells = [f"{row[key]:.4f}" if key != "cpu_seconds" else f"{row[key]:.1f}" for key in keys]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _default_method(value: dict[str, Any]) -> list[str]:
    """The default method beside GLNN and FF-G2M on every graph, with paired t-tests over seeds."""
    lines = [
        "## The default graph method",
        "",
        f"{value['what'].capitalize()}; paired t-test over seeds. The method was {value['development']}",
        "`graph_default_method.json`; what was tried: `benchmarks/README.md`.",
        "",
        "| graph, split, setting, teacher | seeds | teacher | GLNN | FF-G2M | structkd | p: GLNN | p: FF-G2M | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for graph in value["graphs"]:
        rows = {row["method"]: row for row in graph["rows"]}
        name = f"{graph['name']}, {graph['split']}, {graph['setting']}, {graph['teacher']}"
        figures = [f"{rows[m]['test_mean']:.4f} +- {rows[m]['test_std']:.4f}" for m in ("glnn", "ff-g2m", "structkd")]
        tests = ["-" if (p := graph[f"against_{m}"]["p"]) is None else f"{p:.2g}" for m in ("glnn", "ff-g2m")]
        own = rows["structkd"]
        cells = [
            str(len(graph["seeds"])),
            f"{own['teacher_test_mean']:.4f}",
            *figures,
            *tests,
            f"{own['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _reproduction(value: dict[str, Any]) -> list[str]:
    """Published hyper-parameters beside published figures; blocks and cells that have not run are named."""
    marks = "; ".join(f"{mark} {meaning}" for mark, meaning in value["marks"].items())
    lines = [
        "## Reproduction table",
        "",
        f"{value['what'].capitalize()}; the teacher keeps its epoch of best validation accuracy, as published.",
        f"Marks: {marks}.",
        "A row of fewer than five seeds is no reproduction yet. `graph_reproduction.json`",
        "",
        "| dataset, split, teacher | method | input | test | std | seeds | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for block in [*value["blocks"], *value["earlier_blocks"]]:
        name = f"{block['dataset'].removeprefix('npz:graph/')}, {block['split']}, {block['teacher']}"
        for row in block["rows"]:
            published = f"{row['published']:.2f} {row['mark']}" if row["published"] else ""
            spread = f"{row['std']:.2f}" if row["seeds"] > 1 else "-"
            figures = [f"{row['test']:.2f}", spread, str(row["seeds"]), published]
            lines.append("| " + " | ".join([name, row["method"], row["input_class"], *figures]) + " |")
    for block in value["earlier_blocks"]:
        lines += ["", f"The block {block['block']} is of commit {block['commit']}, before `tined` was mended."]
    begun = {block["block"] for block in value["blocks"]}
    whole = [name for name in value["missing_seeds_of_five"] if name not in begun]
    lines += ["", f"Blocks not run with the present code: {', '.join(whole)}.", ""]
    return lines


def picture(name: str) -> str:
    """A figure of graph_spectrum_digits.json as a drawing of its own, on paper white."""
    value = json.loads((RESULTS / "graph_spectrum_digits.json").read_text(encoding="utf-8"))["figures"][name]
    figure = Figure(**{**value, "series": [Series(**series) for series in value["series"]]})
    inks = "".join(f"--c{number}:{ink};" for number, ink in enumerate(_INKS))
    svg = draw(figure, name).replace('viewBox="0 0 360 237.6"', 'viewBox="0 0 360 315" width="720" height="630"')
    legend = ""
    for at, (series, look) in enumerate(zip(figure.series, looks(figure), strict=True)):
        x, y, ink = 10 + 180 * (at % 2), 252 + 15 * (at // 2), f"var(--c{look.colour})"
        line = f'<path d="M{x} {y}h22" style="stroke:{ink};stroke-width:2;stroke-dasharray:{look.dashes}"/>'
        legend += line + f'<text x="{x + 27}" y="{y + 4}" style="font:11px sans-serif">{escape(series.name)}</text>'
    style = f"<style>svg{{color:#1b1f24;background:#fff;{inks}}}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + style + svg[start:].replace("</svg>", legend + "</svg>") + "\n"


_INKS = ("#0068a8", "#b84a00", "#00795a", "#a3457b", "#5a55c8", "#756000")
PAGES = {
    "cli.md": cli,
    "results.md": results,
    "concepts-bands.svg": partial(picture, "band-agreement"),
    "concepts-energy.svg": partial(picture, "band-energy"),
}


def main() -> int:
    """Write the pages; with --check write nothing, and name the page that is out of date."""
    stale = 0
    for page, content in ((HERE / name, write()) for name, write in PAGES.items()):
        if "--check" not in sys.argv[1:]:
            page.write_text(content, encoding="utf-8")
        elif page.read_text(encoding="utf-8") != content:
            print(f"docs/{page.name} is out of date; run: python docs/generate.py", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
