"""What every index answers: TopK; the two protocols; the checks of what comes in; exclusions and neighbour graphs."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from structkd.errors import DataError, DeviceError, UsageError
from structkd.ids import Ids
from structkd.ordering import order
from structkd.trec import Run

Vectors = NDArray[Any] | Tensor
Metric = str  # one of METRICS, checked at the border
Symmetric = str  # one of SYMMETRIC
METRICS = ("cosine", "ip", "l2")
SYMMETRIC = ("none", "mutual", "union")
NO_ROW = -1
_GRAPH_QUERIES = 1024


@dataclass(frozen=True)
class TopK:
    """The best documents of each query in ranking order (score descending, document id ascending).

    Attributes:
        rows: int64 [queries, k], rows of `table`; -1 where `valid` is False.
        scores: float32 [queries, k]; minus infinity where `valid` is False.
        valid: bool [queries, k]; False where the index had fewer than k documents to give.
        table: the ids of the indexed documents.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    valid: NDArray[np.bool_]
    table: Ids

    def __len__(self) -> int:
        return len(self.rows)

    def document_ids(self) -> list[list[str | None]]:
        """Document ids [queries, k]; None where there is no document."""
        return [
            [self.table[row] if good else None for row, good in zip(rows, valid, strict=True)]
            for rows, valid in zip(self.rows.tolist(), self.valid.tolist(), strict=True)
        ]

    @property
    def ids(self) -> NDArray[np.object_]:
        """`document_ids` as an object array [queries, k]."""
        out = np.empty(self.rows.shape, dtype=object)
        out[:] = self.document_ids() if out.size else out
        return out

    def run(self, query_ids: Sequence[str]) -> Run:
        """The lists under their query ids, without the places that hold no document."""
        if len(query_ids) != len(self.rows):
            raise DataError(f"{len(query_ids)} query ids for {len(self.rows)} result lists; give one id per query.")
        lists = {}
        for query, rows, scores, valid in zip(query_ids, self.rows, self.scores, self.valid, strict=True):
            lists[query] = (self.table.strings(rows[valid].tolist()), scores[valid].astype(np.float64))
        if len(lists) != len(query_ids):
            raise DataError(f"{len(query_ids) - len(lists)} query ids occur twice; ids must be distinct.")
        return Run(lists)


@runtime_checkable
class VectorIndex(Protocol):
    """An index of vectors: kind, metric, dim, ids; search and neighbour graph."""

    kind: str
    metric: Metric
    dim: int

    def __len__(self) -> int:
        """How many vectors it holds."""
        ...

    @property
    def ids(self) -> Ids:
        """Document ids in row order."""
        ...

    @property
    def ties(self) -> NDArray[np.int64]:
        """Tie rank of each row's id."""
        ...

    def search(self, queries: Vectors, k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None) -> TopK:
        """The k best documents of each query; `exclude` names documents per query that must not come."""
        ...

    def knn_graph(self, k: int, symmetric: Symmetric = "none", self_loops: bool = False) -> csr_array:
        """The k nearest neighbours of each indexed vector as a sparse matrix of scores."""
        ...


@runtime_checkable
class LexicalIndex(Protocol):
    """An index of texts."""

    kind: str

    def __len__(self) -> int:
        """How many documents it holds."""
        ...

    @property
    def ids(self) -> Ids:
        """Document ids in row order."""
        ...

    def search(self, texts: Sequence[str], k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None) -> TopK:
        """The k best documents of each query text; `exclude` names documents per query that must not come."""
        ...


def as_tensor(vectors: Vectors, what: str = "vectors") -> Tensor:
    """Numbers [rows, dim] as a tensor that shares memory where it can; floating point of any width, or integers.

    Raises:
        DataError: not two dimensions, or no numbers.
    """
    if isinstance(vectors, Tensor):
        tensor = vectors.detach()
    else:
        array = np.asarray(vectors)
        if array.dtype.kind not in "fiu":
            raise DataError(f"{what}: found values of type {array.dtype}, expected real numbers.")
        with warnings.catch_warnings():  # a read-only memory map: torch warns about writing, and nothing here writes
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise DataError(f"{what}: found values of type {tensor.dtype}, expected real numbers.")
    if tensor.ndim != 2:
        raise DataError(f"{what}: found shape {list(tensor.shape)}, expected two dimensions [rows, dim].")
    return tensor


def check_k(k: int) -> None:
    """UsageError unless k is a positive integer."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"k is {k!r}; expected a whole number of at least 1.")


def check_metric(metric: str) -> None:
    """UsageError unless the metric is known."""
    if metric not in METRICS:
        raise UsageError(f"metric {metric!r} is unknown; expected one of {', '.join(METRICS)}.")


def check_dim(found: int, expected: int, where: str) -> None:
    """DataError with both dimensions when they differ."""
    if found != expected:
        raise DataError(
            f"{where}: found {found} dimensions, expected {expected} as in the index. Was it another encoder?"
        )


def prepare(block: Tensor, metric: Metric, names: Callable[[int], str], what: str) -> Tensor:
    """A block of vectors in float32, normalised under cosine (in float64, so that scale does not matter).

    Args:
        block: [rows, dim], any real type.
        metric: cosine divides by the Euclidean norm and refuses zero rows.
        names: row of the block -> what to call it in an error.
        what: "document" or "query".

    Raises:
        DataError: a row holds not-a-number or infinity, is zero under cosine, or overflows float32.
    """
    values = block.to(torch.float32)
    bad = ~torch.isfinite(values).all(dim=1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise DataError(
            f"{what} {names(first)}: the vector holds a value that is not finite ({int(bad.sum())} such rows). "
            "Encode it again or remove it."
        )
    if metric != "cosine":
        return values.contiguous()
    wide = block.to(torch.float64)
    norms = wide.norm(dim=1, keepdim=True)
    zero = norms[:, 0] == 0
    if bool(zero.any()):
        first = int(zero.nonzero()[0])
        raise DataError(
            f"{what} {names(first)}: the vector is zero, and cosine has no value there ({int(zero.sum())} such rows). "
            "Remove it or use the metric 'ip'."
        )
    normalised: Tensor = (wide / norms).to(torch.float32).contiguous()
    return normalised


def prepare_queries(queries: Vectors, metric: Metric, dim: int) -> Tensor:
    """Checked float32 queries, normalised under cosine."""
    tensor = as_tensor(queries, "queries")
    check_dim(tensor.shape[1], dim, "queries")
    return prepare(tensor, metric, lambda row: f"at row {row}", "query")


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" takes a GPU when there is one.

    Raises:
        DeviceError: a GPU was named and there is none; it never falls back silently.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; expected auto, cpu, cuda or cuda:N.") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f"device {str(device)!r} was asked for and {torch.cuda.device_count()} CUDA devices are there. "
            "Use device='cpu' or 'auto'."
        )
    return found


def exact_scores(queries: Tensor, vectors: Tensor, rows: Tensor, metric: Metric) -> Tensor:
    """Scores of chosen (query, row) pairs, computed in float64 and rounded once to float32.

    ip and cosine: <q, x>; l2: -|q - x|^2. The value of a pair depends on its two vectors alone (not on the batch, the
    block or the device), so identical documents tie exactly and the tie rule decides between them.

    Args:
        queries: float32 [queries, dim].
        vectors: float32 [count, dim], on whatever device; the chosen rows are moved.
        rows: int64 [queries, list]; -1 gives minus infinity.
        metric: which of the formulas.

    Returns:
        float32 [queries, list] on the device of `queries`.
    """
    out = torch.empty(rows.shape, dtype=torch.float32, device=queries.device)
    width = max(1, rows.shape[1] * queries.shape[1])
    step = max(1, (1 << 18 if queries.device.type == "cpu" else 1 << 24) // width)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        picked = rows[part].clamp(min=0).to(vectors.device)
        chosen = torch.index_select(vectors, 0, picked.reshape(-1)).to(queries.device)  # twice as fast as [...]
        chosen = chosen.double().view(*picked.shape, -1)
        query = queries[part].double().unsqueeze(1)
        if metric == "l2":
            out[part] = chosen.sub_(query).square_().sum(dim=-1).neg_().float()
        else:
            out[part] = chosen.mul_(query).sum(dim=-1).float()
    return out.masked_fill_(rows < 0, -torch.inf)


def ranked(rows: Tensor, scores: Tensor, ties: NDArray[np.int64], k: int) -> tuple[NDArray, NDArray, NDArray]:
    """Candidates [queries, list] -> rows, scores, valid [queries, k] by the tie rule; row -1 is never mapped."""
    found_rows, found_scores = rows.cpu().numpy(), scores.cpu().numpy()
    valid = found_rows >= 0
    tie = np.where(valid, ties[np.where(valid, found_rows, 0)] if len(ties) else 0, len(ties))
    positions = order(np.where(valid, found_scores, -np.inf), tie)[:, :k]
    out_rows = np.full((len(found_rows), k), NO_ROW, dtype=np.int64)
    out_scores = np.full((len(found_rows), k), -np.inf, dtype=np.float32)
    width = positions.shape[1]
    out_rows[:, :width] = np.take_along_axis(np.where(valid, found_rows, NO_ROW), positions, axis=1)
    out_scores[:, :width] = np.take_along_axis(np.where(valid, found_scores, -np.inf), positions, axis=1)
    return out_rows, out_scores, out_rows >= 0


def excluded_rows(exclude: Sequence[Sequence[str]], ids: Ids, queries: int) -> list[set[int]]:
    """Rows to leave out per query; ids that are not in the index are ignored, since they cannot come anyway."""
    if len(exclude) != queries:
        raise DataError(f"exclude has {len(exclude)} lists for {queries} queries; give one list per query.")
    return [set(ids.find(names).tolist()) - {NO_ROW} for names in exclude]


def search_without(search: Callable[[int], TopK], banned: Sequence[set[int]], k: int, count: int) -> TopK:
    """Over-fetch until every query has k documents outside its banned rows, or the index has no more to give.

    Args:
        search: k -> TopK for all queries.
        banned: rows to leave out, per query.
        k: documents wanted.
        count: size of the index.
    """
    fetch = min(count, k + max((len(rows) for rows in banned), default=0))
    while True:
        top = search(max(fetch, 1))
        keep = top.valid.copy()
        for row, out in enumerate(banned):
            if out:
                keep[row] &= ~np.isin(top.rows[row], np.fromiter(out, dtype=np.int64))
        if fetch >= count or bool((keep.sum(axis=1) >= k).all()):
            return _first(top, keep, k)
        fetch = min(count, fetch * 2)


def _first(top: TopK, keep: NDArray[np.bool_], k: int) -> TopK:
    """The first k kept places of each list, moved together."""
    positions = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, positions, axis=1)
    rows = np.full((len(keep), k), NO_ROW, dtype=np.int64)
    scores = np.full((len(keep), k), -np.inf, dtype=np.float32)
    width = positions.shape[1]
    rows[:, :width] = np.where(kept, np.take_along_axis(top.rows, positions, axis=1), NO_ROW)
    scores[:, :width] = np.where(kept, np.take_along_axis(top.scores, positions, axis=1), -np.inf)
    return TopK(rows, scores, rows >= 0, top.table)


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
    for start in range(0, count, _GRAPH_QUERIES):
        stop = min(count, start + _GRAPH_QUERIES)
        top = neighbours(start, stop)
        keep = top.valid & (top.rows != np.arange(start, stop)[:, None])
        others = _first(top, keep, k)
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


def folder_of(path: str | Path) -> Path:
    """A folder to write into; UsageError when the name belongs to a file."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder for the index.")
    return folder
