import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from structkd.errors import DataError, UsageError
from structkd.graph.data.datasets import load, nearest_neighbours
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask, clean_edges, subgraph

EDGES = [[0, 0, 1, 1, 2, 3, 3], [1, 1, 0, 2, 2, 0, 4]]


def create(**changes) -> GraphTask:
    values = {
        "x": np.eye(6, dtype=np.float32),
        "edge_index": EDGES,
        "y": [0, 1, 0, 1, 0, -1],
        "train": [0, 1],
        "valid": [2],
        "test": [3, 4],
    } | changes
    return GraphTask.create(**values)


def test_edges_become_symmetric_unique_and_loopless():
    assert create().edge_index.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4], [1, 3, 0, 2, 1, 0, 4, 3]]


def test_adjacency_and_degrees():
    task = create()
    assert task.degrees.tolist() == [2, 2, 1, 2, 1, 0]
    dense = np.zeros((6, 6))
    dense[tuple(task.edge_index.numpy())] = 1
    assert np.array_equal(task.adjacency.dense().numpy(), dense)


def test_fingerprint_names_edges_features_and_order():
    task = create()
    assert task.fingerprint == create(y=[1, 0, 1, 0, 1, 0]).fingerprint
    assert task.fingerprint != create(edge_index=[[0], [1]]).fingerprint
    assert task.fingerprint != create(x=2 * np.eye(6)).fingerprint
    swapped = subgraph(task, torch.tensor([1, 0, 2, 3, 4, 5]))
    assert swapped.fingerprint != task.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.full((6, 2), np.nan)}, r"12 feature values are not finite"),
        ({"x": np.ones(6)}, r"expected \[nodes, features\]"),
        ({"y": [0, 1, 0]}, r"6 feature rows but labels of shape \(3,\)"),
        ({"y": [0, 1, 0, 1, 0, -2]}, r"labels run from -2 to 1"),
        ({"y": [0, 1, 0, 1, 0, 7], "classes": 2}, r"labels run from 0 to 7; expected 0 to 1"),
        ({"y": [0, 1, 0, 1, 0, 10**9]}, r"labels run to 1000000000 in a graph of 6 nodes"),
        ({"y": [0, 1, 0, 1, 0, 0.5]}, r"labels of type float64 that are no whole numbers"),
        ({"y": [0, 1, 0, 1, 0, float("nan")]}, r"labels of type float64 that are no whole numbers"),
        ({"x": np.ones((6, 0))}, r"features of shape \(6, 0\); expected one node and one column or more"),
        ({"y": [0, 0, 0, 1, 0, 1]}, r"the training nodes have 1 class"),
        ({"edge_index": [[0], [9]]}, r"an edge ends at node 9; the graph has nodes 0 to 5"),
        ({"edge_index": [0, 1]}, r"expected \[2, edges\]"),
        ({"test": [1, 3]}, r"1 nodes are in both train and test"),
        ({"test": [5]}, r"1 test nodes have no label"),
        ({"valid": np.zeros(6, dtype=bool)}, r"valid is empty"),
        ({"valid": [9]}, r"valid rows must lie in \[0, 6\)"),
        ({"valid": np.ones(4, dtype=bool)}, r"valid mask has shape \(4,\); expected \[6\]"),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    with pytest.raises(DataError, match=message):
        create(**changes)


def test_sparse_features_stay_sparse():
    x = sp.random_array((50, 200), density=0.02, rng=np.random.default_rng(0), dtype=np.float32)
    task = GraphTask.create(x, np.zeros((2, 0)), np.arange(50) % 2, [0, 1], [2], [3])
    assert isinstance(task.x, SparseMatrix)
    dense = GraphTask.create(x.toarray(), np.zeros((2, 0)), np.arange(50) % 2, [0, 1], [2], [3])
    assert isinstance(dense.x, SparseMatrix)
    assert torch.equal(dense.x.dense(), task.x.dense())


def test_sparse_product_has_the_dense_gradient():
    matrix = sp.random_array((7, 5), density=0.4, rng=np.random.default_rng(1))
    ours = SparseMatrix.of(matrix, torch.float64)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours.product, weight)
    torch.testing.assert_close(ours.product(weight), torch.from_numpy(matrix.toarray()) @ weight)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(ours.rows(rows).dense(), ours.dense()[rows])


@pytest.mark.parametrize("setting", ["inductive", "production"])
def test_nothing_hidden_reaches_training(setting):
    task = load("sbm:nodes=300,classes=3,degree=6", setting=setting, seed=4)
    whole = load("sbm:nodes=300,classes=3,degree=6", seed=4)
    seen, kept = task.observed, task.observed_rows
    test = int(whole.test.sum())
    assert int(task.hidden.sum()) == int(0.2 * test) == 300 - seen.num_nodes
    assert not bool((task.hidden & ~whole.test).any())
    assert int(task.test.sum()) == (int(0.2 * test) if setting == "inductive" else test)
    hidden_edge = task.hidden[whole.edge_index].any(dim=0)
    expected = whole.edge_index[:, ~hidden_edge]
    assert torch.equal(kept[seen.edge_index], expected)
    assert seen.edge_index.shape[1] < whole.edge_index.shape[1]
    assert torch.equal(seen.x, whole.x[kept])
    assert not bool(seen.hidden.any())


@pytest.mark.parametrize("setting", ["transductive", "inductive", "production"])
def test_test_labels_are_blank_in_the_observed_view(setting):
    task = load("sbm:nodes=300,classes=3,degree=6", setting=setting, seed=4)
    known = task.observed.train | task.observed.valid
    assert bool((task.observed.y[~known] == -1).all())
    assert torch.equal(task.observed.y[known], task.y[task.observed_rows][known])


def test_hidden_nodes_come_from_the_seed():
    draws = [load("digits", setting="inductive", seed=seed).hidden for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_too_few_test_nodes_to_hide():
    with pytest.raises(DataError, match=r"2 test nodes are too few to hide a fifth"):
        create(setting="inductive")


def test_from_pyg_is_the_same_task():
    from torch_geometric.data import Data

    task = create()
    masks = {"train_mask": task.train, "val_mask": task.valid, "test_mask": task.test}
    data = Data(x=torch.eye(6), edge_index=torch.tensor(EDGES), y=torch.tensor([0, 1, 0, 1, 0, -1]), **masks)
    other = GraphTask.from_pyg(data)
    assert (other.fingerprint, other.split_fingerprint) == (task.fingerprint, task.split_fingerprint)


def test_tasks_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        create().classes = 3


def test_nearest_neighbours_break_ties_by_the_lower_row():
    x = np.array([[0], [1], [-1], [1], [5]])
    assert nearest_neighbours(x, 2).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [1, 2, 3, 0, 0, 1, 1, 0, 1, 3]]


def test_digits_is_the_same_graph_everywhere():
    task = load("digits")
    assert (task.num_nodes, task.num_features, task.classes) == (1797, 64, 10)
    assert task.edge_index.shape[1] == 12618
    assert int(task.train.sum()) == 40
    assert torch.bincount(task.y[task.train]).tolist() == [4] * 10
    assert task.fingerprint == load("digits", seed=7).fingerprint
    same = (task.y[task.edge_index[0]] == task.y[task.edge_index[1]]).float().mean()
    assert float(same) > 0.95


@pytest.mark.parametrize("homophily", [0.1, 0.5, 0.9])
def test_block_model_has_the_homophily_asked_for(homophily):
    task = load(f"sbm:nodes=2000,classes=4,degree=10,homophily={homophily}", seed=3)
    same = (task.y[task.edge_index[0]] == task.y[task.edge_index[1]]).float().mean()
    assert float(same) == pytest.approx(homophily, abs=0.02)


def test_seeds_draw_other_random_splits_and_the_same_one_twice():
    draws = [load("digits", split="random", seed=seed).train for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert int(draws[0].sum()) == 200


def test_cpf_takes_the_largest_component():
    task = load("sbm:nodes=400,classes=3,degree=3", split="cpf")
    assert int((task.degrees == 0).sum()) == 0
    assert task.num_nodes < 400
    assert (int(task.train.sum()), int(task.valid.sum())) == (60, 90)
    assert int(task.test.sum()) == task.num_nodes - 150


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cora", {}, r"dataset 'cora': expected one of amazon"),
        ("planetoid:Mars", {}, r"expected planetoid:Cora"),
        ("digits", {"split": "thirds"}, r"split 'thirds': expected one of public"),
        ("digits:2", {}, r"takes no further name"),
        ("npz:", {}, r"expected a file"),
        ("sbm:size=3", {}, r"unknown key 'size'"),
        ("sbm:nodes=many", {}, r"nodes='many' is no number"),
        ("sbm:nodes=3", {}, r"3 nodes in 4 classes"),
        ("sbm:homophily=2", {}, r"homophily=2.0; expected a share between 0 and 1"),
        ("sbm:degree=-1", {}, r"degree=-1.0; expected 0 or more"),
        ("sbm:signal=nan", {}, r"signal=nan; expected 0 or more"),
        ("sbm:features=0", {}, r"features=0; expected 1 or more"),
        ("heterophilous:", {}, r"expected a name"),
    ],
)
def test_names_that_do_not_exist(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        load(name, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "masks"}, r"no fixed masks in this dataset"), ({"split": "ogb", "name": "npz"}, r"no such file")],
)
def test_data_that_does_not_exist(arguments, message, tmp_path):
    name = f"npz:{tmp_path}/none.npz" if "name" in arguments else "digits"
    with pytest.raises(DataError, match=message):
        load(name, split=arguments["split"])


def test_too_small_for_the_split():
    with pytest.raises(DataError, match=r"class 0 has 50 nodes, the split draws 50 of each class"):
        load("sbm:nodes=200,degree=40", split="cpf")
    with pytest.raises(DataError, match=r"the random split needs 1500"):
        load("sbm:nodes=600", split="random")


def test_clean_edges_of_an_empty_graph():
    assert clean_edges(np.zeros((2, 0)), 0, "empty").shape == (2, 0)


@pytest.mark.parametrize(("nodes", "count"), [(1, 0), (1, 3), (5, 30), (100, 50), (300, 5000)])
def test_cleaned_edges_equal_a_sort_of_pairs(nodes, count):
    edges = np.random.default_rng(count).integers(nodes, size=(2, count))
    pairs = {(i, j) for a, b in edges.T.tolist() for i, j in ((a, b), (b, a)) if i != j}
    found = clean_edges(np.asfortranarray(edges), nodes, "x")
    assert found.T.tolist() == [list(pair) for pair in sorted(pairs)]
