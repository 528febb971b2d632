from dataclasses import replace

import numpy as np
import pytest
import torch

from structkd import graph
from structkd.graph.targets.shares import drawn_by_class, normal, with_even_shares, with_own_shares


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


def test_shares_against_a_slow_reference(task):
    same, start = even(task), guesses(task)
    free = [i for i in range(task.num_nodes) if not same.train[i] and not same.valid[i]]
    shares = [sum(float(start[i, c]) for i in free) / len(free) for c in range(3)]
    expected = np.array([[float(start[i, c]) * shares[c] for c in range(3)] for i in range(task.num_nodes)])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(with_own_shares(same, start).numpy(), expected, rtol=1e-12)


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
