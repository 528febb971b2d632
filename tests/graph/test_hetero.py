"""HeteroData in: one node type, its own edges or those through other types, against a loop over pairs."""

import pytest
import torch
from torch_geometric.data import Data, HeteroData

from structkd import graph
from structkd.errors import DataError, UsageError
from structkd.graph.data.hetero import homogeneous

PAPERS = [[0, 0, 1, 2, 3], [0, 1, 1, 1, 2]]  # paper, author


def data(cites: bool = False) -> HeteroData:
    out = HeteroData()
    out["paper"].x = torch.arange(10.0).reshape(5, 2)
    out["paper"].y = torch.tensor([0, 1, 0, 1, 0])
    for name, rows in (("train_mask", [0, 1]), ("val_mask", [2, 3]), ("test_mask", [4])):
        out["paper"][name] = torch.zeros(5, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
    out["author"].num_nodes = 3
    out["author", "writes", "paper"].edge_index = torch.tensor(PAPERS[::-1])
    if cites:
        out["paper", "cites", "paper"].edge_index = torch.tensor([[4], [0]])
    return out


def test_papers_of_one_author_are_joined() -> None:
    expected = {
        (i, j)
        for i in range(5)
        for j in range(5)
        for author in range(3)
        if i != j and (i, author) in zip(*PAPERS, strict=True) and (j, author) in zip(*PAPERS, strict=True)
    }
    found = homogeneous(data(), "paper", through=["author"])
    assert {tuple(pair) for pair in found.edge_index.T.tolist()} == expected
    task = graph.GraphTask.from_pyg(data(cites=True), node_type="paper", through=["author"], name="acm")
    assert {tuple(pair) for pair in task.edge_index.T.tolist()} == expected | {(4, 0), (0, 4)}
    assert torch.equal(torch.as_tensor(task.x), data()["paper"].x)
    assert task.train.nonzero().flatten().tolist() == [0, 1]


def test_own_edges_need_no_other_type() -> None:
    assert homogeneous(data(cites=True), "paper").edge_index.tolist() == [[4], [0]]


def test_what_cannot_be_joined_says_what_can() -> None:
    with pytest.raises(DataError, match=r"no edge joins two nodes of type 'paper'; give through=.* author\."):
        homogeneous(data(), "paper")
    with pytest.raises(UsageError, match=r"node type 'papers': expected one of .*Did you mean paper\?"):
        homogeneous(data(), "papers")
    with pytest.raises(DataError, match="no edge joins 'author' and 'author'"):
        homogeneous(data(), "author", through=["author"])


def test_data_without_masks_or_with_several_splits_says_what_to_do() -> None:
    plain = Data(x=torch.ones(3, 2), y=torch.tensor([0, 1, 0]), edge_index=torch.tensor([[0], [1]]))
    with pytest.raises(DataError, match=r"no train_mask, val_mask, test_mask; .*RandomNodeSplit"):
        graph.GraphTask.from_pyg(plain)
    for name in ("train_mask", "val_mask", "test_mask"):
        plain[name] = torch.ones(3, 10, dtype=torch.bool)
    with pytest.raises(DataError, match=r"train_mask has shape \(3, 10\); choose one split, .*\[:, 0\]"):
        graph.GraphTask.from_pyg(plain)
