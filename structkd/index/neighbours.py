"""The graph of nearest neighbours as a sparse matrix of scores; written as .npz."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, save_npz

from structkd.errors import DataError, UsageError
from structkd.files import atomic_path
from structkd.index.topk import TopK, first_kept
from structkd.index.vectors import check_k
from structkd.progress import track

Symmetric = str  # one of SYMMETRIC
SYMMETRIC = ("none", "mutual", "union")
_GRAPH_QUERIES = 1024


def neighbour_graph(
    neighbours: Callable[[int, int], TopK], count: int, k: int, symmetric: Symmetric, loops: NDArray[np.float32] | None
) -> csr_array:
    """The k nearest others of each row as CSR, data = score.

    Args:
        neighbours: (start, stop) -> TopK of those rows as queries with k + 1 places (the row itself is removed here).
        count: rows.
        k: neighbours per row; fewer when the index is smaller.
        symmetric: "none" keeps row -> its neighbours; "union" adds every reverse edge; "mutual" keeps the edges whose
            reverse is there too.
        loops: score of each row with itself, or None for no self-loops.

    Raises:
        UsageError: k below 1, or an unknown `symmetric`.
    """
    check_k(k)
    if symmetric not in SYMMETRIC:
        raise UsageError(f"symmetric {symmetric!r} is unknown; expected one of {', '.join(SYMMETRIC)}.")
    heads, tails, weights = [], [], []
    for start in track(range(0, count, _GRAPH_QUERIES), "neighbours"):
        stop = min(count, start + _GRAPH_QUERIES)
        top = neighbours(start, stop)
        keep = top.valid & (top.rows != np.arange(start, stop)[:, None])
        others = first_kept(top, keep, k)
        heads.append(np.repeat(np.arange(start, stop), others.valid.sum(axis=1)))
        tails.append(others.rows[others.valid])
        weights.append(others.scores[others.valid])
    head = np.concatenate(heads) if heads else np.empty(0, dtype=np.int64)
    tail = np.concatenate(tails) if tails else np.empty(0, dtype=np.int64)
    weight = np.concatenate(weights) if weights else np.empty(0, dtype=np.float32)
    head, tail, weight = _symmetrised(head, tail, weight, count, symmetric)
    if loops is not None:
        everyone = np.arange(count)
        head, tail = np.concatenate([head, everyone]), np.concatenate([tail, everyone])
        weight = np.concatenate([weight, loops])
    return csr_array((weight, (head, tail)), shape=(count, count))


def _symmetrised(
    head: NDArray, tail: NDArray, weight: NDArray, count: int, symmetric: Symmetric
) -> tuple[NDArray, NDArray, NDArray]:
    """Edges after the union or the intersection with their reverses (a score is the same both ways)."""
    if symmetric == "none":
        return head, tail, weight
    forward, backward = head * count + tail, tail * count + head
    if symmetric == "mutual":
        both = np.isin(forward, backward)
        return head[both], tail[both], weight[both]
    keys, first = np.unique(np.concatenate([forward, backward]), return_index=True)
    return keys // count, keys % count, np.concatenate([weight, weight])[first]


def write_graph(path: str | Path, graph: csr_array) -> None:
    """Write a sparse matrix as .npz, atomically; scipy.sparse.load_npz reads it."""
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        save_npz(handle, graph)


def write_labelled_graph(
    path: str | Path, graph: csr_array, features: NDArray[np.float32], labels: NDArray[np.int64]
) -> None:
    """Write the graph with features and labels, as `structkd graph --dataset npz:FILE` reads it, atomically.

    Arrays: adj_{data, indices, indptr, shape} with 1 for every edge (also for one of score 0), adj_scores the scores in
    the order of the edges, attr_matrix, labels.

    Raises:
        DataError: not one label or one row of features per node.
    """
    for what, rows in (("labels", len(labels)), ("rows of features", len(features))):
        if rows != graph.shape[0]:
            raise DataError(f"found {rows} {what} for {graph.shape[0]} nodes; give one per vector, in row order.")
    parts = {f"adj_{name}": np.asarray(getattr(graph, name)) for name in ("indices", "indptr", "shape")}
    parts |= {"adj_data": np.ones(graph.nnz, dtype=np.float32), "adj_scores": np.asarray(graph.data)}
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, attr_matrix=features, labels=labels, **parts)  # type: ignore[arg-type]
