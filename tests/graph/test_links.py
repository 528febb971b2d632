import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import margin_ranking_loss

from structkd import graph
from structkd.cli.app import run as command
from structkd.errors import DataError, UsageError
from structkd.graph.link_prediction.distillation import Relations, evaluate_links, learn_links, rank_loss
from structkd.graph.link_prediction.task import link_metrics, non_edges, split_links, walk_contexts
from structkd.objectives import hinge

NAME = "sbm:nodes=150,classes=3,degree=8,signal=2"
SHORT = graph.LinkConfig(hidden=16, epochs=15, anchors=64)


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load(NAME)


def keys(pairs, nodes=150) -> set[int]:
    low, high = pairs.min(dim=0).values, pairs.max(dim=0).values
    return set((low * nodes + high).tolist())


def test_edges_are_split_and_held_out_ones_leave_the_graph(task):
    problem = split_links(task, 3)
    parts = [keys(part) for part in (problem.train, problem.valid, problem.test)]
    edges = keys(task.edge_index)
    assert set.union(*parts) == edges
    assert sum(len(part) for part in parts) == len(edges)
    assert (len(parts[1]), len(parts[2])) == (int(0.05 * len(edges)), int(0.1 * len(edges)))
    assert keys(problem.seen.edge_index) == parts[0]  # in neither direction
    apart = [keys(part) for part in (problem.valid_negative, problem.test_negative)]
    assert not (apart[0] & apart[1])
    assert not (set.union(*apart) & edges)
    assert [len(part) for part in apart] == [len(part) for part in parts[1:]]
    assert bool((problem.seen.y == -1).all())  # labels play no part
    again, other = split_links(task, 3), split_links(task, 4)
    assert torch.equal(problem.test, again.test)
    assert not torch.equal(problem.test, other.test)


def test_training_negatives_come_from_what_training_sees(task):
    """A held-out edge may be a training negative: leaving it out would tell the student which ones are held out."""
    problem = split_links(task, 0)
    drawn = keys(non_edges(problem.seen, 9000, torch.Generator().manual_seed(0)))
    assert not drawn & keys(problem.train)
    assert drawn & keys(problem.test)
    with pytest.raises(DataError, match=r"99999 pairs without an edge wanted"):
        non_edges(task, 99999, torch.Generator())


def test_held_out_edges_cannot_change_training(task):
    """Rewire every test edge, its negatives and all labels: teacher, mlp and llp stay bit for bit the same."""
    problem = split_links(task, 0)
    other = split_links(replace(task, y=(task.y + 1) % 3), 0)
    poisoned = replace(other, test=problem.test_negative, test_negative=problem.test)
    results = [learn_links(one, ("mlp", "llp"), SHORT, 0) for one in (problem, poisoned)]
    assert results[0].metrics["llp"]["auc"] != results[1].metrics["llp"]["auc"]  # the poison does show where it may
    for name in ("sage", "mlp", "llp"):
        first, second = (result.models[name].state_dict() for result in results)
        assert all(torch.equal(first[key], second[key]) for key in first)
    context = walk_contexts(problem.seen, torch.arange(150), 5, 3, 0, torch.Generator().manual_seed(0))
    reached = {(int(anchor), int(node)) for anchor in range(150) for node in context[anchor, ::3]}
    seen = {(int(i), int(j)) for i, j in problem.seen.edge_index.T} | {(i, i) for i in range(150)}
    assert reached <= seen  # first steps of walks take training edges alone


def test_walks_stay_at_nodes_without_edges():
    lone = graph.GraphTask.create(np.eye(4), [[0], [1]], [0, 1, 0, 1], [0, 1], [2], [3])
    context = walk_contexts(lone, torch.tensor([0, 3]), 2, 3, 1, torch.Generator().manual_seed(0))
    assert context.shape == (2, 12)
    assert context[1, :6].tolist() == [3] * 6
    assert context[0, :3].tolist() == [1, 0, 1]


def test_rank_loss_is_the_published_one():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    a, b = torch.combinations(torch.arange(7)).T
    gap = teacher[:, a] - teacher[:, b]
    sign = torch.where(gap > 0.1, 1.0, torch.where(gap < -0.1, -1.0, 0.0)).double()
    assert set(sign.unique().tolist()) == {-1.0, 0.0, 1.0}
    expected = margin_ranking_loss(student[:, a], student[:, b], sign, margin=0.1)
    found = rank_loss(student, teacher, 0.1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, expected))
    )


def test_hinge_with_a_gap_leaves_near_pairs_out():
    student, teacher = torch.tensor([[0.0, 0.2, 0.5]]), torch.tensor([[0.9, 0.5, 0.45]])
    expected = (torch.tensor([1.2, 1.5])).mean()  # 0-1 and 0-2; 1-2 are nearer than the gap
    torch.testing.assert_close(hinge(student, teacher, gap=0.1), expected)
    with pytest.raises(UsageError, match=r"gap -1"):
        hinge(student, teacher, gap=-1.0)


def test_metrics_by_hand_and_by_scikit_learn():
    from sklearn.metrics import roc_auc_score

    found = link_metrics(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.0]))
    assert found["mrr"] == pytest.approx((1 + 1 / 2.5) / 2)  # second: behind 2, level with 1
    assert found["auc"] == pytest.approx((3 + 1.5) / 6)
    assert found["hits@10"] == 1.0  # fewer than ten non-edges
    generator = torch.Generator().manual_seed(2)
    high, low = (
        torch.randint(0, 50, (80,), generator=generator).float(),
        torch.randint(0, 45, (90,), generator=generator).float(),
    )
    found = link_metrics(high, low)
    labels = np.r_[np.ones(80), np.zeros(90)]
    assert found["auc"] == pytest.approx(roc_auc_score(labels, np.r_[high, low]))
    assert found["hits@20"] == pytest.approx(float((high > low.sort(descending=True).values[19]).float().mean()))


def test_students_learn_links(task):
    result = graph.links(task, ("mlp", "llp"), replace(SHORT, epochs=40), 0)
    assert set(result.metrics) == {"sage", "mlp", "llp"}
    assert result.metrics["llp"]["auc"] > 0.6
    embedded = result.models["llp"].eval().embed(replace(task, edge_index=torch.zeros(2, 0, dtype=torch.int64)))
    assert torch.equal(embedded, result.models["llp"].embed(task))  # a student looks at no edge


def test_features_of_another_scale_teach_the_same(task):
    """Words written 1/n taught nothing at this rate; models still read features as the task has them."""
    small = replace(task, x=task.x / 32)  # a power of two: not a digit changes
    plain, scaled = (graph.links(one, ("mlp", "llp"), SHORT, 0) for one in (task, small))
    for name in ("sage", "mlp", "llp"):
        for key in ("auc", "mrr", "valid", "epochs"):
            assert plain.metrics[name][key] == scaled.metrics[name][key]
        with torch.no_grad():
            found = [model.models[name].eval().embed(one) for model, one in ((plain, task), (scaled, small))]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_metrics_are_those_of_the_models_handed_back(task):
    problem = split_links(task, 0)
    result = learn_links(problem, ("llp",), SHORT, 0)
    for name, model in result.models.items():
        found = evaluate_links(model, problem.seen, problem.test, problem.test_negative)
        assert found["auc"] == pytest.approx(result.metrics[name]["auc"], abs=1e-3)  # rounding may move a pair or two


def test_relations_reach_zero_gradient_when_the_student_is_the_teacher(task):
    problem, config = split_links(task, 0), SHORT.resolved(task.name)
    teacher = graph.links(task, (), SHORT, 0).models["sage"]
    relations = Relations(teacher, problem, replace(config, rank_weight=0.0), 0)
    embedded = teacher.embed(problem.seen).detach().requires_grad_()
    loss = relations.loss(teacher, embedded)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


def test_usage(task, tmp_path):
    with pytest.raises(UsageError, match=r"link method 'gcn': expected some of mlp, llp"):
        graph.links(task, ("gcn",))
    with pytest.raises(UsageError, match=r"only transductive is there"):
        split_links(graph.load(NAME, setting="inductive"), 0)
    with pytest.raises(UsageError, match=r"shares 0.5 and 0.5"):
        split_links(task, 0, 0.5, 0.5)
    small = graph.GraphTask.create(np.eye(4), [[0], [1]], [0, 1, 0, 1], [0, 1], [2], [3])
    with pytest.raises(DataError, match=r"1 edges are too few to hold out 5% and 10%"):
        split_links(small, 0)


def test_command(tmp_path, capsys):
    line = ["graph", "links", "--dataset", NAME, "--seeds", "2", "--hidden", "8", "--epochs", "3", "--anchors", "32"]
    line += ["--out", str(tmp_path), "--json"]
    assert command(line) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in first["rows"]] == ["sage", "mlp", "llp"]
    assert [row["input_class"] for row in first["rows"]] == ["graph_at_inference", "graph_free", "graph_free"]
    assert set(first["rows"][0]) >= {"auc_mean", "auc_std", "hits@10_mean", "hits@20_mean", "hits@50_mean", "mrr_mean"}
    assert len(list((tmp_path / "results").glob("*.json"))) == 2
    assert command(line) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]
