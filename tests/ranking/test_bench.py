"""The comparison: its table, what it reads back, and who was asked."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from structkd.cli.app import run as command
from structkd.errors import UsageError
from structkd.ranking import bench as bench_module
from structkd.ranking.bench import BenchConfig, bench
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.datasets import write
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.distillation import DistillConfig
from structkd.ranking.evaluation.frontier import QUERIES, cost_of
from structkd.ranking.models.encoders import BiScorer
from structkd.runs import Run


@pytest.fixture
def config(small: Collection, tmp_path: Path) -> BenchConfig:
    folder = write(small, tmp_path / "small")
    loop = DistillConfig(epochs=2, held_out=0.0, validate_on="none", learning_rate=0.01)
    return BenchConfig(
        collections=(str(folder),),
        teachers=("bm25",),
        students=("static", "tk"),
        objectives=("margin-mse", "kl"),
        seeds=(0, 1),
        depth=8,
        distill=loop,
    )


def test_the_table_says_what_the_cells_say_and_finished_cells_are_read_back(
    config: BenchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench(config, tmp_path / "out")
    assert [(row["student"], row["objective"]) for row in found["rows"]] == [
        (student, objective) for student in ("static", "tk") for objective in ("margin-mse", "kl")
    ]
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "results").glob("*.json")]
    trained = [cell for cell in cells if "after" in cell]
    assert len(trained) == 2 * 2 * 2
    for row in found["rows"]:
        assert row["teacher_value"] == row["bm25"], "the teacher is BM25 itself"
        assert row["queries"] == 6, "the other half of the twelve queries trains"
        assert row["seeds"] == 2
        if row["recovered"] is not None:
            expected = (row["after"] - row["before"]) / (row["teacher_value"] - row["before"])
            assert row["recovered"] == pytest.approx(expected, abs=0.02)
    values = sorted(round(float(np.mean([*cell["after"].values()])), 4) for cell in trained)
    assert np.mean(values) == pytest.approx(np.mean([row["after"] for row in found["rows"]]), abs=1e-3)
    assert {row["student"] for row in found["frontier"]} == {"static", "tk"}
    assert all(row["queries_per_second"] > 0 for row in found["frontier"])
    assert found["asked"] > 0
    run = Run.open(tmp_path / "out")
    assert {"objectives", "frontier"} <= set(run.tables()) <= {"objectives", "frontier", "cases-static", "cases-tk"}
    shown = {f"{name}-{kind}" for name in ("agreement", "margins") for kind in ("static", "tk")}
    figures = run.figures()
    assert set(figures) == {"recovered", "latency", "size", "cache", "seeds"} | shown
    assert figures["seeds"].series[0].x == [f"{kind} {name}" for kind in config.students for name in config.objectives
                                            for _ in config.seeds]  # fmt: skip
    (teacher,) = run.teachers()
    assert teacher["asked"] == found["asked"]
    assert teacher["from_cache"] > 0
    assert (run.folder / "report.html").is_file()

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr(bench_module, "distill", never)
    again = bench(config, tmp_path / "out")
    assert again["rows"] == found["rows"]
    assert again["asked"] == 0
    with pytest.raises(AssertionError, match="trained again"):
        bench(dataclasses.replace(config, seeds=(2,)), tmp_path / "out")


def test_what_cannot_be_compared_is_refused(config: BenchConfig) -> None:
    with pytest.raises(UsageError, match="named twice"):
        dataclasses.replace(config, seeds=(0, 0))
    with pytest.raises(UsageError, match="is unknown"):
        dataclasses.replace(config, objectives=("no-such",))
    with pytest.raises(UsageError, match="needs a collection"):
        dataclasses.replace(config, students=())
    with pytest.raises(UsageError, match="student 'lstm' is unknown; expected one of dot, "):
        dataclasses.replace(config, students=("lstm",))
    with pytest.raises(UsageError, match="student 'dot' needs starting weights"):
        dataclasses.replace(config, students=("dot",), init=None)
    with pytest.raises(UsageError, match="train_queries and test_queries of 1 or more; found 0, "):
        dataclasses.replace(config, depth=0)


def test_the_command_prints_one_object(config: BenchConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["ranking", "bench", "--collection", config.collections[0], "--teacher", "bm25", "--student", "static"]
    line += ["--objective", "margin-mse", "--epochs", "1", "--depth", "6", "--out", str(tmp_path / "b"), "--json"]
    assert command(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"rows", "frontier", "asked", "out"}
    assert found["rows"][0]["objective"] == "margin-mse"
    assert "p_first" not in found["rows"][0], "nothing to test it against"


def test_a_query_whose_vector_is_remembered_is_encoded_again_for_the_clock(small: Collection, tiny: str) -> None:
    scorer, lists = BiScorer(tiny), bm25_candidates(small, 5)
    scorer.score(small.pairs_of(lists))
    before = scorer.encoded
    found = cost_of(scorer, lists, small)
    assert scorer.encoded - before == min(QUERIES + 1, len(lists.lists))
    assert found["bytes_per_document"] == 4 * 32
    assert found["candidates"] <= 5
