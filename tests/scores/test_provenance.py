"""Who taught and what it cost: counts of caches, stores and ensembles, added up over calls on one folder."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from structkd import scores
from structkd.ids import Ids, Pairs, Texts
from structkd.runs import Run
from structkd.scores.provenance import cost_figure, keep_teachers, teacher_row, teacher_rows


class Teacher:
    spec = scores.TeacherSpec(model="models/small", head="score")

    def score(self, pairs: Pairs) -> torch.Tensor:
        return torch.arange(len(pairs), dtype=torch.float32)


def pairs() -> Pairs:
    queries = Texts(Ids(["q"]), ["a query"])
    documents = Texts(Ids(["d0", "d1", "d2"]), ["one", "two", "three"])
    return Pairs(queries, documents, np.zeros(3, dtype=np.int64), np.arange(3, dtype=np.int64))


def test_a_cache_says_what_it_asked_found_and_how_long_it_took(tmp_path: Path) -> None:
    cached = scores.CachedScorer(Teacher(), tmp_path / "store")
    cached.score(pairs())
    cached.score(pairs())
    (row,) = teacher_rows(cached)
    assert (row["model"], row["asked"], row["from_cache"], row["unit"]) == ("models/small", 3, 3, "pairs")
    assert row["fingerprint"] == Teacher.spec.fingerprint
    assert cached.seconds > 0
    stored = scores.StoredScorer(scores.open(tmp_path / "store"))
    stored.score(pairs())
    ensemble = SimpleNamespace(members=[cached, stored, Teacher()])
    assert [(one["asked"], one["from_cache"]) for one in teacher_rows(ensemble)] == [(3, 3), (0, 3), (0, 0)]


def test_calls_on_one_folder_add_up_and_time_saved_is_at_the_rate_that_was_paid(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "test")
    keep_teachers(run, [teacher_row(Teacher.spec, asked=4, found=2, seconds=2.0)])
    keep_teachers(Run.create(tmp_path, "test"), [teacher_row(Teacher.spec, found=6)])
    (row,) = run.teachers()
    assert (row["asked"], row["from_cache"], row["seconds_asked"]) == (4, 8, 2.0)
    assert row["seconds_saved"] == pytest.approx(8 * 2.0 / 4)
    figure = run.figures()["cache"]
    assert [series.y for series in figure.series] == [[4], [8]]
    assert figure.series[0].x == [f"small ({Teacher.spec.fingerprint[:6]})"]
    assert "2 s were spent in the teacher, about 4 s saved" in figure.note


def test_without_a_rate_nothing_is_said_of_time() -> None:
    row = teacher_row(Teacher.spec, found=6)
    assert "seconds_saved" not in row
    assert cost_figure([row]).note == ""
