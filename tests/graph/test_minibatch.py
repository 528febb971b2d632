"""Mini-batches against the exact losses: means over every possible batch, memory-mapped inputs, errors."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from structkd import graph
from structkd.errors import UsageError
from structkd.graph.data.task import chunks
from structkd.graph.losses import (
    difference_targets,
    high_frequency,
    low_frequency,
    neighbour_weights,
    node_weights,
    soft_targets,
)
from structkd.graph.methods.lesson import Lesson
from structkd.graph.methods.minibatch import (
    BATCHED,
    Batches,
    high_of_batch,
    low_of_batch,
    streamed_targets,
    teach_in_batches,
)
from structkd.graph.methods.table import METHODS
from structkd.graph.spectral import low_pass, propagated, propagation

DATASET = "sbm:nodes=400,classes=3,degree=6,signal=0.7"
STUDENT = graph.DistillConfig(hidden=32, epochs=40, dropout=0.0)


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load(DATASET)


@pytest.fixture(scope="module")
def logits(task) -> torch.Tensor:
    return 2 * torch.randn(task.num_nodes, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny() -> graph.GraphTask:
    """Nine nodes, one of them isolated."""
    edges = [[0, 1, 2, 3, 4, 5, 0, 1], [1, 2, 3, 4, 5, 6, 6, 7]]
    rows = [[0, 1], [2, 3], [4, 5, 6, 7, 8]]
    return graph.GraphTask.create(np.eye(9, 4) + 0.1, edges, [0, 1, 0, 1, 0, 1, 2, 2, 1], *rows)


@pytest.mark.parametrize("neighbours", [True, False])
def test_streamed_targets_are_the_exact_ones(task, logits, neighbours, monkeypatch):
    monkeypatch.setattr("structkd.graph.methods.minibatch.BLOCK", 37)  # several blocks, the last one short
    wide = logits.double()
    expected = soft_targets(wide, (neighbour_weights if neighbours else node_weights)(task))
    found = streamed_targets(task, wide, neighbours)
    torch.testing.assert_close(found.aggregated, expected.aggregated, atol=1e-15, rtol=1e-12)
    assert found.constant == pytest.approx(expected.constant, abs=1e-12)


def test_targets_may_lie_in_a_file(task, logits, tmp_path):
    expected = streamed_targets(task, logits)
    np.save(tmp_path / "logits.npy", logits.numpy())
    np.save(tmp_path / "x.npy", task.x.numpy())
    mapped = [torch.from_numpy(np.load(tmp_path / f"{name}.npy", mmap_mode="c")) for name in ("logits", "x")]
    out = np.lib.format.open_memmap(tmp_path / "targets.npy", "w+", np.float32, tuple(logits.shape))
    found = streamed_targets(task, mapped[0], out=torch.from_numpy(out))
    assert np.array_equal(np.load(tmp_path / "targets.npy"), expected.aggregated.numpy())
    assert found.constant == expected.constant
    config = replace(STUDENT, batch_nodes=64, epochs=3)
    in_memory = graph.distill(task, logits, config).student
    in_file = graph.distill(replace(task, x=mapped[1]), mapped[0], config).student
    assert torch.equal(in_memory(task.x), in_file(task.x))


@pytest.mark.parametrize("size", [1, 3])
def test_the_mean_over_all_node_batches_is_the_exact_low_term(tiny, size):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    exact = low_frequency(student, soft_targets(teacher, neighbour_weights(tiny)))
    targets = streamed_targets(tiny, teacher)
    batches = [torch.tensor(rows) for rows in combinations(range(9), size)]
    mean = torch.stack([low_of_batch(student[rows], rows, targets) for rows in batches]).mean()
    assert mean.item() == pytest.approx(exact.item(), abs=1e-12)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (exact, mean)]
    torch.testing.assert_close(*gradients, atol=1e-13, rtol=0)


def test_the_mean_over_all_edges_is_the_exact_high_term(tiny):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    exact = high_frequency(student, difference_targets(teacher, tiny.edge_index, 1.3))
    ends = [(student[i], student[j], teacher[i], teacher[j]) for i, j in tiny.edge_index.T[:, :, None]]
    mean = torch.stack([high_of_batch((a, b), (c, d), 1.3) for a, b, c, d in ends]).mean()
    assert mean.item() == pytest.approx(exact.item(), abs=1e-12)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (exact, mean)]
    torch.testing.assert_close(*gradients, atol=1e-13, rtol=0)


@pytest.mark.parametrize("method", list(BATCHED))
def test_one_batch_of_everything_is_the_full_loss(task, logits, method):
    """All nodes, all labels and every edge in one batch: the method's own loss, and its gradient."""
    config = replace(STUDENT, method=method, label_weight=0.3, batch_nodes=task.num_nodes).resolved(task)
    lesson = Lesson(task.observed, logits, config, 0)
    exact, ours = METHODS[method].teach(lesson), teach_in_batches(lesson)
    assert ours.steps == 1
    expected, batches = exact.loss_of(1), ours.loss_of
    assert isinstance(batches, Batches)
    edges = task.edge_index if batches.high is not None else torch.empty(2, 0, dtype=torch.int64)
    found = batches.loss(torch.arange(task.num_nodes), lesson.train_rows, (edges[0], edges[1]))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(found, list(ours.student.parameters())),
        torch.autograd.grad(expected, list(exact.student.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_an_epoch_holds_every_node_once_and_drawn_edges_are_uniform(task, logits, monkeypatch):
    config = replace(STUDENT, batch_nodes=60, batch_edges=500).resolved(task)
    batches = teach_in_batches(Lesson(task.observed, logits, config, 0)).loss_of
    assert isinstance(batches, Batches)
    seen, drawn = [], []
    kept = batches.loss

    def recorded(nodes, labels, edges):
        seen.append(nodes)
        drawn.append(edges)
        return kept(nodes, labels, edges)

    monkeypatch.setattr(batches, "loss", recorded)
    for epoch in (1, 2):
        for _ in range(batches.steps):
            batches(epoch)
    first, second = torch.cat(seen[: batches.steps]), torch.cat(seen[batches.steps :])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(task.num_nodes))
    assert not torch.equal(first, second)
    assert {len(nodes) for nodes in seen} == {57, 58}
    adjacency = task.adjacency.dense().bool()
    assert all(bool(adjacency[edges].all()) for edges in drawn)
    counts = torch.bincount(
        torch.cat([i * task.num_nodes + j for i, j in drawn]), minlength=task.num_nodes**2
    ).double()[(task.edge_index[0] * task.num_nodes + task.edge_index[1])]
    mean = counts.mean()
    statistic = float(((counts - mean) ** 2 / mean).sum())
    assert abs(statistic - len(counts)) < 5 * (2 * len(counts)) ** 0.5  # chi-square: mean k, variance 2k


def test_batches_of_one_seed_are_the_same(task, logits):
    config = replace(STUDENT, batch_nodes=64, epochs=3)
    one, two, three = (graph.distill(task, logits, config, seed).student(task.x) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_a_student_taught_in_batches_is_as_good(task):
    teacher = graph.train_teacher(task, graph.TeacherConfig(hidden=32, epochs=60)).logits(task)
    whole = graph.distill(task, teacher, replace(STUDENT, epochs=120))
    batched = graph.distill(task, teacher, replace(STUDENT, batch_nodes=100, batch_edges=300))
    plain = graph.distill(task, teacher, replace(STUDENT, method="mlp", batch_nodes=100))
    assert batched.metrics["test"] > whole.metrics["test"] - 0.03
    assert batched.metrics["test"] > plain.metrics["test"] + 0.02


def test_methods_without_a_batch_form_say_so(task, logits):
    with pytest.raises(UsageError, match="structkd has no mini-batch form; expected one of glnn, lfd"):
        graph.distill(task, logits, replace(STUDENT, method="structkd", batch_nodes=10))
    with pytest.raises(UsageError, match="batch_edges -1: expected 1 or more nodes, and edges 0 or more"):
        graph.distill(task, logits, replace(STUDENT, batch_nodes=10, batch_edges=-1))
    with pytest.raises(UsageError, match="0 nodes a batch: expected 1 or more"):
        chunks(3, 0)


@pytest.mark.parametrize("self_loops", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("normalisation", ["symmetric", "row"])
def test_propagation_without_a_matrix(tiny, self_loops, normalisation, monkeypatch):
    monkeypatch.setattr("structkd.graph.spectral._BLOCK", 4)
    signal = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = propagation(tiny, self_loops, normalisation)
    expected = matrix.with_values(matrix.values.double()).product(signal)
    found = propagated(tiny, signal, self_loops, normalisation)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    summed = propagated(tiny, signal, self_loops, "none")
    dense = tiny.adjacency.dense().double() + self_loops * torch.eye(9)
    torch.testing.assert_close(summed, dense @ signal)
    kept = low_pass(tiny, signal)
    monkeypatch.setattr("structkd.graph.spectral._LARGE", 0)
    torch.testing.assert_close(low_pass(tiny, signal), kept, atol=1e-7, rtol=1e-6)


def test_long_inputs_are_answered_block_by_block(task, logits, monkeypatch):
    student = graph.distill(task, logits, replace(STUDENT, epochs=2)).student
    whole = graph.distillation.predict(student, task.x)
    monkeypatch.setattr("structkd.graph.distillation.BLOCK", 33)
    torch.testing.assert_close(graph.distillation.predict(student, task.x), whole)
