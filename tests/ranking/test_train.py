"""The loop: plans that see each pair once, exact resume after an interruption, padding that never matters."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from structkd.errors import DataError, UsageError
from structkd.files import write_text
from structkd.objectives import margin_mse
from structkd.ranking.data.collection import Collection
from structkd.ranking.models.encoders import BiScorer, StaticScorer, weights_sha256
from structkd.ranking.training.train import (
    Batch,
    FitConfig,
    Lists,
    Plan,
    batch_of,
    clear_checkpoint,
    fit,
    lists_of,
    plan_of,
    planned_steps,
    scored_grid,
)
from structkd.runs import Run

CONFIG = FitConfig(epochs=3, batch_lists=4, list_size=5, learning_rate=1e-3, checkpoint_every=2, seed=7)


def make_lists(collection: Collection) -> Lists:
    """12 lists of 2 to 13 documents with random targets."""
    generator = np.random.default_rng(3)
    rows = [(query, generator.permutation(40)[: 2 + query].astype(np.int64)) for query in range(12)]
    targets = generator.normal(size=sum(len(row) for _, row in rows)).astype(np.float32)
    return lists_of(collection.queries, collection.documents, rows, targets)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return margin_mse(scored_grid(model, batch), batch.targets, mask=batch.mask, pairs="all")


def test_each_epoch_sees_each_pair_once_and_epochs_differ(small: Collection) -> None:
    lists = make_lists(small)
    plan = Plan(lists, batch_lists=4, list_size=5, seed=7)
    for number in (0, 1):
        batches = plan.epoch(number)
        seen = Counter(int(item) for batch in batches for _, items in batch for item in items)
        assert seen == Counter(range(len(lists.targets)))
        assert max(len(items) for batch in batches for _, items in batch) <= 5
        assert all(len(batch) <= 4 for batch in batches)
        for owner, items in (piece for batch in batches for piece in batch):
            assert all(lists.offsets[owner] <= item < lists.offsets[owner + 1] for item in items)
    flat = [[items.tolist() for batch in plan.epoch(n) for _, items in batch] for n in (0, 1)]
    assert flat[0] != flat[1]
    assert flat[0] == [items.tolist() for batch in Plan(lists, 4, 5, 7).epoch(0) for _, items in batch]


def test_a_batch_holds_valid_pairs_only_and_its_grid_puts_them_back(small: Collection) -> None:
    lists = make_lists(small)
    items = [np.array([0, 1]), np.arange(2, 5)]
    batch = batch_of(lists, items, [0, 1])
    assert len(batch.pairs) == 5
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    np.testing.assert_array_equal(batch.targets[batch.mask].numpy(), lists.targets[:5])
    scores = torch.arange(1.0, 6.0, requires_grad=True)
    grid = batch.grid(scores)
    assert grid.tolist() == [[1, 2, 0], [3, 4, 5]]
    (grid * torch.tensor([[1.0, 1, 100], [1, 1, 1]])).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [1, 1, 1, 1, 1]


def test_a_list_costs_the_same_alone_and_padded_beside_longer_ones(small: Collection) -> None:
    lists = make_lists(small)
    student = StaticScorer.fresh(small.documents, dimension=16)
    spans = [np.arange(lists.offsets[i], lists.offsets[i + 1]) for i in (0, 11)]
    together = batch_of(lists, spans, [0, 11])
    alone = batch_of(lists, spans[:1], [0])
    values = margin_mse(
        scored_grid(student, together), together.targets, mask=together.mask, pairs="all", reduction="none"
    )
    torch.testing.assert_close(values[0], loss_of(student, alone))


def test_training_lowers_the_loss_and_counts_every_pair(small: Collection) -> None:
    lists = make_lists(small)
    student = StaticScorer.fresh(small.documents, dimension=32)
    result = fit(student, lists, loss_of, replace(CONFIG, epochs=20, learning_rate=1e-2))
    losses = [row["loss"] for row in result.history]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert result.steps == 20 * len(Plan(lists, 4, 5, 7).epoch(0))
    assert result.best_value is None
    assert result.pairs_per_second > 0


class Interrupt(Exception):
    pass


@pytest.mark.parametrize(("kind", "stop_at"), [("static", 1), ("static", 4), ("static", 9), ("dot", 5)])
def test_an_interrupted_run_ends_like_one_that_was_not(
    kind: str, stop_at: int, small: Collection, tiny: str, tmp_path: Path
) -> None:
    lists = make_lists(small)
    lists = lists.take(range(5)) if kind == "dot" else lists
    config = replace(CONFIG, batch_lists=2) if kind == "dot" else CONFIG

    def student() -> nn.Module:  # the tiny BERT has dropout: its masks must come back too
        return BiScorer(tiny) if kind == "dot" else StaticScorer.fresh(small.documents, dimension=16)

    def validate_by(model: nn.Module) -> float:
        return -float(loss_of(model.eval(), batch_of(lists, [np.arange(0, 2)], [0])).detach())

    whole, run = student(), Run.create(tmp_path / "whole", "test")
    expected = fit(whole, lists, loss_of, config, validate=lambda: validate_by(whole), run=run)
    assert expected.steps > stop_at

    broken, calls = student(), 0

    def loss_until(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > stop_at:
            raise Interrupt
        return loss_of(model, batch)

    cut = Run.create(tmp_path / "cut", "test")
    with pytest.raises(Interrupt):
        fit(broken, lists, loss_until, config, validate=lambda: validate_by(broken), run=cut)
    again, steps = student(), 0

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal steps
        steps += 1
        return loss_of(model, batch)

    cut = Run.create(tmp_path / "cut", "test")
    result = fit(again, lists, counted, config, validate=lambda: validate_by(again), run=cut)
    assert steps == expected.steps - stop_at // 2 * 2  # checkpoints at every second step
    assert result.history == expected.history
    assert (result.best_step, result.best_value) == (expected.best_step, expected.best_value)
    assert weights_sha256(again) == weights_sha256(whole)
    assert cut.metrics() == run.metrics()


def test_what_a_killed_write_left_goes_with_the_checkpoint(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "test")
    for name in ("checkpoint/.tmp-0123-state.pt", "checkpoint/state.pt", "tokens/ids.bin"):
        write_text(run.folder / name, "")
    clear_checkpoint(run)
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.toml", "run.json"]
    clear_checkpoint(run)  # nothing there


def test_a_checkpoint_of_other_settings_is_refused(small: Collection, tmp_path: Path) -> None:
    lists = make_lists(small)
    run = Run.create(tmp_path / "run", "test")
    fit(StaticScorer.fresh(small.documents, dimension=16), lists, loss_of, CONFIG, run=run)
    with pytest.raises(UsageError, match="holds the checkpoint of another training"):
        fit(StaticScorer.fresh(small.documents, dimension=16), lists, loss_of, replace(CONFIG, seed=8), run=run)


def test_the_best_weights_are_kept_and_patience_stops(small: Collection) -> None:
    lists = make_lists(small)
    student = StaticScorer.fresh(small.documents, dimension=16)
    before = weights_sha256(student)
    values = iter([1.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    hashes = []

    def validate() -> float:
        hashes.append(weights_sha256(student))
        return next(values)

    config = replace(CONFIG, validate_every=2, patience=2)
    result = fit(student, lists, loss_of, config, validate=validate)
    assert (result.best_step, result.best_value, result.steps) == (2, 5.0, 6)
    assert weights_sha256(student) == hashes[1] != before


def test_a_start_that_does_not_count_is_not_kept_however_good(small: Collection) -> None:
    lists, values = make_lists(small), iter([0.9, 0.1, 0.3, 0.2])
    student = StaticScorer.fresh(small.documents, dimension=8, seed=0)
    result = fit(student, lists, loss_of, CONFIG, validate=lambda: next(values), start_counts=False)
    assert [row["step"] for row in result.history if "valid" in row] == [0, 6, 12, 18]
    assert (result.best_step, result.best_value) == (12, 0.3)


def test_what_cannot_be_trained_is_refused(small: Collection) -> None:
    lists = make_lists(small)
    student = StaticScorer.fresh(small.documents, dimension=16)
    with pytest.raises(UsageError, match="no list to train on"):
        fit(student, lists.take([]), loss_of, CONFIG)
    for field, value in (("epochs", 0), ("list_size", 1), ("batch_lists", 0), ("warmup", 1.0), ("learning_rate", 0.0)):
        with pytest.raises(UsageError):
            fit(student, lists, loss_of, replace(CONFIG, **{field: value}))
    for field in ("max_steps", "batch_tokens", "validate_every", "patience", "weight_decay"):
        with pytest.raises(UsageError, match=f"{field} must not be negative, found -1"):
            fit(student, lists, loss_of, replace(CONFIG, **{field: -1}))
    with pytest.raises(DataError, match="the loss is nan at step 1"):
        fit(student, lists, lambda model, batch: loss_of(model, batch) * float("nan"), CONFIG)


def test_targets_that_are_no_numbers_are_refused_by_name(small: Collection) -> None:
    lists = make_lists(small)
    targets = lists.targets.copy()
    targets[3] = np.nan
    with pytest.raises(DataError, match=r"1 targets are not finite, for example query 'q01', document"):
        replace(lists, targets=targets)


def test_token_batches_hold_equal_shares_and_every_epoch_has_as_many(small: Collection) -> None:
    lists = make_lists(small)
    student = StaticScorer.fresh(small.documents, dimension=16)
    config = replace(CONFIG, batch_tokens=150)
    plan = plan_of(lists, config, student)
    sizes = student.lengths(lists.pairs())
    steps = round(sizes.sum() / 150)
    for number in range(4):
        batches = plan.epoch(number)
        assert len(batches) == steps == planned_steps(lists, config, plan) / config.epochs
        assert Counter(int(i) for batch in batches for _, items in batch for i in items) == Counter(range(len(sizes)))
        assert all(batches)
        longest = max(sizes[items].sum() for batch in batches for _, items in batch)
        for batch in batches:
            assert abs(sum(sizes[items].sum() for _, items in batch) - sizes.sum() / steps) <= 2 * longest
    assert [len(batch) for batch in plan.epoch(0)] != [len(batch) for batch in plan.epoch(1)]
    one_each = plan_of(lists, replace(config, batch_tokens=1), student).epoch(0)
    assert {len(batch) for batch in one_each} == {1}, "a list is never cut to fit"


def test_gradient_caching_trains_to_the_same_weights(small: Collection, tiny: str) -> None:
    lists, ends = make_lists(small).take(range(4)), {}
    for cached in (False, True):
        student = BiScorer(tiny)
        fit(student, lists, loss_of, replace(CONFIG, epochs=1, learning_rate=1e-4, gradient_cache=cached))
        ends[cached] = torch.cat([p.detach().flatten() for p in student.parameters()])
    torch.testing.assert_close(ends[True], ends[False], rtol=0, atol=1e-6)


def test_without_dropout_a_step_is_a_function_of_the_weights(small: Collection, tiny: str) -> None:
    """Two seeds draw other noise; a first loss that is the same, and that of evaluation, was drawn without any."""
    lists = make_lists(small).take([0, 1])
    batch = batch_of(lists, [np.arange(*lists.offsets[i : i + 2]) for i in (0, 1)], [0, 1])

    def first(dropout: bool, seed: int) -> float:
        config = replace(CONFIG, max_steps=1, seed=seed, dropout=dropout)
        return float(fit(BiScorer(tiny), lists, loss_of, config).history[0]["loss"])

    with torch.no_grad():
        still = float(loss_of(BiScorer(tiny).eval(), batch))
    assert first(False, 0) == pytest.approx(first(False, 1), rel=1e-6) == pytest.approx(still, rel=1e-5)
    assert abs(first(True, 0) - first(True, 1)) > 1e-4 * still


def test_bf16_on_the_cpu_trains_and_keeps_float32_weights(small: Collection, tiny: str) -> None:
    lists = make_lists(small).take(range(4))
    start = torch.cat([p.detach().flatten() for p in BiScorer(tiny).parameters()])
    first, moved = {}, {}
    for precision in ("no", "bf16"):
        student = BiScorer(tiny)
        # without dropout: the two precisions draw their noise in different places
        config = replace(CONFIG, epochs=2, learning_rate=1e-4, precision=precision, dropout=False)
        result = fit(student, lists, loss_of, config)
        first[precision] = result.history[0]["loss"]
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        moved[precision] = torch.cat([p.detach().flatten() for p in student.parameters()]) - start
    assert first["bf16"] != first["no"], "the forward pass ran in bfloat16"
    assert first["bf16"] == pytest.approx(first["no"], rel=0.1)
    assert torch.cosine_similarity(moved["bf16"], moved["no"], dim=0) > 0.7, "the steps go the same way"


def test_after_mixed_precision_the_student_answers_in_float32_again(
    small: Collection, tiny: str, tmp_path: Path
) -> None:
    """Training patches the forward pass; the student that is handed back must score as the one that is saved."""
    lists, student = make_lists(small), BiScorer(tiny)
    fit(student, lists, loss_of, replace(CONFIG, precision="bf16", max_steps=2))
    student.save(tmp_path / "saved")
    torch.testing.assert_close(student.score(lists.pairs()), BiScorer(tmp_path / "saved").score(lists.pairs()))
