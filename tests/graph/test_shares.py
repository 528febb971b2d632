import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from structkd import graph
from structkd.graph.targets.shares import (
    LEAST,
    RIDGE,
    drawn_by_class,
    normal,
    with_even_shares,
    with_explained_shares,
    with_own_shares,
)


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load("sbm:nodes=300,classes=3,degree=6,signal=0.5")


def even(task: graph.GraphTask, per_class: int = 5) -> graph.GraphTask:
    """The task with as many training nodes of each class, and as many validation nodes."""
    train, valid = torch.zeros_like(task.train), torch.zeros_like(task.train)
    for label in range(task.classes):
        rows = torch.nonzero(task.y == label).flatten()
        train[rows[:per_class]], valid[rows[per_class : 2 * per_class]] = True, True
    return replace(task, train=train, valid=valid, test=task.test & ~train & ~valid)


def guesses(task: graph.GraphTask) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(task.num_nodes, task.classes, generator=generator, dtype=torch.float64).softmax(dim=1)


def accuracy(task: graph.GraphTask, answers: torch.Tensor) -> float:
    return float((answers.argmax(dim=1) == task.y)[task.test].double().mean())


def test_only_a_training_set_with_equal_counts_was_drawn_by_class(task):
    same = even(task)
    assert drawn_by_class(same, same.train)
    more = same.train.clone()
    spare = torch.nonzero((task.y == 0) & ~same.train).flatten()
    more[spare[:1]] = True
    assert drawn_by_class(same, more)  # one more is rounding
    more[spare[:2]] = True
    uneven = replace(same, train=more)
    assert not drawn_by_class(same, more)
    assert with_own_shares(uneven, guesses(task)) is not None
    assert torch.equal(with_own_shares(uneven, guesses(task)), guesses(task))
    assert torch.equal(with_explained_shares(uneven, guesses(task)), guesses(task))


def shown_shares(task: graph.GraphTask, start: torch.Tensor) -> list[float]:
    """Mean answer over unlabelled nodes, node by node."""
    free = [i for i in range(task.num_nodes) if not task.train[i] and not task.valid[i]]
    return [sum(float(start[i, c]) for i in free) / len(free) for c in range(3)]


def with_shares(task: graph.GraphTask, start: torch.Tensor, shares: list[float]) -> np.ndarray:
    """p_i(c) w(c), rows normalised, entry by entry."""
    expected = np.array([[float(start[i, c]) * shares[c] for c in range(3)] for i in range(task.num_nodes)])
    return expected / expected.sum(axis=1, keepdims=True)


def explained(task: graph.GraphTask, start: torch.Tensor) -> np.ndarray:
    """Shares by scipy's least squares over the stacked system, sums taken node by node."""
    shown = np.array(shown_shares(task, start))
    held = {c: [i for i in range(task.num_nodes) if task.valid[i] and task.y[i] == c] for c in range(3)}
    answered, noise = np.zeros((3, 3)), 0.0
    for c, nodes in held.items():
        for k in range(3):
            values = [float(start[i, k]) for i in nodes]
            answered[k, c] = sum(values) / len(values)
            noise += shown[c] ** 2 * statistics.variance(values) / len(values)
    signal = ((shown - answered @ shown) ** 2).sum() - noise
    if signal <= 0:
        return shown
    ridge = max(noise / signal, RIDGE)
    left, right = np.vstack([answered, ridge**0.5 * np.eye(3)]), np.concatenate([shown, ridge**0.5 * shown])
    return np.maximum(lsq_linear(left, right).x, LEAST * shown)


@pytest.mark.parametrize("answers", ["guesses", "knowing", "one class denied", "alike"])
def test_shares_against_a_slow_reference(task, answers):
    same, start = even(task, 10), guesses(task)
    if answers == "alike":
        start = start[:1].expand(task.num_nodes, -1)
    elif answers != "guesses":
        start = normal(start + 2 * torch.nn.functional.one_hot(task.y, 3))
    if answers == "one class denied":  # unlabelled nodes hardly answer class 2, its validation nodes do
        free = ~(same.train | same.valid)
        start[free] = normal(start[free] * torch.tensor([1.0, 1.0, 1e-3]))
    shares = explained(same, start)
    shown = shown_shares(same, start)
    if answers == "alike":  # for every node: nothing is left to explain
        np.testing.assert_allclose(shares, shown, rtol=1e-9)
    assert np.isclose(shares[2], LEAST * shown[2]) == (answers == "one class denied")
    np.testing.assert_allclose(with_own_shares(same, start).numpy(), with_shares(same, start, shares), rtol=1e-9)
    expected = with_shares(same, start, shares / shown)
    np.testing.assert_allclose(with_explained_shares(same, start).numpy(), expected, rtol=1e-9)


def test_shares_are_those_of_the_answers_where_validation_lacks_a_class(task):
    same, start = even(task), guesses(task)
    lacking = replace(same, valid=same.valid & (same.y != 1))
    expected = with_shares(lacking, start, shown_shares(lacking, start))
    np.testing.assert_allclose(with_own_shares(lacking, start).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(with_explained_shares(lacking, start), start)


def test_shares_of_answers_that_take_one_class_for_another():
    """Answers that give a fifth of class 0 to class 1, alike in validation: the mean answer is .64, .36, the nodes
    .8, .2, and so are the shares but for the draw."""
    generator = np.random.default_rng(3)
    y = generator.choice(2, size=20000, p=[0.8, 0.2])
    answered = np.where((y == 0) & (generator.random(20000) < 0.2), 1, y)
    train, valid = np.zeros(20000, dtype=bool), np.zeros(20000, dtype=bool)
    for label in range(2):
        rows = np.flatnonzero(y == label)
        train[rows[:20]], valid[rows[20:1020]] = True, True
    task = graph.GraphTask.create(np.zeros((20000, 1)), np.array([[0], [1]]), y, train, valid, ~(train | valid))
    start = normal(torch.nn.functional.one_hot(torch.from_numpy(answered), 2).double() + 0.25)
    ratio = (with_own_shares(task, start) / start)[0]
    free = ~(train | valid)
    assert abs(float(ratio[0] / ratio.sum()) - (y[free] == 0).mean()) < 0.04


def test_even_shares_are_even_and_undo_a_constant_factor(task):
    same, start = even(task), guesses(task)
    free = ~(same.train | same.valid)
    found = with_even_shares(same, start)
    weights = 1 / start[free].mean(dim=0)
    for node in range(5):
        row = start[node] * weights
        torch.testing.assert_close(found[node], row / row.sum())
    uneven = replace(same, train=same.train | ((task.y == 0) & ~same.valid))
    assert torch.equal(with_even_shares(uneven, start), start)


def test_validation_nodes_drawn_at_random_compare_answers_as_they_are(task):
    same, start = even(task), guesses(task)
    more = same.valid | (torch.arange(task.num_nodes) == int(torch.nonzero(same.test).flatten()[0]))
    more |= same.test & (task.y == 0)
    assert torch.equal(with_even_shares(replace(same, valid=more, test=same.test & ~more), start), start)
    assert not torch.equal(with_even_shares(same, start), start)


def test_frequent_classes_are_found_where_the_training_set_hides_them():
    """Gaussian classes of shares .8, .1, .1 and the exact posterior under equal shares: the correction must win."""
    generator = np.random.default_rng(0)
    y = generator.choice(3, size=3000, p=[0.8, 0.1, 0.1])
    centres = np.array([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]])
    x = centres[y] + generator.normal(size=(3000, 2))
    likelihood = np.exp(-0.5 * ((x[:, None] - centres) ** 2).sum(axis=2))
    train = np.zeros(3000, dtype=bool)
    for label in range(3):
        train[np.flatnonzero(y == label)[:20]] = True
    valid = np.zeros(3000, dtype=bool)
    valid[-100:] = True
    task = graph.GraphTask.create(x, np.array([[0], [1]]), y, train, valid & ~train, ~(train | valid))
    start = normal(torch.from_numpy(likelihood))
    exact = normal(torch.from_numpy(likelihood * [0.8, 0.1, 0.1]))
    before, after, best = (accuracy(task, each) for each in (start, with_own_shares(task, start), exact))
    assert before + 0.08 < after <= best + 0.005
