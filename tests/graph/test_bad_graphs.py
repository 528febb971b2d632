"""Graphs and files as they come: cleaned by a stated rule, or one clear error."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from structkd import graph
from structkd.errors import CorruptFileError, DataError, TeacherMismatchError, UsageError
from structkd.graph.data.datasets import load
from structkd.graph.data.readers import csr_npz
from structkd.graph.data.sparse import SparseMatrix, row_starts
from structkd.graph.data.task import MOST_NODES, GraphTask, clean_edges
from structkd.graph.distillation import METHODS

STUDENT = graph.DistillConfig(hidden=8, layers=2, epochs=2, temperature=1.0)
SHORT = {"nosmog": "length=8,width=4"}


def messy(edges) -> GraphTask:
    """24 nodes of 2 classes with those edges."""
    x = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    return GraphTask.create(x, edges, np.arange(24) % 2, range(6), range(6, 12), range(12, 24))


CLEAN = [[0, 1], [1, 2], [2, 3], [4, 5], [5, 6], [12, 13], [13, 14], [2, 14]]
GRAPHS = {
    "directed": [(i, j) for i, j in CLEAN],
    "both directions": [(i, j) for i, j in CLEAN] + [(j, i) for i, j in CLEAN],
    "repeated": [(i, j) for i, j in CLEAN] * 3,
    "self-looped": [(i, j) for i, j in CLEAN] + [(i, i) for i in range(24)],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_directed_repeated_and_self_looped_edges_are_one_graph(name):
    task = messy(np.array(GRAPHS[name]).T)
    assert task.fingerprint == messy(np.array(CLEAN).T).fingerprint
    assert task.edge_index.shape[1] == 16
    assert int((task.degrees == 0).sum()) == 14  # isolated nodes and separate parts stay


@pytest.mark.parametrize("method", [name for name in METHODS if name != "structkd"])
@pytest.mark.parametrize("edges", [np.array(CLEAN).T, np.zeros((2, 0), dtype=np.int64)], ids=["in parts", "no edge"])
def test_every_method_teaches_on_graphs_in_parts_and_without_edges(method, edges):
    task = messy(edges)
    teacher = graph.train_teacher(task, graph.TeacherConfig(hidden=8, layers=2, epochs=3))
    result = graph.distill(task, teacher, replace(STUDENT, method=method, options=SHORT.get(method, "")))
    assert all(np.isfinite(line["loss"]) for line in result.history)
    assert all(bool(torch.isfinite(weight).all()) for weight in result.student.state_dict().values())


@pytest.mark.parametrize("model", ["gcn", "sage", "gat", "appnp", "gcnii"])
def test_every_teacher_answers_for_isolated_nodes(model):
    task = messy(np.array(CLEAN).T)
    teacher = graph.train_teacher(task, graph.TeacherConfig(model=model, hidden=8, layers=2, epochs=2))
    assert bool(torch.isfinite(teacher.logits(task)).all())


def test_one_class_is_refused_before_anything_is_trained():
    y = np.zeros(24, dtype=np.int64)
    with pytest.raises(DataError, match=r"the training nodes have 1 class; expected two or more"):
        GraphTask.create(np.ones((24, 2)), np.array(CLEAN).T, y, range(6), range(6, 12), range(12, 24))
    y[20:] = 1
    with pytest.raises(DataError, match=r"the training nodes have 1 class"):
        GraphTask.create(np.ones((24, 2)), np.array(CLEAN).T, y, range(6), range(6, 12), range(12, 24))


def test_features_and_labels_out_of_range():
    x = np.ones((24, 2), dtype=np.float32)
    x[3, 1], x[4, 0] = np.nan, np.inf
    parts = (np.array(CLEAN).T, np.arange(24) % 2, range(6), range(6, 12), range(12, 24))
    with pytest.raises(DataError, match=r"2 feature values are not finite numbers"):
        GraphTask.create(x, *parts)
    with pytest.raises(DataError, match=r"labels run from 0 to 1; expected 0 to 0"):
        GraphTask.create(np.ones((24, 2)), *parts, classes=1)
    with pytest.raises(DataError, match=r"an edge ends at node 99; the graph has nodes 0 to 23"):
        messy([[0], [99]])
    with pytest.raises(DataError, match=r"an edge ends at node -1"):
        messy([[0], [-1]])
    with pytest.raises(DataError, match=r"ends that are no whole numbers"):
        messy([[0.5], [1.0]])


def test_row_starts_pass_two_to_the_thirty_first():
    """Counts alone, no such matrix: what would overflow is their sum."""
    starts = row_starts(torch.full((4,), 2**30, dtype=torch.int32))
    assert starts.dtype == torch.int64
    assert starts.tolist() == [0, 2**30, 2**31, 3 * 2**30, 2**32]
    fake = SparseMatrix(starts, torch.zeros(1, dtype=torch.int64).expand(2**32), torch.ones(1).expand(2**32), 4)
    assert fake.shape == (4, 4)
    assert fake.density == 2**32 / 16


def test_pairs_of_nodes_stay_within_64_bits():
    assert (MOST_NODES - 1) * MOST_NODES + MOST_NODES - 1 < 2**63 <= (MOST_NODES + 1) ** 2
    with pytest.raises(DataError, match=r"huge: 3037000500 nodes; pairs of more than 3037000499 do not fit"):
        clean_edges(np.zeros((2, 0)), MOST_NODES + 1, "huge")


def test_row_starts_written_with_32_bits_are_named(tmp_path):
    wrapped = np.array([0, 2**31 - 1, -(2**31) + 5, 2], dtype=np.int64)
    parts = {"adj_indices": np.zeros(2, dtype=np.int64), "adj_indptr": wrapped, "attr_matrix": np.ones((3, 2))}
    np.savez(tmp_path / "g.npz", labels=np.array([0, 1, 0]), **parts)
    with pytest.raises(CorruptFileError, match=r"adj_indptr falls after row 1; .* 2\^31 edges written with 32-bit"):
        csr_npz(tmp_path / "g.npz")


# leaks: whoever tries to bring hidden content in is refused


@pytest.mark.parametrize("setting", ["inductive", "production"])
def test_logits_of_the_full_graph_are_refused_where_nodes_are_hidden(setting, tmp_path):
    whole, task = load("sbm:nodes=160"), load("sbm:nodes=160", setting=setting)
    teacher = graph.train_teacher(whole, graph.TeacherConfig(hidden=8, epochs=2))
    with pytest.raises(UsageError, match=r"teacher logits of shape \(160, 4\); expected \(\d+, 4\) \(observed nodes\)"):
        graph.distill(task, teacher.logits(whole), STUDENT)
    store = graph.score_nodes(teacher, whole, tmp_path / "store")
    with pytest.raises(DataError, match=r"cached logits have shape \(160, 4\)"):
        graph.distill(task, store, STUDENT)


def test_a_teacher_that_saw_other_labels_is_refused():
    task = load("sbm:nodes=160")
    cheat = replace(task, train=task.train | task.test)  # it would have learnt the test labels
    teacher = graph.train_teacher(cheat, graph.TeacherConfig(hidden=8, epochs=2))
    with pytest.raises(TeacherMismatchError, match=r"split"):
        graph.distill(task, teacher, STUDENT)


@pytest.mark.parametrize("method", ["glnn", "krd"])
def test_a_lesson_holds_no_hidden_node_and_no_test_label(method, monkeypatch):
    """Whatever a method is handed is the observed view: there is nothing else to read."""
    task, caught = load("sbm:nodes=160", setting="production"), []
    real = METHODS[method]
    monkeypatch.setitem(
        METHODS, method, replace(real, teach=lambda lesson: caught.append(lesson) or real.teach(lesson))
    )
    teacher = graph.train_teacher(task, graph.TeacherConfig(hidden=8, epochs=2))
    graph.distill(task, teacher, replace(STUDENT, method=method))
    (lesson,) = caught
    assert lesson.seen.num_nodes == int((~task.hidden).sum()) == len(lesson.logits)
    assert not bool(lesson.seen.hidden.any())
    assert bool((lesson.seen.y[~(lesson.seen.train | lesson.seen.valid)] == -1).all())
