"""Single queries behind a mean: order and texts of wins and losses, agreement and margins against slow loops."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from structkd.ranking.data.collection import Collection
from structkd.ranking.evaluation.cases import Case, Sample, agreement_figure, cases_of, margin_figure, write_cases
from structkd.runs import Run
from structkd.trec import run_of


def case(query: str, before: float, after: float) -> Case:
    return Case(query, before, after, "x " * 300, "short")


def test_the_largest_changes_come_first_and_the_title_counts_all(tmp_path: Path) -> None:
    cases = [case(f"q{i}", 0.5, 0.5 + i / 20) for i in range(8)] + [case("worse", 0.9, 0.2), case("bad", 0.9, 0.1)]
    run = Run.create(tmp_path, "test")
    write_cases(run, "cases", "Queries", "nDCG@10", cases)
    table = run.tables()["cases"]
    assert table["title"] == "Queries: 7 won, 2 lost, 1 even"
    assert [row["query"] for row in table["rows"]] == ["q7", "q6", "q5", "q4", "q3", "bad", "worse"]
    assert [row["outcome"] for row in table["rows"]] == ["win"] * 5 + ["loss"] * 2
    first = table["rows"][0]
    assert (first["nDCG@10 before"], first["after"]) == (0.5, 0.85)
    assert first["first document before"].endswith(" ...")
    assert len(first["first document before"]) <= 204
    assert first["first document after"] == "short"


def test_no_table_when_nothing_changed(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "test")
    write_cases(run, "cases", "Queries", "nDCG@10", [case("q", 0.5, 0.5)])
    assert run.tables() == {}


def test_texts_are_the_collections(small: Collection) -> None:
    query, document = small.queries.ids.strings([0])[0], small.documents.ids.strings([1])[0]
    (found,) = cases_of(small, {query: 0.1}, {query: 0.4, "other": 1.0}, {query: document}, {query: "elsewhere"})
    assert found == Case(
        small.queries.texts[0], 0.1, 0.4, small.documents.texts[1], "(elsewhere, not in the collection)"
    )
    (missing,) = cases_of(small, {query: 0.1}, {query: 0.4}, {}, {})
    assert missing.first_before == "(no document)"


def test_agreement_and_margins_say_what_loops_say() -> None:
    generator = np.random.default_rng(0)
    queries = [f"q{i}" for i in range(5) for _ in range(6)]
    documents = [f"d{j}" for _ in range(5) for j in range(6)]
    values = [generator.normal(size=30) for _ in range(2)]
    teacher, student = (Sample.of(run_of(queries, documents, one)) for one in values)
    figure = agreement_figure(teacher.scores, {"after": student.scores})
    split = [np.split(one, 5) for one in values]
    expected = [spearmanr(first, second).statistic for first, second in zip(*split, strict=True)]
    assert figure.series[0].y == pytest.approx(expected)
    assert f"after {np.mean(expected):.3f}" in figure.note
    assert teacher.first["q0"] == f"d{int(np.argmax(split[0][0]))}"

    cloud = margin_figure(teacher.scores, {"after": student.scores})
    pairs = {
        (round(t[i] - t[j], 9), round(s[i] - s[j], 9))
        for t, s in zip(*split, strict=True)
        for i in range(6)
        for j in range(6)
        if i != j
    }
    drawn = list(zip(np.round(cloud.series[0].x, 9), np.round(cloud.series[0].y, 9), strict=True))
    assert len(drawn) == 25
    assert set(drawn) <= pairs
    same = np.mean([x * y > 0 for x, y in drawn])
    assert f"after {same:.0%}" in cloud.note
