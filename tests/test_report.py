"""The report: self-contained, well-formed, every figure kind drawn, runs compared, text escaped, colours legible."""

import itertools
import math
import re
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from structkd import report
from structkd.cli.app import run as command
from structkd.errors import DataError
from structkd.report import compare
from structkd.report.draw import COLOURS, INK, looks, thinned
from structkd.report.statistics import interval
from structkd.runs import Figure, Run, Series
from structkd.text import cell, flat

FIGURES = {
    "curve": Figure("lines", "Curve", "epoch", "loss", [Series("a", [1, 2, 3], [3.0, 2.0, 1.0], [0.1, 0.1, 0.2])]),
    "bars": Figure("bars", "Bars", "method", "accuracy", [Series("m", ["x", "y"], [0.5, 0.7], [0.1, 0.0])], note="n"),
    "counts": Figure("bars", "Counts", "teacher", "pairs", [Series("asked", ["t", "u"], [4, 12345])]),
    "samples": Figure("samples", "Seeds", "method", "accuracy", [Series("s", ["x", "x", "y"], [0.5, 0.7, 0.6])]),
    "scatter": Figure("scatter", "Frontier", "ms", "nDCG", [Series("p", [1, 10], [0.1, 0.2])], x_log=True),
    "cloud": Figure("cloud", "Margins", "teacher", "student", [Series("p", [-1.0, 2.0], [0.5, 3.0])]),
    "histogram": Figure("histogram", "Scores", "score", "density", [Series("t", [], [0.1, 0.2, 0.2, 3.0])]),
}
TEACHER = {"model": "cross-encoder", "fingerprint": "abc123" * 10, "asked": 4, "from_cache": 8, "extra": {"seed": 3}}


def make(folder: Path, epochs: int = 3) -> Path:
    run = Run.create(folder, "graph bench", {"epochs": epochs, "text": "<script>alert(1)</script>"}, seed=1)
    for name, figure in FIGURES.items():
        run.write_figure(name, figure)
    run.write_table("main", "Main <table>", [{"method": "ff-g2m", "test": 0.83456}, {"method": "mlp", "extra": True}])
    run.write_table("cases", "Wins", [{"query": "a passage that goes on " * 5, "before": 0.25, "after": 0.5}])
    run.write_teachers([TEACHER])
    report.finish(run, {"accuracy": 0.83, "nested": {"a": epochs}})
    return folder


class Tags(HTMLParser):
    """Collects tags, ids, addresses and what names things for a screen reader."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.named_by: list[str] = []
        self.regions: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "xlink:href") and value:
                self.addresses.append(value)
            if key == "aria-labelledby":
                self.named_by.append(value or "")
        if dict(attrs).get("class") == "scroll":
            self.regions.append(dict(attrs))


def parsed(path: Path) -> tuple[str, Tags]:
    page, tags = path.read_text(encoding="utf-8"), Tags()
    tags.feed(page)
    return page, tags


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs one, two and b/one, and r.html, the report of the first two."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [make(folder / "one"), make(folder / "two", epochs=5)]
    shutil.copytree(folder / "one", folder / "b" / "one")
    report.write(runs, folder / "r.html")
    return folder


def test_report_is_self_contained_and_compares_runs(made: Path) -> None:
    page, tags = parsed(made / "r.html")
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert "script" not in tags.tags
    assert "&lt;script&gt;" in page
    assert "Main &lt;table&gt;" in page
    assert all(address.startswith("#") or address == "data:," for address in tags.addresses)
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(tags.ids) == len(set(tags.ids)), "element ids must be unique on the page"
    assert page.count('role="img"') == len(FIGURES), "figures of one name share their axes"
    assert "one: a" in page
    assert "two: a" in page
    assert "0.8346" in page
    assert "Settings that differ" in page
    assert re.search(r"epochs</th><td>3</td><td>5</td>", page)
    assert page.count("Main &lt;table&gt;") == 1, "tables of one name become one"
    assert page.count("<td>ff-g2m</td>") == 0
    assert page.count(">ff-g2m</td>") == 2
    assert page.count(">Wins</h3>") == 2, "texts stay with their run"


def test_every_run_folder_has_its_page(made: Path) -> None:
    page, _ = parsed(made / "one" / "report.html")
    assert "<h1>structkd graph bench</h1>" in page
    for shown in (TEACHER["fingerprint"], "Teacher cross-encoder", "extra seed", "seed 1", "torch ", "epochs = 3"):
        assert str(shown) in page
    assert "Comparison" not in page


def test_parts_have_names_for_screen_readers_and_tables_are_reached_by_keyboard(made: Path) -> None:
    page, tags = parsed(made / "r.html")
    assert set(tags.named_by) <= set(tags.ids)
    assert tags.regions
    assert all(
        region["role"] == "region"
        and region["tabindex"] == "0"
        and (region.get("aria-label") or region["aria-labelledby"])
        for region in tags.regions
    )
    assert tags.tags.count("figure") == tags.tags.count("figcaption") == len(FIGURES)
    assert '<html lang="en">' in page
    assert tags.tags.count("h1") == 1
    assert page.count("<th scope=") == tags.tags.count("th")


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_colours_have_the_contrast_that_wcag_asks(scheme: str) -> None:
    css = (Path(report.__file__).parent / "report.html").read_text(encoding="utf-8")
    blocks = dict(zip(("light", "dark", "print"), re.findall(r":root \{([^}]*)\}", css), strict=True))
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    assert {"ink", "paper", "soft", "quiet", "accent", *(f"c{i}" for i in range(len(COLOURS)))} <= set(colours)
    for text, ground in itertools.product(("ink", "quiet", "accent"), ("paper", "soft")):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for number, ground in itertools.product(range(len(COLOURS)), ("paper", "soft")):
        assert contrast(colours[f"c{number}"], colours[ground]) >= 3.0, (number, ground)


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_formula_agrees_with_published_values() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("name", FIGURES)
def test_each_kind_draws_well_formed_svg_in_the_pages_ink(name: str) -> None:
    svg = report.draw(FIGURES[name], "p1")
    ElementTree.fromstring(svg)
    assert "currentColor" in svg
    assert INK not in svg
    assert not any(colour in svg for colour in COLOURS)
    assert "var(--c0)" in svg
    assert FIGURES[name].y_label in svg
    assert f'aria-label="{FIGURES[name].title}.' in svg


@pytest.mark.parametrize("kind", ["lines", "bars", "samples", "scatter", "cloud", "histogram"])
@pytest.mark.parametrize("count", [0, 1, 13])
def test_any_number_of_series_is_drawn(kind: str, count: int, tmp_path: Path) -> None:
    series = [Series(f"series {i}", [1, 2], [0.5, 0.25 * i]) for i in range(count)]
    run = Run.create(tmp_path / "run", "test")
    run.write_figure("f", Figure(kind, "T", "x", "y", series))  # type: ignore[arg-type]
    report.finish(run, {})
    page, _ = parsed(tmp_path / "run" / "report.html")
    assert count < 2 or all(f"series {i}" in page for i in range(count))


def test_samples_show_the_mean_and_students_interval() -> None:
    values = [0.81, 0.84, 0.83, 0.86, 0.82]
    assert interval(np.asarray(values)) == pytest.approx(2.776445 * statistics.stdev(values) / math.sqrt(5), rel=1e-6)
    assert interval(np.asarray([0.5])) is None
    svg = report.draw(Figure("samples", "T", "m", "y", [Series("s", ["a"] * 5, values)]))
    assert len(re.findall(r"<use ", svg)) >= 6  # five dots and the mean


def test_logarithmic_axes_have_labels_that_stay_apart() -> None:
    """1, 2, 5 within two decades, decades beyond; never 3 x 10^-2 of the minor ticks."""
    near, far = (
        report.draw(Figure("scatter", "t", "x", "y", [Series("a", values, [1.0, 2.0])], x_log=True), "p")
        for values in ([0.03, 0.3], [10, 5e4])
    )
    assert {"0.05", "0.1", "0.2"} <= set(re.findall(r"<text[^>]*>([^<]*)", near))
    assert "times" not in near
    assert far.count("mathdefault{10^") == 5


@pytest.mark.parametrize("values", [[1.48e6, 4.0e6], [3.2e6, 3.9e6], [1.0, 1.3], [0.15, 0.6]])
def test_a_narrow_logarithmic_axis_has_a_few_labels(values: list[float]) -> None:
    """1, 2, 5 give one or none within a factor of five; matplotlib then put seven long ones over each other."""
    svg = report.draw(Figure("scatter", "t", "x", "y", [Series("a", values, [1.0, 1.0])], x_log=True), "p")
    texts = re.findall(r"<text[^>]*>([^<]*)", svg)
    assert 2 <= texts.index("x") <= 4  # the axis's own labels stand before its name


def test_series_of_a_group_share_their_colour() -> None:
    names = [("a, low", "a"), ("b, low", "b"), ("a, high", "a"), ("b, high", "b")]
    grouped = looks(Figure("lines", "T", "x", "y", [Series(name, [], [], group=group) for name, group in names]))
    assert [look.colour for look in grouped] == [0, 1, 0, 1]
    assert [look.style for look in grouped] == [0, 0, 1, 1]
    alone = looks(Figure("lines", "T", "x", "y", [Series(str(i), [], []) for i in range(8)]))
    assert len({(look.colour, look.style) for look in alone[:6]}) == 6


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    series = Series("s", list(range(1000)), [float(i) for i in range(1000)])
    x, y = thinned(series, 50)
    assert len(x) == 50
    assert (x[0], x[-1]) == (0, 999)
    assert x == y
    assert thinned(Series("s", [1, 2], [3.0, 4.0])) == ([1, 2], [3.0, 4.0])


def test_what_differs_between_runs() -> None:
    values = {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3, "c": 4}, "three": {"a": 1}}
    assert compare.differing(values) == {"b": {"one": 2, "two": 3}}
    assert list(compare.side_by_side(values)) == ["a", "b"]
    switches = {"one": {"head": "", "keep": "x"}, "two": {"head": "", "keep": "x"}, "other command": {}}
    assert compare.differing(switches) == {"keep": {"one": "x", "two": "x"}}


@pytest.mark.parametrize(
    ("value", "column", "shown"),
    [
        (None, "", ""), (True, "", "yes"), (0.83456, "test", "0.8346"), (0.00001234, "", "1.23e-05"),
        (0.0, "", "0.0000"), (33.06, "", "33.06"), (12345.6, "", "12,346"),
        (1_234_567_890, "peak_rss_bytes", "1.23 GB"),
        (512, "bytes", "512 bytes"), ([0.5, 1], "", "0.5000, 1"), ({"seed": 1}, "", "seed 1"), ("x", "", "x"),
    ],
)  # fmt: skip
def test_values_as_people_read_them(value: object, column: str, shown: str) -> None:
    assert cell(value, column) == shown


def test_flat_joins_keys_and_leaves_tables_out() -> None:
    assert flat({"a": {"b": 1, "c": [1, 2]}, "rows": [{"x": 1}], "d": None}) == {"a b": 1, "a c": [1, 2], "d": None}


def test_errors_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no run folder given"):
        report.write([], tmp_path / "r.html")
    assert command(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 1
    assert "no run.json there" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_command_writes_the_file(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["report", str(made / "one"), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    assert (tmp_path / "r.html").stat().st_size > 20_000
    assert '"report"' in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart_by_as_little_path_as_needed(made: Path, tmp_path: Path) -> None:
    page, _ = parsed(report.write([made / "one", made / "b" / "one", made / "one"], tmp_path / "r.html"))
    assert f">{made.name}/one</a>" in page
    assert ">b/one</a>" in page
    assert str(made) not in page
