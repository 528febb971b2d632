import numpy as np
import pytest
import torch
from reference import graph_losses as slow
from torch.nn.functional import log_softmax

from structkd.errors import DataError, UsageError
from structkd.graph import losses
from structkd.graph.data.datasets import load
from structkd.graph.data.task import GraphTask


def task_of(edges: list[tuple[int, int]], nodes: int = 12) -> GraphTask:
    x = np.random.default_rng(0).normal(size=(nodes, 3)).astype(np.float32)
    y = np.arange(nodes) % 2
    index = np.asarray(edges, dtype=np.int64).reshape(-1, 2).T
    return GraphTask.create(x, index, y, [0, 1], [2, 3], [4, 5])


RING = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 7), (7, 8), (1, 8), (2, 2), (0, 1)]  # 5, 6, 9, 10, 11 isolated


@pytest.fixture
def graph() -> GraphTask:
    return task_of(RING)


def logits(nodes: int, classes: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(nodes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def directed(task: GraphTask) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in task.edge_index.T]


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    value = function(student)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def naive_low(student, teacher, task):
    loops = torch.arange(task.num_nodes)
    i, j = torch.cat([task.edge_index, torch.stack([loops, loops])], dim=1)
    wanted = log_softmax(teacher, dim=1)[j]
    return (wanted.exp() * (wanted - log_softmax(student, dim=1)[i])).sum(dim=1).mean()


def naive_high(student, teacher, task, temperature):
    i, j = task.edge_index
    wanted = log_softmax((teacher[i] - teacher[j]).abs() / temperature, dim=1)
    mine = log_softmax((student[i] - student[j]).abs() / temperature, dim=1)
    return (wanted.exp() * (wanted - mine)).sum(dim=1).mean()


def test_low_frequency_equals_the_published_edge_sum(graph):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    targets = losses.soft_targets(teacher, losses.neighbour_weights(graph))
    expected = slow.low_frequency(student.tolist(), teacher.tolist(), directed(graph), 12)
    assert float(losses.low_frequency(student, targets)) == pytest.approx(expected, abs=1e-12)


def test_identity_weights_are_glnn(graph):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    targets = losses.soft_targets(teacher, losses.node_weights(graph))
    expected = slow.node_divergence(student.tolist(), teacher.tolist())
    assert float(losses.low_frequency(student, targets)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_low_frequency_with_temperature(graph, temperature):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    targets = losses.soft_targets(teacher, losses.neighbour_weights(graph), temperature)
    expected = slow.low_frequency(student.tolist(), teacher.tolist(), directed(graph), 12, temperature)
    assert float(losses.low_frequency(student, targets)) == pytest.approx(expected, abs=1e-12)


def test_masked_edges_are_left_out(graph):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    keep = torch.arange(graph.edge_index.shape[1]) % 3 > 0
    targets = losses.soft_targets(teacher, losses.neighbour_weights(graph, keep))
    edges = [edge for edge, kept in zip(directed(graph), keep.tolist(), strict=True) if kept]
    expected = slow.low_frequency(student.tolist(), teacher.tolist(), edges, 12)
    assert float(losses.low_frequency(student, targets)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["recomputed", "kept"])
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_high_frequency_equals_the_published_edge_sum(graph, temperature, keep_bytes):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    targets = losses.difference_targets(teacher, graph.edge_index, temperature, keep_bytes)
    expected = slow.high_frequency(student.tolist(), teacher.tolist(), directed(graph), temperature)
    assert float(losses.high_frequency(student, targets)) == pytest.approx(expected, abs=1e-12)
    assert float(losses.high_frequency_torch(student, targets, chunk=3)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dataset", ["digits", "sbm:nodes=300,classes=5,degree=20"])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 28], ids=["recomputed", "kept"])
def test_value_and_gradient_equal_the_naive_gather(dataset, keep_bytes):
    task = load(dataset)
    student, teacher = logits(task.num_nodes, task.classes, 0), logits(task.num_nodes, task.classes, 1)
    low = losses.soft_targets(teacher, losses.neighbour_weights(task))
    high = losses.difference_targets(teacher, task.edge_index, 1.5, keep_bytes)
    for ours, naive in (
        (lambda s: losses.low_frequency(s, low), lambda s: naive_low(s, teacher, task)),
        (lambda s: losses.high_frequency(s, high), lambda s: naive_high(s, teacher, task, 1.5)),
        (lambda s: losses.high_frequency_torch(s, high, chunk=100), lambda s: naive_high(s, teacher, task, 1.5)),
    ):
        value, gradient = value_and_gradient(ours, student)
        wanted, wanted_gradient = value_and_gradient(naive, student)
        assert float(value) == pytest.approx(float(wanted), abs=1e-9)
        assert float((gradient - wanted_gradient).abs().max()) < 1e-9 * max(1.0, float(wanted_gradient.abs().max()))


def test_float32_follows_float64(graph):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        low = losses.soft_targets(teacher.to(dtype), losses.neighbour_weights(graph))
        high = losses.difference_targets(teacher.to(dtype), graph.edge_index, 1.5)
        value = losses.low_frequency(student.to(dtype), low) + losses.high_frequency(student.to(dtype), high)
        assert value.dtype == dtype
        expected = float(naive_low(student, teacher, graph) + naive_high(student, teacher, graph, 1.5))
        assert float(value) == pytest.approx(expected, rel=tolerance)


def test_gradcheck(graph):
    teacher = logits(12, 4, 1)
    low = losses.soft_targets(teacher, losses.neighbour_weights(graph))
    high = losses.difference_targets(teacher, graph.edge_index, 1.3)
    student = logits(12, 4, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.low_frequency(s, low), student)
    assert torch.autograd.gradcheck(lambda s: 3 * losses.high_frequency(s, high), student)


def test_renumbering_nodes_changes_nothing(graph):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    place = torch.argsort(order)
    other = task_of([(int(place[i]), int(place[j])) for i, j in directed(graph)])
    for one, two in ((graph, student), (other, student[order])):
        t = teacher if one is graph else teacher[order]
        low = losses.low_frequency(two, losses.soft_targets(t, losses.neighbour_weights(one)))
        high = losses.high_frequency(two, losses.difference_targets(t, one.edge_index, 1.5))
        if one is graph:
            first = float(low), float(high)
    assert (float(low), float(high)) == pytest.approx(first, abs=1e-13)


def test_shifting_a_row_of_logits_leaves_the_low_term(graph):
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    targets = losses.soft_targets(teacher, losses.neighbour_weights(graph))
    shifted = student + torch.arange(12, dtype=torch.float64)[:, None]
    assert float(losses.low_frequency(shifted, targets)) == pytest.approx(float(losses.low_frequency(student, targets)))


def test_a_student_equal_to_its_teacher_is_the_minimum(graph):
    teacher = logits(12, 4, 1)
    high = losses.difference_targets(teacher, graph.edge_index, 1.5)
    value, gradient = value_and_gradient(lambda s: losses.high_frequency(s, high), teacher)
    assert float(value) == pytest.approx(0, abs=1e-14)
    assert float(gradient.abs().max()) < 1e-14
    same = losses.soft_targets(teacher, losses.node_weights(graph))
    value, gradient = value_and_gradient(lambda s: losses.low_frequency(s, same), teacher)
    assert float(value) == pytest.approx(0, abs=1e-14)
    assert float(gradient.abs().max()) < 1e-14


def test_isolated_nodes_get_no_high_gradient(graph):
    high = losses.difference_targets(logits(12, 4, 1), graph.edge_index, 1.5)
    _, gradient = value_and_gradient(lambda s: losses.high_frequency(s, high), logits(12, 4, 0))
    assert torch.equal(gradient[[5, 6, 9, 10, 11]], torch.zeros(5, 4, dtype=torch.float64))
    assert bool((gradient[[0, 1, 2, 3, 4, 7, 8]].abs().sum(dim=1) > 0).all())


def test_no_edges_at_all():
    empty = task_of([])
    student, teacher = logits(12, 4, 0), logits(12, 4, 1)
    value, gradient = value_and_gradient(
        lambda s: losses.high_frequency(s, losses.difference_targets(teacher, empty.edge_index, 1.5)), student
    )
    assert float(value) == 0
    assert not bool(gradient.any())
    low = losses.low_frequency(student, losses.soft_targets(teacher, losses.neighbour_weights(empty)))
    assert float(low) == pytest.approx(slow.node_divergence(student.tolist(), teacher.tolist()))


def test_extreme_logits_stay_finite(graph):
    student = logits(12, 4, 0, scale=1e4)
    for dtype in (torch.float32, torch.float64):
        teacher = logits(12, 4, 1, scale=1e4).to(dtype)
        low = losses.soft_targets(teacher, losses.neighbour_weights(graph))
        high = losses.difference_targets(teacher, graph.edge_index, 1.0)
        for function in (lambda s, t=low: losses.low_frequency(s, t), lambda s, t=high: losses.high_frequency(s, t)):
            value, gradient = value_and_gradient(function, student.to(dtype))
            assert bool(torch.isfinite(value))
            assert bool(torch.isfinite(gradient).all())


def test_band_matching_is_the_relative_error_of_the_high_band(graph):
    from structkd.graph.spectral import band_agreement, high_pass, propagation

    student, teacher = logits(12, 4, 0).float(), logits(12, 4, 1).float()
    band = high_pass(graph, teacher.softmax(dim=1))
    value = losses.band_matching(student, band, propagation(graph))
    agreement = band_agreement(graph, student.softmax(dim=1), teacher.softmax(dim=1))
    assert float(value) == pytest.approx(agreement["error_high"] ** 2, rel=1e-5)
    assert float(losses.band_matching(teacher, band, propagation(graph))) == pytest.approx(0, abs=1e-10)


def test_errors(graph):
    teacher = logits(12, 4, 1)
    with pytest.raises(UsageError, match=r"temperature 0: expected a positive number"):
        losses.difference_targets(teacher, graph.edge_index, 0)
    one_way = graph.edge_index[:, graph.edge_index[0] < graph.edge_index[1]]
    with pytest.raises(DataError, match=r"expected both directions of each edge"):
        losses.difference_targets(teacher, one_way, 1.0)
    with pytest.raises(DataError, match=r"the inner sizes differ"):
        graph.adjacency.product(torch.ones(5, 2))
