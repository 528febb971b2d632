from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from structkd import graph
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.spectral import propagation
from structkd.graph.targets.committee import (
    CommitteeConfig,
    RandomPropagation,
    clamped,
    confident_answers,
    consistency,
    consult,
    pagerank,
)

SMALL = CommitteeConfig(members=1, rounds=3, member=replace(CommitteeConfig().member, epochs=80))


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load("sbm:nodes=300,classes=3,degree=6,signal=0.5")


def noise(task: graph.GraphTask, seed: int = 0) -> torch.Tensor:
    return torch.randn(task.num_nodes, task.classes, generator=torch.Generator().manual_seed(seed))


def accuracy(task: graph.GraphTask, answers: torch.Tensor) -> float:
    return float((answers.argmax(dim=1) == task.y)[task.test].double().mean())


def test_pagerank_is_the_closed_form(task):
    start = noise(task).softmax(dim=1)
    matrix = propagation(task).dense().numpy().astype(np.float64)
    exact = 0.2 * np.linalg.solve(np.eye(task.num_nodes) - 0.8 * matrix, start.numpy())
    np.testing.assert_allclose(pagerank(task, start, 0.2, steps=80).numpy(), exact, atol=1e-5)


def test_clamping_puts_training_labels_in_and_no_other(task):
    start = noise(task).softmax(dim=1)
    found = clamped(task, start)
    assert torch.equal(found[task.train], one_hot(task.y[task.train], 3).float())
    assert torch.equal(found[~task.train], start[~task.train])


def test_validation_nodes_are_never_trusted_and_the_share_is_kept(task):
    probabilities = noise(task, 1).softmax(dim=1)
    answers, trusted = confident_answers(task, probabilities, 0.5)
    assert not bool((trusted & task.valid).any())
    assert bool(trusted[task.train].all())
    assert torch.equal(answers[task.train].argmax(dim=1), task.y[task.train])
    free = ~task.train & ~task.valid
    for label in range(3):
        rows = free & (probabilities.argmax(dim=1) == label)
        assert int((trusted & rows).sum()) == int(0.5 * int(rows.sum()))
        confidence = probabilities.max(dim=1).values
        assert confidence[trusted & rows].min() >= confidence[rows & ~trusted].max()


def test_consistency_against_a_slow_reference():
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(dim=1) for _ in range(3)]
    mean = sum(draw.numpy() for draw in draws) / 3
    total = 0.0
    for draw in draws:
        for node in range(5):
            sharp = [mean[node, c] ** 2 / sum(mean[node, k] ** 2 for k in range(4)) for c in range(4)]
            total += sum((float(draw[node, c]) - sharp[c]) ** 2 for c in range(4))
    assert float(consistency(draws, 0.5)) == pytest.approx(total / 15, abs=1e-12)


def test_consistency_is_zero_for_equal_sure_draws_and_pulls_towards_the_mean_only():
    sure = one_hot(torch.tensor([0, 1, 2]), 3).double()
    assert float(consistency([sure, sure], 0.5)) == 0
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    fixed = torch.randn(4, 3, dtype=torch.float64).softmax(dim=1)
    torch.autograd.backward([consistency([logits.softmax(dim=1), fixed], 0.5)])
    assert logits.grad is not None
    target = ((logits.detach().softmax(dim=1) + fixed) / 2) ** 2
    target /= target.sum(dim=1, keepdim=True)
    own = logits.detach().clone().requires_grad_()
    torch.autograd.backward([(own.softmax(dim=1) - target).square().sum(dim=1).mean() / 2])
    torch.testing.assert_close(logits.grad, own.grad)  # the mean is a constant


def test_random_propagation_in_evaluation_is_the_closed_formula(task):
    torch.manual_seed(0)
    model = RandomPropagation(task.num_features, 8, 3).eval()
    matrix = propagation(task)
    x, dense = np.asarray(task.x, dtype=np.float64), matrix.dense().double().numpy()
    weight = model.first.weight.detach().double().numpy()
    out = x @ weight
    start = out
    for _ in range(model.steps):
        out = 0.9 * dense @ out + 0.1 * start
    hidden = np.maximum(out + model.bias.detach().double().numpy(), 0)
    last = model.last
    expected = hidden @ last.weight.detach().double().numpy() + last.bias.detach().double().numpy()
    np.testing.assert_allclose(model(task.x, matrix).detach().numpy(), expected, atol=1e-5)


def test_random_propagation_is_unbiased_before_the_hidden_layer(task):
    """Half of the rows hidden, the rest doubled: the mean over draws is the full propagation."""
    torch.manual_seed(0)
    ones = torch.ones(20_000, 1)
    doubled = torch.nn.functional.dropout(ones, 0.5)
    assert set(doubled.unique().tolist()) == {0.0, 2.0}
    assert float(doubled.mean()) == pytest.approx(1.0, abs=0.05)


def test_sparse_and_dense_features_give_equal_answers(task):
    torch.manual_seed(1)
    model = RandomPropagation(task.num_features, 8, 3).eval()
    graph_matrix = propagation(task)
    sparse = SparseMatrix.of(np.asarray(task.x))
    torch.testing.assert_close(model(sparse, graph_matrix), model(task.x, graph_matrix))


def test_later_rounds_learn_from_the_committees_own_answers(task):
    rounds = list(consult(task.observed, 0, SMALL))
    assert len(rounds) == 3
    for one in rounds:
        torch.testing.assert_close(one.sum(dim=1), torch.ones(task.num_nodes))
    assert accuracy(task, rounds[-1]) >= accuracy(task, rounds[0]) - 0.03
    assert accuracy(task, rounds[-1]) > 0.6


def test_the_same_seed_gives_the_same_answers_and_leaves_the_random_state(task):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (next(consult(task.observed, 4, SMALL)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(before, torch.get_rng_state())


def test_other_values_keep_a_known_transposed_pattern():
    generator = torch.Generator().manual_seed(0)
    dense = torch.where(torch.rand(6, 9, generator=generator) < 0.4, torch.rand(6, 9, generator=generator), 0.0)
    matrix = SparseMatrix.of(dense.numpy())
    torch.testing.assert_close(matrix.transposed.dense(), dense.T)
    other = matrix.with_values(matrix.values * 3)
    assert "_flipped" in other.__dict__
    torch.testing.assert_close(other.transposed.dense(), 3 * dense.T)
    again = SparseMatrix.of(dense.numpy()).with_values(matrix.values * 2)
    torch.testing.assert_close(again.transposed.dense(), 2 * dense.T)
