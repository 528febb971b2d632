"""The report: self-contained, well-formed, every figure kind drawn, runs compared, text escaped."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from structkd import report
from structkd.cli.app import run as command
from structkd.errors import DataError
from structkd.runs import Figure, Run, Series

FIGURES = {
    "curve": Figure("lines", "Curve", "epoch", "loss", [Series("a", [1, 2, 3], [3.0, 2.0, 1.0], [0.1, 0.1, 0.2])]),
    "bars": Figure("bars", "Bars", "method", "accuracy", [Series("m", ["x", "y"], [0.5, 0.7], [0.1, 0.0])], note="n"),
    "scatter": Figure("scatter", "Frontier", "ms", "nDCG", [Series("p", [1, 10], [0.1, 0.2])], x_log=True),
    "histogram": Figure("histogram", "Scores", "score", "density", [Series("t", [], [0.1, 0.2, 0.2, 3.0])]),
}


def make(folder: Path) -> Path:
    run = Run.create(folder, "graph bench", {"epochs": 3, "text": "<script>alert(1)</script>"}, seed=1)
    for name, figure in FIGURES.items():
        run.write_figure(name, figure)
    run.write_table("main", "Main <table>", [{"method": "ff-g2m", "test": 0.83456}, {"method": "mlp", "extra": True}])
    run.finish({"accuracy": 0.83, "nested": {"a": 1}})
    return folder


class Tags(HTMLParser):
    """Collects tags, ids and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href") and value:
                self.addresses.append(value)


def test_report_is_self_contained_and_compares_runs(tmp_path: Path) -> None:
    out = report.write([make(tmp_path / "one"), make(tmp_path / "two")], tmp_path / "r.html")
    page = out.read_text()
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert "&lt;script&gt;" in page
    assert "Main &lt;table&gt;" in page
    assert all(address.startswith("#") for address in tags.addresses)
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(tags.ids) == len(set(tags.ids)), "element ids must be unique on the page"
    assert tags.tags.count("svg") == len(FIGURES), "figures of one name share their axes"
    assert "one: a" in page
    assert "two: a" in page
    assert "0.8346" in page
    assert page.count('role="img"') == len(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_each_kind_draws_well_formed_svg_in_the_pages_ink(name: str) -> None:
    svg = report.draw(FIGURES[name], "p1")
    ElementTree.fromstring(svg)
    assert "currentColor" in svg
    assert report._INK not in svg
    assert FIGURES[name].x_label in svg
    assert f'aria-label="{FIGURES[name].title}.' in svg


@pytest.mark.parametrize("kind", ["lines", "bars", "scatter", "histogram"])
@pytest.mark.parametrize("count", [0, 1, 13])
def test_any_number_of_series_is_drawn(kind: str, count: int) -> None:
    series = [Series(f"series {i}", [1, 2], [0.5, 0.25 * i]) for i in range(count)]
    svg = report.draw(Figure(kind, "T", "x", "y", series))  # type: ignore[arg-type]
    ElementTree.fromstring(svg)
    assert count < 2 or all(f"series {i}" in svg for i in range(count))


def test_errors_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no run folder given"):
        report.write([], tmp_path / "r.html")
    assert command(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 1
    assert "no run.json there" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_command_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run")
    assert command(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    assert (tmp_path / "r.html").stat().st_size > 20_000
    assert '"report"' in capsys.readouterr().out
