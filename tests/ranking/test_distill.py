"""Distillation: the teacher is asked once, ever; objectives and transforms as written; scale trouble is said."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from structkd.errors import DataError, UsageError
from structkd.ids import Pairs
from structkd.objectives import kl, margin_mse
from structkd.ranking.data.collection import Collection
from structkd.ranking.distillation import (
    DistillConfig,
    distill,
    min_max,
    objective_of,
    parse_objective,
    resolve,
    scored_lists,
    transformed,
    validation_lists,
)
from structkd.ranking.models.encoders import BiScorer, StaticScorer, weights_sha256
from structkd.ranking.teachers.sources import Bm25Scorer, Combine, EnsembleScorer, RunScorer, open_teacher
from structkd.ranking.teachers.teacher import mean_ndcg
from structkd.ranking.training.train import batch_of, scored_grid
from structkd.scores import CachedScorer, StoredScorer, TeacherSpec, write_pairs
from structkd.trec import run_of, write_run

CONFIG = DistillConfig(epochs=6, batch_lists=4, list_size=8, learning_rate=1e-2, depth=20, held_out=0.2)


class Raising:
    """A teacher with the identity of another one, that must not be asked."""

    def __init__(self, spec: TeacherSpec) -> None:
        self.spec = spec

    def score(self, pairs: Pairs) -> torch.Tensor:
        raise AssertionError(f"the teacher was asked for {len(pairs)} pairs")


def static(collection: Collection) -> StaticScorer:
    return StaticScorer.fresh(collection.documents, dimension=24)


def test_the_student_learns_and_a_second_run_asks_the_teacher_for_nothing(small: Collection, tmp_path: Path) -> None:
    teacher = Bm25Scorer(small.documents)
    cached = CachedScorer(teacher, tmp_path / "cache")
    first = distill(static(small), cached, small, CONFIG, out=tmp_path / "one")
    assert cached.asked > 100
    losses = [row["loss"] for row in first.history if "loss" in row]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert first.metrics["best"]["measures"].keys() == first.metrics["before"].keys() == {"teacher nDCG@10"}
    silent = CachedScorer(Raising(teacher.spec), tmp_path / "cache")
    second = distill(static(small), silent, small, CONFIG, out=tmp_path / "two")
    assert silent.asked == 0
    assert second.history == first.history
    assert second.metrics["best"] == first.metrics["best"]
    model = SentenceTransformer(str(tmp_path / "one" / "student"), device="cpu")
    vectors = [model.encode([texts.texts[0]])[0] for texts in (small.queries, small.documents)]
    cosine = vectors[0] @ vectors[1] / np.prod([np.linalg.norm(vector) for vector in vectors])
    pair = Pairs(small.queries, small.documents, np.array([0]), np.array([0]))
    assert float(first.student.score(pair)[0]) == pytest.approx(float(cosine), abs=1e-5)


def test_a_finished_run_is_returned_and_other_settings_are_refused(
    small: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Bm25Scorer(small.documents)
    first = distill(static(small), teacher, small, CONFIG, out=tmp_path / "run")
    again = distill(static(small), teacher, small, CONFIG, out=tmp_path / "run")
    assert "finished already" in capsys.readouterr().err
    assert again.metrics == first.metrics
    assert again.config == first.config
    pairs = small.pairs(["q00", "q01"], ["d00", "d05"])
    torch.testing.assert_close(again.student.score(pairs), first.student.score(pairs))
    with pytest.raises(UsageError, match="other settings"):
        distill(static(small), teacher, small, replace(CONFIG, epochs=2), out=tmp_path / "run")


def test_stored_scores_bring_their_lists_and_unknown_queries_are_left_out(
    small: Collection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = ["q00", "q00", "q00", "q01", "q01", "elsewhere", "q02"]
    documents = ["d00", "d01", "d02", "d03", "d04", "d05", "d06"]
    store = write_pairs(tmp_path / "s", TeacherSpec(model="t"), queries, documents, np.arange(7, dtype=np.float32))
    lists = scored_lists(StoredScorer(store), small, CONFIG, None)
    assert small.queries.ids.strings(lists.query_rows.tolist()) == ["q00", "q01"]  # q02 has one document
    assert dict(zip(lists.pairs().document_ids, lists.targets.tolist(), strict=True)) == {
        f"d0{i}": float(i) for i in range(5)
    }
    assert "1 lists are of queries that are not in it" in capsys.readouterr().err
    other = write_pairs(tmp_path / "o", TeacherSpec(model="t"), ["x", "x"], ["d00", "d01"], np.ones(2, np.float32))
    with pytest.raises(DataError, match="none of 1 lists has two documents or more"):
        scored_lists(StoredScorer(other), small, CONFIG, None)
    wrong = write_pairs(tmp_path / "w", TeacherSpec(model="t"), ["q00", "q00"], ["d00", "zz"], np.ones(2, np.float32))
    with pytest.raises(DataError, match="'zz'"):
        scored_lists(StoredScorer(wrong), small, CONFIG, None)


def test_scale_trouble_is_said_and_margins_are_never_changed_silently(
    small: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = scored_lists(Bm25Scorer(small.documents), small, CONFIG, None)
    huge = replace(lists, targets=lists.targets * 1e5)
    student = static(small)
    margin = resolve(CONFIG, {"margin-mse": 1.0}, huge, student)
    assert margin.target_transform == "none"
    assert "scale trouble" in (said := capsys.readouterr().err)
    assert "--target-transform standardise" in said
    soft = resolve(CONFIG, {"kl": 1.0}, huge, student)
    assert soft.target_transform == "standardise"
    assert "chose standardise" in capsys.readouterr().err
    raw = replace(CONFIG, target_transform="none")  # asked for: kept, and what it means is said
    assert resolve(raw, {"kl": 1.0}, huge, student).target_transform == "none"
    assert "at temperature 1 their soft-max is nearly one-hot" in capsys.readouterr().err
    resolve(raw, {"kl": 1.0}, replace(lists, targets=lists.targets * 1e-5), student)
    assert "nearly flat" in capsys.readouterr().err
    resolve(replace(raw, temperature=2e4), {"kl": 1.0}, huge, student)  # a temperature that fits is silence
    assert capsys.readouterr().err == ""
    logits = replace(lists, targets=lists.targets * 5)
    plain = resolve(CONFIG, {"kl": 1.0}, logits, student)
    assert (plain.target_transform, plain.student_scale) == ("none", 20.0)
    assert capsys.readouterr().err == ""


def test_transforms_act_list_by_list(small: Collection) -> None:
    lists = scored_lists(Bm25Scorer(small.documents), small, CONFIG, None)
    found = {name: transformed(lists, name) for name in ("standardise", "min-max", "rank")}
    for low, high in zip(lists.offsets[:-1], lists.offsets[1:], strict=True):
        raw = lists.targets[low:high].astype(np.float64)
        np.testing.assert_allclose(
            found["standardise"].targets[low:high], (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5
        )
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        np.testing.assert_allclose(found["min-max"].targets[low:high], expected, rtol=1e-5, atol=1e-6)
        assert np.argmax(found["rank"].targets[low:high]) == np.argmax(raw)
    assert transformed(lists, "none") is lists
    assert min_max(torch.full((1, 3), 4.0)).tolist() == [[0.0, 0.0, 0.0]]


def test_a_weighted_sum_of_objectives_is_their_weighted_sum(small: Collection) -> None:
    lists = scored_lists(Bm25Scorer(small.documents), small, CONFIG, None)
    batch = batch_of(lists, [np.arange(0, 4), np.arange(20, 27)], [0, 1])
    config = replace(CONFIG, student_scale=3.0, temperature=2.0, student_temperature=0.5)
    student = static(small)
    scores = 3.0 * scored_grid(student, batch)
    expected = 0.5 * margin_mse(scores, batch.targets, mask=batch.mask, pairs="all") + 2 * kl(
        scores, batch.targets, mask=batch.mask, temperature=2.0, student_temperature=0.5
    )
    found = objective_of(parse_objective("margin-mse:0.5,kl:2"), config)(student, batch)
    torch.testing.assert_close(found, expected)


def test_margin_mse_of_a_batch_equals_a_slow_loop(small: Collection) -> None:
    lists = scored_lists(Bm25Scorer(small.documents), small, CONFIG, None)
    student = static(small).eval()
    batch = batch_of(lists, [np.arange(0, 4), np.arange(20, 22)], [0, 1])
    scores = student.score(batch.pairs).double().numpy()
    target = batch.targets[batch.mask].double().numpy()
    values = []
    for low, high in ((0, 4), (4, 6)):
        errors = [
            (20 * (scores[i] - scores[j]) - (target[i] - target[j])) ** 2
            for i in range(low, high)
            for j in range(low, high)
            if i != j
        ]
        values.append(np.mean(errors))
    config = replace(CONFIG, student_scale=20.0)
    assert float(objective_of({"margin-mse": 1.0}, config)(student, batch).detach()) == pytest.approx(
        np.mean(values), rel=1e-4
    )


def test_validation_by_teacher_and_by_judgements(small: Collection) -> None:
    lists = scored_lists(Bm25Scorer(small.documents), small, CONFIG, None)
    measure, valid = validation_lists(lists, small, CONFIG)
    assert measure == "teacher nDCG@10"
    assert mean_ndcg(Bm25Scorer(small.documents), valid) == pytest.approx(1.0)
    measure, judged = validation_lists(lists, small, replace(CONFIG, validate_on="qrels"))
    assert measure == "nDCG@10"
    assert sum(judged.targets) == sum(
        d in small.qrels[q] for q, d in zip(lists.pairs().query_ids, lists.pairs().document_ids, strict=True)
    )
    unjudged = replace(small, qrels={})
    with pytest.raises(DataError, match="no held-out query has a judged document"):
        validation_lists(lists, unjudged, replace(CONFIG, validate_on="qrels"))


@pytest.mark.parametrize(
    ("measured", "measured_as", "kept"), [("teacher", "teacher nDCG@10", 1), ("qrels", "nDCG@10", 0)]
)
def test_only_judgements_can_keep_the_start(
    small: Collection,
    monkeypatch: pytest.MonkeyPatch,
    measured: Literal["teacher", "qrels"],
    measured_as: str,
    kept: int,
) -> None:
    falling = iter(np.linspace(1, 0, 20))  # whatever the student learns, validation says that it was better before
    monkeypatch.setattr("structkd.ranking.distillation.mean_ndcg", lambda *_: float(next(falling)))
    student = static(small)
    before = weights_sha256(student)
    config = replace(CONFIG, epochs=2, validate_on=measured, validate_every=1)
    result = distill(student, Bm25Scorer(small.documents), small, config)
    assert result.metrics["best"]["step"] == kept
    assert result.metrics["before"] == {measured_as: 1.0}
    assert (weights_sha256(student) == before) is (kept == 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("mse", "'mse' in 'mse' is unknown"), ("kl,kl", "named twice"), ("kl:x", "positive number"), ("kl:-1", "'-1'")],
)
def test_objectives_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_objective(text)


def test_a_bert_student_distils_and_its_teacher_can_be_a_run_or_an_order(
    small: Collection, tiny: str, tmp_path: Path
) -> None:
    run = run_of(["q00"] * 5 + ["q01"] * 5, [f"d{i:02d}" for i in range(10)], np.array([5.0, 4, 3, 2, 1] * 2))
    write_run(tmp_path / "a.run", run)
    config = replace(CONFIG, objective="kl", epochs=1, held_out=0.5)
    result = distill(BiScorer(tiny), RunScorer(tmp_path / "a.run"), small, config, out=tmp_path / "out")
    assert result.metrics["steps"] == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is not None
    assert not (tmp_path / "out" / "checkpoint").exists()
    ordered = open_teacher(f"order:{tmp_path / 'a.run'}", small.documents)
    pairs = small.pairs_of(run)
    assert ordered.score(pairs).tolist() == [-1, -2, -3, -4, -5] * 2
    assert ordered.spec.fingerprint != RunScorer(tmp_path / "a.run").spec.fingerprint


def test_ensembles_combine_list_by_list(small: Collection) -> None:
    pairs = small.pairs(["q00"] * 4 + ["q01"] * 3, [f"d{i:02d}" for i in range(7)])
    members = [Bm25Scorer(small.documents), Bm25Scorer(small.documents, b=0.9)]
    raw = [member.score(pairs).double().numpy() for member in members]
    z = [
        np.concatenate([(part - part.mean()) / (part.std() or 1) for part in (values[:4], values[4:])])
        for values in raw
    ]
    np.testing.assert_allclose(EnsembleScorer(members).score(pairs).numpy(), np.mean(z, axis=0), atol=1e-4)
    np.testing.assert_allclose(EnsembleScorer(members, "mean").score(pairs).numpy(), np.mean(raw, axis=0), rtol=1e-5)
    np.testing.assert_allclose(EnsembleScorer(members, "median").score(pairs).numpy(), np.median(z, axis=0), atol=1e-4)
    sure = []
    for low, high in ((0, 4), (4, 7)):  # the teacher of lower entropy counts more, list by list
        p = [np.exp(one[low:high]) / np.exp(one[low:high]).sum() for one in z]
        weights = np.exp([(one * np.log(one)).sum() for one in p])
        sure.append(sum(w * one[low:high] for w, one in zip(weights / weights.sum(), z, strict=True)))
    found = EnsembleScorer(members, "confidence").score(pairs).numpy()
    np.testing.assert_allclose(found, np.concatenate(sure), atol=1e-4)
    assert len({EnsembleScorer(members, how).spec.fingerprint for how in get_args(Combine)}) == 5


@pytest.mark.parametrize("text", ["gpt", "run:", "bm25:x", "cross-encoder"])
def test_teachers_that_cannot_be_read(text: str, small: Collection) -> None:
    with pytest.raises(UsageError, match=r"expected cross-encoder:MODEL"):
        open_teacher(text, small.documents)


def test_the_learning_rate_suits_the_student_unless_one_is_given(small: Collection) -> None:
    rates = {}
    for asked in (0.0, 0.002):
        config = replace(CONFIG, learning_rate=asked, max_steps=1)
        rates[asked] = distill(static(small), Bm25Scorer(small.documents), small, config).config.learning_rate
    assert rates == {0.0: 0.03, 0.002: 0.002}


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"student_temperature": -1.0}, {"student_scale": -2.0}])
def test_scales_that_make_no_sense_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"expected temperature > 0, .*; found .*(0\.0|-\d\.0)"):
        DistillConfig(**setting)
