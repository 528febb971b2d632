import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from structkd import graph
from structkd.graph.spectral import propagation
from structkd.graph.targets import choose_target, clamped, confident_answers, pagerank, responses


@pytest.fixture(autouse=True)
def _small_committee(monkeypatch):
    targets = importlib.import_module("structkd.graph.targets")
    monkeypatch.setattr(targets, "MEMBERS", 1)
    monkeypatch.setattr(targets, "_MEMBER", replace(targets._MEMBER, epochs=60))


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load("sbm:nodes=300,classes=3,degree=6,signal=0.5")


def noise(task: graph.GraphTask, seed: int = 0) -> torch.Tensor:
    return torch.randn(task.num_nodes, task.classes, generator=torch.Generator().manual_seed(seed))


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


def test_identity_is_among_the_responses_and_rows_are_distributions(task):
    start = noise(task).softmax(dim=1)
    found = {target.name: target for target in responses(task, start, "teacher")}
    torch.testing.assert_close(found["teacher"].probabilities, start)
    for target in found.values():
        torch.testing.assert_close(target.probabilities.sum(dim=1), torch.ones(task.num_nodes))
        assert bool((target.probabilities >= 0).all())


def test_validation_nodes_are_never_trusted(task):
    answers, trusted = confident_answers(task, noise(task, 1).softmax(dim=1))
    assert not bool((trusted & task.valid).any())
    assert bool(trusted[task.train].all())
    assert torch.equal(answers[task.train].argmax(dim=1), task.y[task.train])
    assert int((trusted & ~task.train).sum()) > 0


def test_the_choice_uses_validation_alone(task):
    """Test labels are blank in the observed view; rewritten ones change nothing."""
    other = replace(task, y=torch.where(task.test, (task.y + 1) % 3, task.y))
    one, two = (choose_target(each.observed, noise(task), 0) for each in (task, other))
    assert one.name == two.name
    assert torch.equal(one.probabilities, two.probabilities)


def test_a_perfect_teacher_is_kept_on_a_heterophilous_graph():
    task = graph.load("sbm:nodes=300,classes=3,degree=6,homophily=0.05,signal=0.3")
    perfect = 20.0 * one_hot(task.y, 3).float()
    assert choose_target(task.observed, perfect, 0).name == "teacher"


def test_the_default_method_beats_plain_distillation_of_a_weak_teacher(task):
    teacher = graph.train_teacher(task, graph.TeacherConfig(hidden=32, epochs=5))
    logits = teacher.logits(task)
    plain, ours = (
        graph.distill(task, logits, graph.DistillConfig(method=method, hidden=64)) for method in ("glnn", "structkd")
    )
    assert ours.metrics["test"] > plain.metrics["test"]
    assert ours.input_class == "graph_free"
    assert ours.target != "teacher"
