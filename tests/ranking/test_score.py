"""Filling a cache by command: sources of pairs, budgets and policies, workers of one plan, Ray."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import scores
from structkd.acquisition import gains
from structkd.cli.app import run
from structkd.errors import DataError, TeacherMismatchError, UsageError
from structkd.ids import Pairs
from structkd.ranking.data.budget import BudgetConfig, judged, read_triples, union, within_budget
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.teachers.sources import open_teacher
from structkd.trec import Run, write_run


@pytest.fixture
def folder(small: Collection, tmp_path: Path) -> Path:
    """The small collection in BEIR layout, with a run and triples beside it."""
    target = tmp_path / "c"
    target.mkdir()
    for name, texts in (("corpus", small.documents), ("queries", small.queries)):
        lines = [json.dumps({"_id": i, "text": t}) for i, t in zip(texts.ids, texts.texts, strict=True)]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    judgements = "".join(f"{q}\t{d}\t{g}\n" for q, own in small.qrels.items() for d, g in own.items())
    (target / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    write_run(tmp_path / "a.run", bm25_candidates(small, 10))
    (tmp_path / "triples.tsv").write_text("q00\td00\td39\nq00\td00\td38\nq01\td01\td39\n")
    return target


def score(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> dict:
    line = ["ranking", "score", "--collection", folder, "--teacher", "bm25", *arguments, "--json"]
    status = run([str(part) for part in line])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_pairs_come_from_runs_triples_and_judgements_once(
    folder: Path, small: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    base = folder.parent
    only = score(capsys, folder, "--triples", base / "triples.tsv", "--out", base / "t")
    assert (only["pairs"], only["asked"], only["rows"]) == (5, 5, 5)
    flags = ("--candidates", base / "a.run", "--triples", base / "triples.tsv", "--qrels", "--out", base / "s")
    found = score(capsys, folder, *flags)
    listed = bm25_candidates(small, 10)
    want = {(q, d) for q, (own, _) in listed.lists.items() for d in own}
    want |= {("q00", "d00"), ("q00", "d39"), ("q00", "d38"), ("q01", "d01"), ("q01", "d39")}
    want |= {(q, d) for q, own in small.qrels.items() for d in own}
    assert found["pairs"] == found["rows"] == len(want)
    assert set(zip(*scores.open(base / "s").pairs()[:2], strict=True)) == want
    again = score(capsys, folder, *flags)
    assert (again["asked"], again["found"]) == (0, len(want))
    (base / "triples.tsv").write_text("q00\td00\td39\nq00\td00\n")
    with pytest.raises(DataError, match=r"triples\.tsv:2: found 2 columns, expected 3"):
        read_triples(base / "triples.tsv")


def test_a_run_keeps_its_first_score_in_a_union(small: Collection) -> None:
    one, two = Run({"q": (["a", "b"], np.array([3.0, 1.0]))}), Run({"q": (["b", "c"], np.array([9.0, 8.0]))})
    (own, values) = union([one, two]).lists["q"]
    assert (own, values.tolist()) == (["a", "b", "c"], [3.0, 1.0, 8.0])
    assert judged({"q": {"x": 0, "y": 2}}).lists["q"][0] == ["y", "x"]


@pytest.mark.parametrize("by", ["torchrun", "range"])
def test_workers_of_one_plan(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    base = folder.parent
    flags = ("--candidates", base / "a.run", "--out", base / "s", "--unit-rows", 20)
    whole = score(capsys, folder, *flags[:3], base / "alone")
    parts = []
    for rank in range(2):
        if by == "torchrun":
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            parts.append(score(capsys, folder, *flags))
        else:
            parts.append(score(capsys, folder, *flags, "--unit-range", ("0:3", "3:")[rank]))
    assert parts[0]["left"] > 0
    assert parts[1]["left"] == 0
    assert all(part["units"] for part in parts)
    assert parts[0]["asked"] + parts[1]["asked"] == parts[1]["rows"] == whole["rows"]
    one, two = scores.open(base / "alone"), scores.open(base / "s")
    queries, documents, values = one.pairs()
    np.testing.assert_array_equal(two.lookup(queries, documents), values)
    assert run([*map(str, ("ranking", "score", "--collection", folder, "--teacher", "bm25", *flags)),
                "--unit-range", "3"]) == 2  # fmt: skip
    assert "expected A:B" in capsys.readouterr().err


# budgets


def nothing(queries: list[str], documents: list[str]) -> np.ndarray:
    return np.zeros(len(queries), dtype=np.bool_)


def test_the_policy_chooses_whole_lists_within_the_budget(small: Collection) -> None:
    listed = bm25_candidates(small, 10)
    grid = np.stack([np.pad(found, (0, 10 - len(found))) for _, found in listed.lists.values()])
    mask = np.arange(10) < np.array([[len(found)] for _, found in listed.lists.values()])
    sizes = dict(zip(listed.lists, mask.sum(1).tolist(), strict=True))
    for policy, extra in (("random", {}), ("margin", {}), ("rad", {"teacher_accuracy": 0.8})):
        config = BudgetConfig(budget=45, policy=policy, seed=3, **extra)
        chosen = within_budget(listed, config, small, None, nothing)
        assert 35 < len(chosen) <= 45
        assert all(len(chosen.lists[name][0]) == sizes[name] for name in chosen.lists)
        if policy == "margin":
            best = np.argsort(-gains(grid, mask=mask), kind="stable")[: len(chosen.lists)]
            assert set(chosen.lists) == {list(listed.lists)[row] for row in best}
    share = within_budget(listed, BudgetConfig(budget=0.5), small, None, nothing)
    assert 0.4 * len(listed) < len(share) <= 0.5 * len(listed)
    assert within_budget(listed, BudgetConfig(), small, None, nothing) is listed


def test_a_students_margins_decide(small: Collection) -> None:
    listed = bm25_candidates(small, 5)
    close = sorted(listed.lists)[4]

    class Student:
        spec = scores.TeacherSpec("student")

        def score(self, pairs: Pairs) -> torch.Tensor:
            far = [10.0 * (i % 5) * (query != close) for i, query in enumerate(pairs.query_ids)]
            return torch.tensor(far)

    limit = len(listed.lists[close][0])
    chosen = within_budget(listed, BudgetConfig(budget=limit, policy="margin"), small, Student(), nothing)
    assert list(chosen.lists) == [close]


def test_stored_pairs_cost_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder.parent
    flags = ("--candidates", base / "a.run", "--out", base / "s")
    first = score(capsys, folder, *flags, "--budget", 40)
    second = score(capsys, folder, *flags, "--budget", 40, "--policy", "margin", "--student", "bm25")
    assert 30 < first["asked"] <= 40
    assert 30 < second["asked"] <= 40
    assert second["rows"] == first["rows"] + second["asked"]
    assert second["found"] == first["rows"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"budget": 0}, "expected a whole number"), ({"budget": 1.5}, "whole"), ({"policy": "rad"}, "teacher-accuracy")],
)
def test_wrong_budgets(wrong: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BudgetConfig(**wrong)


# Ray


def test_without_ray_its_extra_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "structkd.ranking.teachers.teacher_ray", raising=False)
    line = ["ranking", "score", "--collection", folder, "--teacher", "bm25", "--out", folder.parent / "r"]
    assert run([*map(str, line), "--ray-workers", "2"]) == 1
    assert "--ray-workers needs ray, which is not installed. Run: pip install" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_actors_fill_the_same_store(folder: Path, small: Collection) -> None:
    pytest.importorskip("ray", reason='needs the extra "ray"')
    from structkd.ranking.teachers.teacher_ray import produce_with_ray

    pairs = small.pairs_of(bm25_candidates(small, 10))
    opener = partial(open_teacher, "bm25", small.documents)
    target = folder.parent / "ray"
    cost = produce_with_ray(opener, pairs, target, workers=2, unit_rows=20)
    assert cost.left == 0
    assert cost.asked == cost.pairs == len(pairs)
    store = scores.open(target)
    np.testing.assert_array_equal(store.lookup(pairs.query_ids, pairs.document_ids), opener().score(pairs).numpy())
    again = produce_with_ray(opener, pairs, target, workers=2, unit_rows=20)
    assert (again.asked, again.found) == (0, len(pairs))


def test_bfloat16_is_another_teacher_with_nearly_the_same_scores(tiny: str, pairs: Pairs, small: Collection) -> None:
    full, half = CrossScorer(tiny, device="cpu"), CrossScorer(tiny, device="cpu", dtype="bfloat16")
    exact, rounded = full.score(pairs), half.score(pairs)
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().max()) < 0.05
    assert half.spec.dtype == "bfloat16"
    with pytest.raises(TeacherMismatchError, match="dtype: found 'bfloat16', expected 'float32'"):
        half.spec.require(full.spec, "store")
    with pytest.raises(UsageError, match="teacher 'bm25' has no compute dtype; bfloat16 is for cross-encoder:MODEL"):
        open_teacher("bm25", small.documents, "bfloat16")
