from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from structkd import graph
from structkd.graph.data.inputs import of_one_scale
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.evaluate import metric_of, standard_error
from structkd.graph.spectral import band_agreement, high_pass
from structkd.graph.targets import estimate as targets
from structkd.graph.targets.committee import CommitteeConfig
from structkd.graph.targets.estimate import LIFTS, choose_target, responses, with_high_band
from structkd.graph.targets.views import ViewsConfig

VIEWS = ViewsConfig(
    members=1,
    readers=1,
    labelled=replace(ViewsConfig().labelled, epochs=60),
    features=replace(ViewsConfig().features, epochs=120),
    filtered=replace(ViewsConfig().filtered, epochs=120),
)
SMALL = CommitteeConfig(members=1, rounds=2, member=replace(CommitteeConfig().member, epochs=60))


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load("sbm:nodes=300,classes=3,degree=6,signal=0.5")


def noise(task: graph.GraphTask, seed: int = 0) -> torch.Tensor:
    return torch.randn(task.num_nodes, task.classes, generator=torch.Generator().manual_seed(seed))


def test_identity_is_among_the_responses_and_rows_are_distributions(task):
    start = noise(task).softmax(dim=1)
    found = {target.name: target for target in responses(task, start, "teacher")}
    torch.testing.assert_close(found["teacher"].probabilities, start)
    for target in found.values():
        torch.testing.assert_close(target.probabilities.sum(dim=1), torch.ones(task.num_nodes))
        assert bool((target.probabilities >= 0).all())


def test_the_choice_uses_validation_alone(task):
    """Test labels are blank in the observed view; rewritten ones change nothing."""
    other = replace(task, y=torch.where(task.test, (task.y + 1) % 3, task.y))
    one, two = (choose_target(each.observed, noise(task), 0, SMALL, view_config=VIEWS) for each in (task, other))
    assert one.name == two.name
    assert torch.equal(one.probabilities, two.probabilities)


def test_a_perfect_teacher_outlives_the_views_of_a_heterophilous_graph():
    task = graph.load("sbm:nodes=300,classes=3,degree=6,homophily=0.05,signal=0.3")
    perfect = 20.0 * one_hot(task.y, 3).float()
    found = choose_target(task.observed, perfect, 0, SMALL, view_config=VIEWS)
    assert metric_of(found.probabilities, task.y, task.test) > 0.97


def test_a_useless_teacher_is_left_out(task):
    assert choose_target(task.observed, noise(task), 0, SMALL, view_config=VIEWS).name == "views"


def test_sparse_features_are_the_committees(task):
    x = torch.as_tensor(task.x)
    sparse = replace(task, x=SparseMatrix.of(x.numpy()))
    assert choose_target(sparse.observed, noise(task), 0, SMALL, view_config=VIEWS).name == "committee"


@pytest.mark.parametrize("sparse", [True, False])
def test_features_written_in_another_unit_give_the_same_target(task, sparse):
    """Rows that were divided by their number of words left the committee knowing nothing (public Cora: .54)."""
    words = (torch.as_tensor(task.x) > 0.3).to(torch.float32)

    def found(x: torch.Tensor) -> targets.Target:
        held = replace(task, x=SparseMatrix.of(x.numpy()) if sparse else x)
        return choose_target(held.observed, noise(task), 0, SMALL, view_config=VIEWS)

    one, two = found(words), found(words / 32)
    assert (one.name, one.valid) == (two.name, two.valid)
    assert torch.equal(one.probabilities, two.probabilities)


def test_features_that_are_all_nought_have_no_scale(task):
    empty = replace(task, x=torch.zeros(task.num_nodes, 4))
    assert of_one_scale(empty) is empty


def test_features_that_correct_the_first_round_replace_the_committee(monkeypatch):
    """A quarter of its answers wrong, whatever the features say; later rounds are not even asked."""
    task = graph.load("sbm:nodes=1500,classes=3,degree=4,homophily=0.5,signal=1")
    sparse = replace(task, x=SparseMatrix.of(np.asarray(task.x)))
    wrong = torch.rand(task.num_nodes, generator=torch.Generator().manual_seed(0)) < 1 / 4
    first = 0.8 * one_hot(torch.where(wrong, (task.y + 1) % 3, task.y), 3).float() + 0.2 / 3

    def consult(*_):
        yield first
        raise AssertionError("a second round")

    monkeypatch.setattr(targets, "consult", consult)
    found = choose_target(sparse.observed, noise(task), 0, SMALL, view_config=VIEWS)
    assert found.name == "features' view of the committee"
    before, after = (metric_of(each, task.y, task.test) for each in (first, found.probabilities))
    assert after > before + 0.05


def correlated(task: graph.GraphTask) -> tuple[torch.Tensor, torch.Tensor]:
    """An estimate and a teacher that err apart."""
    truth = 2.0 * one_hot(task.y, 3).float()
    return (truth + noise(task, 1)).softmax(dim=1), (truth + 2 * noise(task, 2)).softmax(dim=1)


def test_the_high_band_moves_to_the_teacher_and_no_further_than_asked(task):
    estimate, teacher = correlated(task)
    free = replace(task, y=teacher.argmax(dim=1))  # validation that agrees with the teacher never objects
    found = with_high_band(free, estimate, teacher, 1.0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(task.num_nodes))
    before, after = (band_agreement(task, each, teacher) for each in (estimate, found))
    assert after["cos_high"] > before["cos_high"] + 0.05
    last = estimate + LIFTS[-1] * high_pass(task, teacher - estimate)
    np.testing.assert_allclose(found, last.clamp_min(1e-4) / last.clamp_min(1e-4).sum(dim=1, keepdim=True), atol=1e-6)
    near = 0.95 * teacher + 0.05 * estimate
    assert band_agreement(task, near, teacher)["cos_high"] > 0.9
    torch.testing.assert_close(with_high_band(free, near, teacher, 0.9), near)
    torch.testing.assert_close(with_high_band(free, estimate, teacher, 0.0), estimate)  # the default: left alone


def test_a_lift_that_validation_counts_against_is_not_taken(task):
    estimate, teacher = correlated(task)
    against = replace(task, y=estimate.argmax(dim=1))  # the estimate is perfect: every change of an answer is a loss
    found = with_high_band(against, estimate, teacher, 1.0)
    assert metric_of(found.log(), against.y, against.valid) == 1.0


def test_standard_error_agrees_with_the_paired_formula(task):
    """Accuracy difference of two guesses: sqrt(var(correct - correct') / n)."""
    seen = task.observed
    first, second = noise(task, 1), noise(task, 2)
    right = [(t.argmax(dim=1)[seen.valid] == seen.y[seen.valid]).double().numpy() for t in (first, second)]
    exact = np.sqrt(np.var(right[0] - right[1]) / len(right[0]))
    assert standard_error(seen, first, second, 0) == pytest.approx(exact, rel=0.25)
    assert standard_error(seen, first, first, 0) == 0


def test_standard_error_of_a_ranking_metric_skips_resamples_of_one_class():
    task = graph.load("sbm:nodes=300,classes=2,degree=4")
    rare = torch.zeros_like(task.y)
    rare[torch.nonzero(task.valid).flatten()[0]] = 1
    seen = replace(task, y=rare, metric="roc_auc")
    assert np.isfinite(standard_error(seen, noise(task, 1), noise(task, 2), 0))
    assert np.isfinite(metric_of(noise(task, 1), seen.y, seen.valid, seen.metric))


def test_the_default_method_beats_plain_distillation_of_a_weak_teacher(task):
    teacher = graph.train_teacher(task, graph.TeacherConfig(hidden=32, epochs=5))
    logits = teacher.logits(task)
    plain, ours = (
        graph.distill(task, logits, graph.DistillConfig(method=method, hidden=64)) for method in ("glnn", "structkd")
    )
    assert ours.metrics["test"] > plain.metrics["test"]
    assert ours.input_class == "graph_free"
    assert ours.target != "teacher"


def random_edges() -> graph.GraphTask:
    """Words that tell the class, edges that tell nothing: what passes over them only blurs the features."""
    task = graph.load("sbm:nodes=1500,classes=3,degree=20,signal=1,homophily=0.33")
    return replace(task, x=SparseMatrix.of(np.asarray(task.x)))  # answered by a committee


def test_where_the_graph_says_nothing_features_teach():
    task = random_edges()
    teacher = graph.train_teacher(task, graph.TeacherConfig(hidden=32, epochs=40))
    found = choose_target(task.observed, teacher.logits(task.observed), 0, CommitteeConfig(members=1, rounds=1))
    assert found.name == "features' view of the committee"
    assert metric_of(found.probabilities.log(), task.y, task.test) > teacher.metrics["test"] + 0.1


def test_where_the_committee_knows_nothing_features_alone_teach(monkeypatch):
    task = random_edges()
    monkeypatch.setattr(targets, "consult", lambda *_: iter([noise(task).softmax(dim=1)]))
    assert choose_target(task.observed, noise(task), 0, SMALL, view_config=VIEWS).name == "features alone"
