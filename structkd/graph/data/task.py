"""GraphTask: one node-classification problem under one protocol, and the views of it that training may see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from structkd.errors import DataError, UsageError
from structkd.graph.data.hetero import checked, homogeneous
from structkd.graph.data.sparse import SparseMatrix, row_starts
from structkd.graph.kernels import _sample
from structkd.ids import fingerprint_arrays

Setting = Literal["transductive", "inductive", "production"]
Metric = Literal["accuracy", "roc_auc"]
Features = Tensor | SparseMatrix

MOST_NODES = 3_037_000_499
"Above this, row * nodes + column of a pair of nodes overflows 64 bits."

UNKNOWN = -1
"Label of a node that has none."


@dataclass(frozen=True, eq=False)
class GraphTask:
    """A graph, its labels, and who may see what. Build it with `GraphTask.create`, which checks everything.

    Attributes:
        x: features [nodes, features], a dense float32 tensor or a SparseMatrix.
        edge_index: int64 [2, directed edges], symmetric, without self-loops or repeats, sorted by row, then column.
        y: int64 [nodes], UNKNOWN (-1) where a node has no label.
        train, valid, test: node masks, disjoint; labels are used for the loss, for selection, for the report.
        hidden: nodes that do not exist during training (inductive and production settings).
        classes: number of classes.
        metric: what `evaluate` reports: accuracy, or ROC AUC for the very uneven two-class graphs.
    """

    x: Features
    edge_index: Int[Tensor, "2 edges"]
    y: Int[Tensor, " nodes"]
    train: Bool[Tensor, " nodes"]
    valid: Bool[Tensor, " nodes"]
    test: Bool[Tensor, " nodes"]
    hidden: Bool[Tensor, " nodes"]
    classes: int
    name: str = "graph"
    split: str = "custom"
    setting: Setting = "transductive"
    seed: int = 0
    metric: Metric = "accuracy"

    @classmethod
    def create(
        cls,
        x: Any,
        edge_index: Any,
        y: Any,
        train: Any,
        valid: Any,
        test: Any,
        *,
        classes: int | None = None,
        name: str = "graph",
        split: str = "custom",
        setting: Setting = "transductive",
        seed: int = 0,
        metric: Metric = "accuracy",
    ) -> "GraphTask":
        """Check and clean: symmetrise, drop self-loops and repeated edges; hide nodes when the setting says so.

        Raises:
            DataError: not-a-number features, a label out of range, one class only, masks that overlap or are empty,
                or sizes that differ.
        """
        features = clean_features(x, name)
        nodes = features.shape[0]
        labels = _labels(y, name)
        if labels.shape != (nodes,):
            raise DataError(f"{name}: {nodes} feature rows but labels of shape {tuple(labels.shape)}.")
        masks = {
            key: _mask(value, nodes, f"{name}: {key}")
            for key, value in {"train": train, "valid": valid, "test": test}.items()
        }
        count = _classes(labels, masks["train"], classes, name)
        _disjoint(masks, labels, name)
        task = cls(
            x=features,
            edge_index=clean_edges(edge_index, nodes, name),
            y=labels,
            **masks,
            hidden=torch.zeros(nodes, dtype=torch.bool),
            classes=count,
            name=name,
            split=split,
            setting="transductive",
            seed=seed,
            metric=metric,
        )
        return task if setting == "transductive" else hide(task, setting)

    @property
    def num_nodes(self) -> int:
        """Number of nodes, hidden ones included."""
        return len(self.y)

    @property
    def num_features(self) -> int:
        """Width of x."""
        return int(self.x.shape[1])

    @cached_property
    def degrees(self) -> Int[Tensor, " nodes"]:
        """Neighbours of each node, itself not counted."""
        return torch.bincount(self.edge_index[0], minlength=self.num_nodes)

    @cached_property
    def adjacency(self) -> SparseMatrix:
        """A: symmetric, 0/1, no self-loops."""
        return SparseMatrix(
            row_starts(self.degrees), self.edge_index[1], torch.ones(self.edge_index.shape[1]), self.num_nodes
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identity of edges, features and node order; logits saved for another graph or order are refused by it."""
        if isinstance(self.x, SparseMatrix):
            parts = {"starts": self.x.starts, "columns": self.x.columns, "values": self.x.values}
        else:
            parts = {"dense": self.x}
        arrays = {f"x_{key}": value.numpy() for key, value in parts.items()}
        return fingerprint_arrays(edge_index=self.edge_index.numpy(), **arrays)

    @cached_property
    def split_fingerprint(self) -> str:
        """Identity of the training and validation rows and their labels: what a teacher was allowed to learn from."""
        known = torch.where(self.train | self.valid, self.y, UNKNOWN)
        return fingerprint_arrays(train=self.train.numpy(), valid=self.valid.numpy(), y=known.numpy())

    @cached_property
    def observed(self) -> "GraphTask":
        """What training may see: no hidden node, no edge of one, and no test label (they read UNKNOWN).

        Teachers, targets and statistics take this view and nothing else, so a leak has no way in.
        """
        labels = torch.where(self.train | self.valid, self.y, UNKNOWN)
        blank = replace(self, y=labels, setting="transductive")
        return subgraph(blank, torch.nonzero(~self.hidden).flatten()) if bool(self.hidden.any()) else blank

    @cached_property
    def observed_rows(self) -> Int[Tensor, " observed"]:
        """Row in this task of each row of `observed`."""
        return torch.nonzero(~self.hidden).flatten()

    @classmethod
    def from_pyg(
        cls, data: Data | HeteroData, node_type: str = "", through: Sequence[str] = (), **details: Any
    ) -> "GraphTask":
        """From torch_geometric's Data, or one node type of a HeteroData (`hetero.homogeneous`), with x, y and masks.

        `details` as in `create`.
        """
        if isinstance(data, HeteroData):
            data = homogeneous(data, node_type, through)
        data = checked(data, details.get("name", "graph"))
        return cls.create(data.x, data.edge_index, data.y, data.train_mask, data.val_mask, data.test_mask, **details)


def clean_features(x: Any, name: str) -> Features:
    """Dense tensor or SparseMatrix; sparse when under a tenth is filled. DataError on not-a-number."""
    if isinstance(x, SparseMatrix):
        features: Features = x
    elif sp.issparse(x):
        features = SparseMatrix.of(x)
    else:
        features = torch.as_tensor(np.asarray(x)).to(torch.float32)
        if features.ndim != 2:
            raise DataError(f"{name}: features of shape {tuple(features.shape)}; expected [nodes, features].")
    if 0 in features.shape:
        raise DataError(f"{name}: features of shape {tuple(features.shape)}; expected one node and one column or more.")
    values = features.values if isinstance(features, SparseMatrix) else features
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise DataError(f"{name}: {bad} feature values are not finite numbers. Replace them before training.")
    if isinstance(features, SparseMatrix):
        return features if features.density < 0.1 else features.dense()
    filled = float((features != 0).float().mean()) if features.numel() else 1.0
    return SparseMatrix.of(features.numpy()) if filled < 0.1 and features.shape[1] >= 64 else features


def clean_edges(edge_index: Any, nodes: int, name: str) -> Int[Tensor, "2 edges"]:
    """Both directions of every edge once, no self-loops, sorted by row, then column.

    Counts and places instead of sorting pairs, so a large graph takes three times its result at most.

    Directed edges count in both directions, repeated ones once, self-loops not at all; isolated nodes and separate
    components are kept.

    Raises:
        DataError: an endpoint outside [0, nodes), ends that are no whole numbers, or more nodes than pairs can number.
    """
    if nodes > MOST_NODES:
        raise DataError(f"{name}: {nodes} nodes; pairs of more than {MOST_NODES} do not fit 64-bit numbers.")
    given = np.asarray(edge_index)
    if given.size and not np.issubdtype(given.dtype, np.integer) and not np.array_equal(given, np.rint(given)):
        raise DataError(f"{name}: edge_index has ends that are no whole numbers; expected node rows.")
    edges = given.astype(np.int64, copy=False)
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise DataError(f"{name}: edge_index of shape {edges.shape}; expected [2, edges].")
    if edges.size and (edges.min() < 0 or edges.max() >= nodes):
        raise DataError(
            f"{name}: an edge ends at node {int(edges.max() if edges.max() >= nodes else edges.min())}; "
            f"the graph has nodes 0 to {nodes - 1}."
        )
    rows, columns = np.ascontiguousarray(edges[0]), np.ascontiguousarray(edges[1])
    starts = np.zeros(nodes + 1, dtype=np.int64)
    _sample.counted_rows(rows, columns, starts)
    np.cumsum(starts, out=starts)
    both = np.empty(int(starts[-1]), dtype=np.int64)
    _sample.placed_columns(rows, columns, starts[:-1].copy(), both)
    left = _sample.sorted_rows(starts, both)
    out = np.empty((2, left), dtype=np.int64)
    out[0], out[1] = np.repeat(np.arange(nodes), np.diff(starts)), both[:left]
    return torch.from_numpy(out)


def subgraph(task: GraphTask, rows: Int[Tensor, " kept"]) -> GraphTask:
    """The task on some of its nodes, renumbered in the order given; edges to other nodes disappear."""
    new = torch.full((task.num_nodes,), -1, dtype=torch.int64)
    new[rows] = torch.arange(len(rows))
    edges = new[task.edge_index]
    kept = edges[:, (edges >= 0).all(dim=0)]
    x = rows_of(task.x, rows)
    masks = {key: getattr(task, key)[rows] for key in ("train", "valid", "test", "hidden")}
    return replace(task, x=x, y=task.y[rows], edge_index=clean_edges(kept.numpy(), len(rows), task.name), **masks)


def hide(task: GraphTask, setting: Setting, share: float = 0.2) -> GraphTask:
    """Inductive or production setting: floor(share * test) test nodes, drawn by the task's seed, become hidden.

    In the inductive setting the hidden nodes are the test set; in production the test set keeps both parts.
    """
    rows = torch.nonzero(task.test).flatten()
    generator = torch.Generator().manual_seed(task.seed + 1_000_003)
    drawn = rows[torch.randperm(len(rows), generator=generator)[: int(share * len(rows))]]
    if not len(drawn):
        raise DataError(f"{task.name}: {len(rows)} test nodes are too few to hide a fifth of them; use transductive.")
    hidden = torch.zeros(task.num_nodes, dtype=torch.bool)
    hidden[drawn] = True
    test = hidden.clone() if setting == "inductive" else task.test
    return replace(task, hidden=hidden, test=test, setting=setting)


def rows_of(x: Features, rows: Int[Tensor, " some"]) -> Features:
    """Some rows of dense or sparse features."""
    return x.rows(rows) if isinstance(x, SparseMatrix) else x[rows]


def chunks(nodes: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` rows."""
    if size < 1:
        raise UsageError(f"{size} nodes a batch: expected 1 or more.")
    return [slice(first, min(nodes, first + size)) for first in range(0, nodes, size)]


def _mask(value: Any, nodes: int, what: str) -> Tensor:
    array = torch.as_tensor(np.asarray(value))
    if array.dtype != torch.bool:
        if array.numel() and (int(array.min()) < 0 or int(array.max()) >= nodes):
            raise DataError(f"{what} rows must lie in [0, {nodes}); found {int(array.min())} to {int(array.max())}.")
        mask = torch.zeros(nodes, dtype=torch.bool)
        mask[array.to(torch.int64)] = True
        array = mask
    if array.shape != (nodes,):
        raise DataError(f"{what} mask has shape {tuple(array.shape)}; expected [{nodes}].")
    if not bool(array.any()):
        raise DataError(f"{what} is empty; a task needs training, validation and test nodes.")
    return array


def _labels(value: Any, name: str) -> Tensor:
    given = np.asarray(value)
    if given.dtype.kind not in "biu" and not (given.dtype.kind == "f" and bool(np.all(given == np.rint(given)))):
        raise DataError(f"{name}: labels of type {given.dtype} that are no whole numbers; expected class numbers.")
    return torch.as_tensor(given.astype(np.int64))


def _classes(labels: Tensor, train: Tensor, classes: int | None, name: str) -> int:
    count = classes if classes is not None else int(labels.max()) + 1
    if int(labels.min()) < UNKNOWN or int(labels.max()) >= count:
        raise DataError(
            f"{name}: labels run from {int(labels.min())} to {int(labels.max())}; expected 0 to {count - 1} "
            f"(or {UNKNOWN} for a node without one)."
        )
    if count > len(labels):
        raise DataError(
            f"{name}: labels run to {int(labels.max())} in a graph of {len(labels)} nodes, so most classes would have "
            "no node. Number the classes from 0 without gaps."
        )
    trained = len(torch.unique(labels[train]))
    if trained < 2:
        raise DataError(f"{name}: the training nodes have {trained} class; expected two or more. Draw another split.")
    return count


def _disjoint(masks: Mapping[str, Tensor], labels: Tensor, name: str) -> None:
    for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
        both = int((masks[first] & masks[second]).sum())
        if both:
            raise DataError(f"{name}: {both} nodes are in both {first} and {second}; the masks must be disjoint.")
    for key, mask in masks.items():
        unlabelled = int((labels[mask] == UNKNOWN).sum())
        if unlabelled:
            raise DataError(f"{name}: {unlabelled} {key} nodes have no label; leave them out of the split.")
