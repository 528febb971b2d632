"""In-batch terms against loops; topic-wise balanced batches; a live teacher that is asked once and writes back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd.errors import DataError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.collection import Collection
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.static import StaticScorer
from structkd.ranking.training.in_batch import allowed, in_batch_margin_mse, tas_balanced, tct
from structkd.ranking.training.live import InBatchLoss, LiveConfig, RememberingScorer, cached_live, topic_plan
from structkd.ranking.training.topics import TopicPlan, balanced, topics_of, with_pairs
from structkd.ranking.training.train import FitConfig, Lists, batch_of, fit, lists_of
from structkd.scores.cache import CachedScorer
from structkd.scores.store import open as open_store

TAS = LiveConfig(in_batch="tas-balanced")


def grids(size: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, 2 * size, dtype=torch.float64, generator=generator) for _ in range(2))


def off_diagonal(size: int) -> torch.Tensor:
    """False at each query's own pair; columns are positive, negative, positive, ..."""
    mask = torch.ones(size, 2 * size, dtype=torch.bool)
    for row in range(size):
        mask[row, 2 * row] = mask[row, 2 * row + 1] = False
    return mask


def test_tas_balanced_is_the_papers_formula() -> None:
    size, (student, teacher) = 4, grids()
    targets = torch.randn(size, 2, dtype=torch.float64)
    own, negative = torch.arange(0, 8, 2), torch.arange(1, 8, 2)
    pair = sum(
        float((student[i, 2 * i] - student[i, 2 * i + 1]) - (targets[i, 0] - targets[i, 1])) ** 2 for i in range(size)
    )
    terms = {0: 0.0, 1: 0.0}
    for i in range(size):
        for j in range(size):
            for side in (0, 1):
                if i != j:
                    s = float(student[i, 2 * i] - student[i, 2 * j + side])
                    t = float(teacher[i, 2 * i] - teacher[i, 2 * j + side])
                    terms[side] += (s - t) ** 2 / (size * (size - 1))
    expected = pair / size + 0.75 * (terms[0] + terms[1]) / 2
    found = tas_balanced(student, teacher, targets, own, negative, off_diagonal(size))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: tas_balanced(s, teacher, targets, own, negative, off_diagonal(size)), student.requires_grad_()
    )


def test_in_batch_terms_ignore_what_is_masked_and_a_constant_per_query() -> None:
    size, (student, teacher) = 4, grids(seed=1)
    own, mask = torch.arange(0, 8, 2), off_diagonal(4)
    mask[1, 6] = False
    value = in_batch_margin_mse(student, teacher, own, mask, own)
    other = torch.where(mask | (torch.arange(8)[None] == own[:, None]), teacher, 1e6)
    assert in_batch_margin_mse(student, other, own, mask, own) == value
    shifted = teacher + torch.randn(size, 1, dtype=torch.float64)
    torch.testing.assert_close(in_batch_margin_mse(student, shifted, own, mask, own), value)
    torch.testing.assert_close(in_batch_margin_mse(teacher, teacher, own, mask, own), torch.tensor(0.0).double())
    nothing = student.clone().requires_grad_()
    in_batch_margin_mse(nothing, teacher, own, torch.zeros_like(mask), own).backward()
    assert nothing.grad is not None
    assert not nothing.grad.any()


def test_tct_is_the_papers_formula() -> None:
    student, teacher = grids(seed=2)
    own, mask = torch.arange(0, 8, 2), off_diagonal(4)
    mask[0, 4] = False
    total = 0.0
    for row in range(4):
        columns = [c for c in range(8) if mask[row, c] or c == 2 * row]
        q = torch.softmax(teacher[row, columns] / 0.25, 0)
        log_p = torch.log_softmax(student[row, columns], 0)
        kl = sum(float(a * (torch.log(a) - b)) for a, b in zip(q, log_p, strict=True))
        total += -0.1 * float(log_p[columns.index(2 * row)]) + 0.9 * kl
    assert float(tct(student, teacher, own, mask)) == pytest.approx(total / 4, rel=1e-10)
    scores = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: tct(s, teacher, own, mask), scores)
    tct(scores, teacher, own, mask).backward()
    assert scores.grad is not None
    assert scores.grad[0, 4] == 0


def test_false_negatives_are_masked_by_id_text_and_judgement() -> None:
    texts = ["the answer", "The  answer.", "judged too", "free", "free", "other"]
    documents = Texts(Ids(["d0", "d1", "d2", "d3", "d4", "d5"]), texts)
    queries = Texts(Ids(["q", "r"]), ["one", "two"])
    collection = Collection("c", queries, documents, {"q": {"d0": 1, "d2": 1}, "r": {"d5": 1, "d3": 0}})
    pairs = Pairs(queries, documents, np.array([0, 1]), np.array([0, 5]))
    rows = np.array([0, 3, 5, 1, 2, 4])  # q: d0, d3; r: d5, d1; then d2 and d4, a copy of d3
    found = allowed(collection, pairs, np.array([0, 1]), rows, [(0, 1), (2, 3)])
    #               d0     d3     d5    d1     d2     d4
    expected = [[False, False, True, False, False, False], [False, True, False, False, True, False]]
    # for r, d0 and d1 read the same: its own negative d1 bans both
    assert found.tolist() == expected


@pytest.fixture
def lists(small: Collection) -> Lists:
    """Ten candidates for each of twelve queries, the relevant one among them, targets that differ."""
    generator = np.random.default_rng(4)
    rows = [(i, np.unique(np.r_[i, generator.integers(0, 40, 9)])) for i in range(12)]
    targets = generator.normal(size=sum(len(own) for _, own in rows)).astype(np.float32)
    return lists_of(small.queries, small.documents, rows, targets)


def plan_of(lists: Lists, small: Collection, batch: int = 3, topics: int = 3) -> TopicPlan:
    held, positive = with_pairs(lists, small)
    return TopicPlan(held, batch, 16, 7, topics=np.arange(len(held)) % topics, positive=positive)


def test_batches_hold_one_topic_and_every_query_once(lists: Lists, small: Collection) -> None:
    plan = plan_of(lists, small)
    for epoch in range(3):
        batches = plan.epoch(epoch)
        assert sorted(row for batch in batches for row, _ in batch) == list(range(12))
        full = [batch for batch in batches if len({plan.topics[row] for row, _ in batch}) == 1]
        assert len(full) >= 3  # four queries to a topic: one batch of three each, and what is left
        for batch in batches:
            for row, (first, second) in batch:
                assert plan.positive[first]
                assert not plan.positive[second]
                assert lists.offsets[row] <= min(first, second) <= max(first, second) < lists.offsets[row + 1]
    assert repr(plan.epoch(0)) == repr(plan.epoch(0)) != repr(plan.epoch(1))


def test_pairs_are_balanced_over_margin_bins() -> None:
    margins = np.r_[np.zeros(97), 5.0, 10.0]  # ten bins, three of them with margins
    generator = np.random.default_rng(0)
    drawn = np.bincount([balanced(margins, 10, generator) for _ in range(3000)], minlength=99)
    for share in (drawn[:97].sum(), drawn[97], drawn[98]):
        assert 900 < share < 1100
    assert drawn[:97].min() > 0


@pytest.mark.parametrize("margins", [[2.0], [1.5] * 7, [0.1 + 0.2, 0.3, 0.3], list(np.arange(11) * 0.1), [3e38, -3e38]])
def test_equal_margins_and_rounding_never_crash(margins: list[float]) -> None:
    generator = np.random.default_rng(1)
    drawn = {balanced(np.asarray(margins), 10, generator) for _ in range(300)}
    assert drawn <= set(range(len(margins)))
    assert len(drawn) == len(margins)


def test_a_query_with_one_pair_is_kept_and_one_without_is_left_out(
    small: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(0, np.array([0, 5])), (1, np.array([1])), (2, np.array([7, 8, 9]))]
    lists = lists_of(small.queries, small.documents, rows, np.asarray([1, 2, 3, 4, 6, 5], dtype=np.float32))
    held, positive = with_pairs(lists, small)
    assert held.query_rows.tolist() == [0, 2]
    assert positive.tolist() == [True, False, False, True, False]  # unjudged: the teacher's best
    assert "1 lists without a pair" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of 1 lists has a positive and another document"):
        with_pairs(lists.take([1]), small)


def test_topics_find_clusters_and_depend_on_the_seed_alone() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(4, 6) * 5
    truth = np.repeat(np.arange(4), 25)
    points = (centres[truth] + generator.normal(size=(100, 6)) * 0.3).astype(np.float32)
    found = [len(set(zip(topics_of(points, 4, seed).tolist(), truth.tolist(), strict=True))) for seed in range(5)]
    assert min(found) == 4  # some starts lie in four clusters; k-means has local optima
    assert (topics_of(points, 7, 3) == topics_of(points, 7, 3)).all()
    assert len(np.unique(topics_of(points, 7, 3))) == 7
    assert topics_of(points[:2], 50).tolist() in ([0, 1], [1, 0])
    assert (topics_of(np.ones((5, 3), dtype=np.float32), 2) >= 0).all()


def test_a_live_teacher_is_asked_once_encodes_once_and_writes_back(tiny: str, pairs: Pairs, tmp_path: Path) -> None:
    model = MultiVectorScorer(tiny)
    expected = model.score(pairs)
    teacher = cached_live(model, tmp_path / "live")
    inner = teacher.scorer
    assert isinstance(inner, RememberingScorer)
    torch.testing.assert_close(teacher.score(pairs), expected, rtol=1e-4, atol=1e-5)
    texts = len(set(pairs.query_texts)) + len(set(pairs.document_texts))
    assert inner.encoded == texts
    left, right = np.unique(pairs.query_rows), np.unique(pairs.document_rows)
    grid = Pairs(pairs.queries, pairs.documents, np.repeat(left, len(right)), np.tile(right, len(left)))
    teacher.score(grid)
    assert inner.encoded == texts  # new pairs of known texts: products alone
    asked = teacher.asked
    torch.testing.assert_close(teacher.score(pairs), expected, rtol=1e-4, atol=1e-5)
    assert teacher.asked == asked
    store = open_store(tmp_path / "live")
    np.testing.assert_allclose(
        store.lookup(pairs.query_ids, pairs.document_ids), expected.numpy(), rtol=1e-4, atol=1e-5
    )
    small_memory = RememberingScorer(model, capacity=3)
    torch.testing.assert_close(small_memory.score(pairs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tas-balanced", "tct"])
def test_a_student_learns_the_live_teachers_grid(
    kind: str, tiny: str, small: Collection, lists: Lists, tmp_path: Path
) -> None:
    teacher_model = BiScorer(tiny, name="teacher")
    live = LiveConfig(in_batch=kind, topics=2, live_temperature=1.0)
    teacher = cached_live(teacher_model, tmp_path / "live")
    scored = replace(lists, targets=teacher.score(lists.pairs()).numpy())
    student = StaticScorer.fresh(small.documents, dimension=64)
    config = FitConfig(epochs=15, batch_lists=4, learning_rate=0.05)
    plan = topic_plan(scored, small, student, live, config)
    loss = InBatchLoss(teacher, small, live, scale=20.0)
    found = fit(student, plan.lists, loss, config, plan=plan)
    losses = [row["loss"] for row in found.history if "loss" in row]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert isinstance(teacher, CachedScorer)
    assert teacher.found > teacher.asked  # epochs after the first mostly read


def test_the_loss_is_that_of_the_whole_grid(tiny: str, small: Collection, lists: Lists) -> None:
    """The batch's students' scores, teacher's scores and masks end up in the right places."""
    student, teacher = BiScorer(tiny).eval(), BiScorer(tiny, document_length=5, name="other").eval()
    plan = plan_of(lists, small, batch=3)
    pieces = plan.epoch(0)[0]
    batch = batch_of(plan.lists, [items for _, items in pieces], [row for row, _ in pieces])
    found = InBatchLoss(teacher, small, TAS, scale=2.0)(student, batch)
    queries, documents = batch.pairs.query_rows[::2], batch.pairs.document_rows
    size = len(queries)

    def cell(scorer: BiScorer, row: int, column: int) -> float:
        one = Pairs(small.queries, small.documents, queries[[row]], documents[[column]])
        return float(scorer.score(one)[0])

    s = [[2 * cell(student, i, c) for c in range(2 * size)] for i in range(size)]
    t = [[cell(teacher, i, c) for c in range(2 * size)] for i in range(size)]
    own = [(2 * i, 2 * i + 1) for i in range(size)]
    held = allowed(small, batch.pairs, queries, documents, own)
    total = np.mean(
        [(s[i][2 * i] - s[i][2 * i + 1] - float(batch.targets[i, 0] - batch.targets[i, 1])) ** 2 for i in range(size)]
    )
    for side in (0, 1):
        values = [
            (s[i][2 * i] - s[i][c] - t[i][2 * i] + t[i][c]) ** 2
            for i in range(size) for c in range(side, 2 * size, 2) if held[i, c]
        ]  # fmt: skip
        total += 0.75 / 2 * np.mean(values)
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)


def test_wrong_settings_are_named(small: Collection, lists: Lists, tiny: str) -> None:
    with pytest.raises(UsageError, match="live_temperature > 0"):
        LiveConfig(live_temperature=0)
    with pytest.raises(UsageError, match="hard_share 2: expected a share"):
        LiveConfig(hard_share=2)
    with pytest.raises(UsageError, match="'none' is no loss"):
        InBatchLoss(BiScorer(tiny), small, LiveConfig())
    with pytest.raises(UsageError, match="rows of a positive and a negative"):
        fit(BiScorer(tiny), lists, InBatchLoss(BiScorer(tiny), small, TAS), FitConfig(epochs=1))
