"""Teaching from labels, mining negatives, filling a cache: losses against slow loops, no false negatives, resume."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from structkd.errors import DataError, TeacherMismatchError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import MineConfig, bm25_candidates, labelled_lists, mine
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.students import student
from structkd.ranking.teachers.sources import Bm25Scorer, EnsembleScorer, RunScorer, open_teacher
from structkd.ranking.teachers.teacher import TeacherConfig, mean_ndcg, ndcg_of, score_pairs, teach
from structkd.ranking.training.losses import LOSSES, listwise_labels, pointwise_labels, ranknet_labels
from structkd.ranking.training.train import lists_of
from structkd.scores.cache import CachedScorer
from structkd.trec import Run, run_of, write_run

SCORES = torch.tensor([[0.6, 0.8, -1.0, 50.0], [2.0, -3.0, 0.5, 1.0]], dtype=torch.float64)
LABELS = torch.tensor([[1.0, 0.0, 0.0, 3.0], [0.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def items(row: int) -> list[tuple[float, float]]:
    return [(float(s), float(y)) for s, y, m in zip(SCORES[row], LABELS[row], MASK[row], strict=True) if m]


def test_ranknet_is_the_mean_over_ordered_pairs() -> None:
    values = [math.log1p(math.exp(-(s - r))) for row in (0, 1) for s, y in items(row) for r, z in items(row) if y > z]
    assert float(ranknet_labels(SCORES, LABELS, MASK)) == pytest.approx(np.mean(values))
    # the published form: BCE-with-logits of s+ - s- against 1
    pair = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(-0.2), torch.tensor(1.0))
    one = ranknet_labels(torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(one, pair)
    assert float(one) == pytest.approx(0.7981389, abs=1e-6)


def test_pointwise_is_the_mean_binary_cross_entropy() -> None:
    values = []
    for s, y in items(0) + items(1):
        p = 1 / (1 + math.exp(-s))
        values.append(-math.log(p if y > 0 else 1 - p))
    assert float(pointwise_labels(SCORES, LABELS, MASK)) == pytest.approx(np.mean(values))


def test_listwise_is_the_cross_entropy_of_the_label_shares() -> None:
    values = []
    for row in (0, 1):
        total, log_sum = sum(y for _, y in items(row)), math.log(sum(math.exp(s) for s, _ in items(row)))
        values.append(-sum(y / total * (s - log_sum) for s, y in items(row)))
    assert float(listwise_labels(SCORES, LABELS, MASK)) == pytest.approx(np.mean(values))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_label_losses_have_checked_gradients_and_ignore_what_is_masked(name: str) -> None:
    loss = LOSSES[name]
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, LABELS, MASK), scores)
    loss(scores, LABELS, MASK).backward()
    assert scores.grad is not None
    assert scores.grad[0, 3] == 0
    other = torch.where(MASK, SCORES, -1e4)
    assert loss(other, LABELS, MASK) == loss(SCORES, LABELS, MASK)
    empty = torch.zeros(2, 3, requires_grad=True)
    loss(empty, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).backward()
    assert empty.grad is not None
    assert not empty.grad.any()


@pytest.fixture
def copies() -> Collection:
    """Query q judges d0; d1 is its copy, d2 and d3 are copies, d4 is empty, d5 is free, q is a document."""
    texts = ["Same text.", "same  text", "other", "Other.", "", "free", "the query itself"]
    ids = ["d0", "d1", "d2", "d3", "d4", "d5", "q"]
    return Collection("copies", Texts(Ids(["q", "r"]), ["a", "b"]), Texts(Ids(ids), texts), {"q": {"d0": 1, "d5": 0}})


def test_negatives_are_no_positive_no_copy_of_one_no_second_copy_and_never_padding(
    copies: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run({"q": (["d0", "d1", "d3", "d2", "d4", "q", "d5"], np.arange(7.0, 0, -1))})
    assert mine(copies, run, MineConfig(choice="top")) == {"q": ["d3", "d5"], "r": []}
    assert "2 of 2 queries have fewer than 16 negatives" in capsys.readouterr().err
    assert mine(copies, run, MineConfig(choice="top", skip=3))["q"] == ["d2", "d5"]
    assert mine(copies, run, MineConfig(choice="top", depth=3, per_query=1))["q"] == ["d3"]
    drawn = [tuple(mine(copies, run, MineConfig(seed=seed))["q"]) for seed in range(20)]
    assert set(drawn) == {("d3", "d5"), ("d5", "d3")}
    assert drawn == [tuple(mine(copies, run, MineConfig(seed=seed))["q"]) for seed in range(20)]
    with pytest.raises(UsageError, match="skip < depth"):
        mine(copies, run, MineConfig(skip=5, depth=5))


def test_each_positive_gets_a_list_and_a_query_without_one_gets_none(small: Collection) -> None:
    two = replace(small, qrels={"q00": {"d00": 2, "d03": 1, "elsewhere": 1}, "q01": {"d01": 0}})
    lists, labels = labelled_lists(two, {"q00": ["d05", "d06", "d07"], "q01": ["d08"]}, 2)
    found = [(query, two.documents.ids.strings(rows.tolist())) for query, rows in lists]
    assert found == [(0, ["d00", "d05", "d06"]), (0, ["d03", "d07", "d05"])]
    assert labels.tolist() == [2, 0, 0, 1, 0, 0]


def test_ndcg_equals_ir_measures_with_ties_broken_by_id(small: Collection) -> None:
    import ir_measures

    generator = np.random.default_rng(5)
    rows = [(q, np.sort(generator.permutation(40)[: 5 + q]).astype(np.int64)) for q in range(6)]
    total = sum(len(row) for _, row in rows)
    grades, scores = generator.integers(0, 4, total), generator.integers(0, 3, total).astype(np.float32)
    lists = lists_of(small.queries, small.documents, rows, grades.astype(np.float32))
    pairs = lists.pairs()
    keys = list(zip(pairs.query_ids, pairs.document_ids, strict=True))
    qrels = [ir_measures.Qrel(q, d, int(g)) for (q, d), g in zip(keys, grades, strict=True)]
    ranked = run_of(*map(list, zip(*keys, strict=True)), scores)
    run = [
        ir_measures.ScoredDoc(q, d, float(-i))
        for q, (documents, _) in ranked.lists.items()
        for i, d in enumerate(documents)
    ]
    expected = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
    assert ndcg_of(scores, lists) == pytest.approx(expected)


def test_bm25_scores_pairs_as_its_index_searches(small: Collection) -> None:
    run = bm25_candidates(small, 10)
    pairs = small.pairs_of(run)
    np.testing.assert_allclose(Bm25Scorer(small.documents).score(pairs).numpy(), run.pairs()[2], rtol=1e-6)
    with pytest.raises(UsageError, match="scores only documents of the collection"):
        Bm25Scorer(small.documents).score(Pairs(small.queries, small.queries, np.array([0]), np.array([0])))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_taught_teacher_knows_its_training_pairs_and_is_saved(
    loss: str, small: Collection, tiny: str, tmp_path: Path
) -> None:
    config = TeacherConfig(
        loss=loss, epochs=40, learning_rate=3e-3, negatives=2, max_length=48, held_out=0.2, valid_depth=5
    )
    result = teach(small, config, init=tiny, out=tmp_path / "t")
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert result.metrics["after"]["nDCG@10 held out"] >= result.metrics["before"]["nDCG@10 held out"]
    pairs = small.pairs(["q00", "q01"], ["d00", "d07"])
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    model = CrossEncoder(str(tmp_path / "t" / "teacher"), device="cpu")
    np.testing.assert_allclose(model.predict(texts), result.teacher.score(pairs).numpy(), rtol=1e-4, atol=1e-5)


def test_teaching_needs_judgements(small: Collection, tiny: str) -> None:
    with pytest.raises(DataError, match="no query has a judged document and a negative"):
        teach(replace(small, qrels={}), init=tiny)


def test_filling_a_cache_asks_for_misses_only_and_refuses_another_teacher(
    small: Collection, tiny: str, tmp_path: Path
) -> None:
    pairs = small.pairs_of(bm25_candidates(small, 6))
    first = score_pairs(Bm25Scorer(small.documents), pairs.take(slice(0, 30)), tmp_path / "s", unit_rows=8)
    assert (first.asked, first.found) == (30, 0)
    second = score_pairs(Bm25Scorer(small.documents), pairs, tmp_path / "s")
    assert (second.asked, second.found) == (len(pairs) - 30, 30)
    with pytest.raises(TeacherMismatchError):
        score_pairs(BiScorer(tiny), pairs, tmp_path / "s")


def test_a_run_that_lacks_pairs_says_which(small: Collection, tmp_path: Path) -> None:
    write_run(tmp_path / "a.run", run_of(["q00"], ["d00"], np.ones(1)))
    with pytest.raises(DataError, match=r"2 missing, for example \('q00', 'd01'\), \('q01', 'd00'\)"):
        RunScorer(tmp_path / "a.run").score(small.pairs(["q00", "q00", "q01"], ["d00", "d01", "d00"]))


def test_mean_ndcg_of_nothing_is_zero(small: Collection) -> None:
    assert mean_ndcg(Bm25Scorer(small.documents), lists_of(small.queries, small.documents, [])) == 0.0


def test_a_finished_training_is_returned_as_it_is_and_another_one_is_refused(
    tiny: str, small: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherConfig(epochs=1, negatives=1, max_length=32)
    first = teach(small, config, init=tiny, out=tmp_path / "t")
    monkeypatch.setattr("structkd.ranking.teachers.teacher.fit", lambda *_, **__: pytest.fail("trained again"))
    again = teach(small, config, init=tiny, out=tmp_path / "t")
    assert again.metrics == first.metrics
    assert again.history == first.history
    pairs = Pairs(small.queries, small.documents, np.arange(5), np.arange(5))
    torch.testing.assert_close(again.teacher.score(pairs), first.teacher.score(pairs))
    with pytest.raises(UsageError, match="holds a finished training with other settings"):
        teach(small, replace(config, loss="pointwise"), init=tiny, out=tmp_path / "t")


def test_any_starting_weights_can_be_taught(tiny: str, small: Collection, tmp_path: Path) -> None:
    """A plain body, a bi-encoder folder and a cross-encoder folder."""
    BiScorer(tiny).save(tmp_path / "bi")
    CrossScorer(tiny).save(tmp_path / "cat")
    for init in (tiny, tmp_path / "bi", tmp_path / "cat"):
        result = teach(small, TeacherConfig(epochs=1, max_steps=2, negatives=1, max_length=32), init=init)
        assert result.metrics["steps"] == 2


@pytest.mark.parametrize(
    "lines",
    [
        ["q0 Q0 b 1 0.1 t", "q0 Q0 a 2 0.9 t"],
        ["q0\tb\t1", "q0\ta\t2"],
        ['["q0", "b", "a"]'],
        ['{"query_id": "q0", "document_ids": ["b", "a"]}'],
    ],
)
def test_orders_of_every_form_are_teachers_by_rank_alone(lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "order"
    path.write_text("\n".join(lines) + "\n")
    texts = Texts(Ids(["q0"]), ["query"]), Texts(Ids(["a", "b"]), ["one", "two"])
    teacher = open_teacher(f"order:{path}", texts[1])
    assert teacher.score(Pairs(*texts, np.array([0, 0]), np.array([0, 1]))).tolist() == [-2.0, -1.0]


def test_an_order_that_names_a_document_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "order").write_text('["q0", "b", "a", "b"]\n')
    with pytest.raises(DataError, match="the order of query 'q0' names document 'b' twice"):
        RunScorer(tmp_path / "order", by_rank=True)


def test_students_and_multi_vector_models_are_teachers_by_name(tiny: str, small: Collection, tmp_path: Path) -> None:
    pairs = Pairs(small.queries, small.documents, np.arange(5), np.arange(5))
    for kind in ("colbert", "tk", "static", "dot", "cat"):
        scorer = student(kind, None if kind in ("tk", "static") else tiny, documents=small.documents)
        scorer.save(tmp_path / kind)
        teacher = open_teacher(f"model:{tmp_path / kind}", small.documents)
        torch.testing.assert_close(teacher.score(pairs), scorer.score(pairs), rtol=1e-4, atol=1e-5)
    assert isinstance(open_teacher(f"multi-vector:{tmp_path / 'colbert'}", small.documents), MultiVectorScorer)
    with pytest.raises(UsageError, match="is a dot model; name it as model:"):
        open_teacher(f"multi-vector:{tmp_path / 'dot'}", small.documents)


def test_t2_is_the_mean_of_raw_scores_and_asks_each_teacher_once(tiny: str, small: Collection, tmp_path: Path) -> None:
    members = [CachedScorer(CrossScorer(tiny, seed=seed), tmp_path / str(seed)) for seed in (0, 1, 2)]
    pairs = Pairs(small.queries, small.documents, np.arange(6), np.arange(6))
    expected = np.mean([CrossScorer(tiny, seed=seed).score(pairs).numpy() for seed in (0, 1, 2)], axis=0)
    for _ in range(2):
        found = EnsembleScorer(members, "mean").score(pairs)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert [member.asked for member in members] == [6, 6, 6]
