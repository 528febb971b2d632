"""Sort the pairs of several parts by key and make them distinct, within the tolerance of the teacher's dtype."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import ConflictingScoresError
from structkd.scores.id_table import IdTable
from structkd.scores.parts import PairPart, read_row_part, split_keys
from structkd.scores.snapshot import Csr

OnConflict = Literal["error", "first", "mean"]

# absolute and relative step that one more run of the same teacher may differ by
_TOLERANCE = {"float64": (1e-3, 1e-6), "float32": (1e-3, 1e-6), "bfloat16": (1e-2, 1.6e-2), "bf16": (1e-2, 1.6e-2)}
_LOW_PRECISION = (1e-2, 2e-3)


@dataclass(frozen=True)
class Merged:
    """Distinct pairs in key order, and what merging them dropped."""

    keys: NDArray[np.uint64]
    scores: NDArray[np.float32]
    dropped: int

    def csr(self) -> Csr:
        """As lists."""
        queries, documents = split_keys(self.keys)
        starts = first_of_each(queries)
        offsets = np.concatenate([starts, [len(queries)]]).astype(np.int32)
        return Csr(queries[offsets[:-1]].astype(np.uint32), offsets, documents.astype(np.uint32), self.scores)


def first_of_each(ordered: NDArray[Any]) -> NDArray[np.int64]:
    """Position of the first of each run of equal values."""
    first = np.ones(len(ordered), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(first)


def tolerance(dtype: str, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far two scores of one pair may lie apart when the teacher computes in `dtype`."""
    absolute, relative = _TOLERANCE.get(dtype, _LOW_PRECISION)
    return np.asarray(absolute + relative * np.abs(values, dtype=np.float64))


def merge(
    keys: NDArray[np.uint64],
    scores: NDArray[np.float32],
    *,
    dtype: str,
    on_conflict: OnConflict = "error",
    tol: float | None = None,
    where: str,
    name: Callable[[int, int], object],
) -> Merged:
    """Sort pairs by key and make them distinct.

    Args:
        keys: uint64 [pairs], query row << 32 | document row, in the order that `first` means.
        scores: float32 [pairs].
        dtype: the teacher's compute dtype; sets the tolerance.
        on_conflict: what to do with two values of one pair that differ by more than the tolerance.
        tol: absolute tolerance instead of the dtype's.
        where: for the message.
        name: shows a pair in the message.

    Raises:
        ConflictingScoresError: on_conflict is "error" and values differ: the teacher is not deterministic.
    """
    order = np.argsort(keys)
    keys = keys[order]
    starts = first_of_each(keys)
    if len(starts) == len(keys):
        return Merged(keys, scores[order], 0)
    ordered = scores[order]
    lowest, highest = np.minimum.reduceat(ordered, starts), np.maximum.reduceat(ordered, starts)
    delta = highest.astype(np.float64) - lowest
    limit = tolerance(dtype, highest) if tol is None else np.full(len(delta), tol)
    if on_conflict == "error" and (bad := np.flatnonzero(delta > limit)).size:
        shown = [name(*(int(row[0]) for row in split_keys(keys[starts[i] : starts[i] + 1]))) for i in bad[:3]]
        raise ConflictingScoresError(
            f"{where}: {len(bad)} pairs were scored twice with different values (largest difference "
            f"{delta.max():.6g}), for example {', '.join(map(str, shown))}. The teacher is not deterministic; "
            f"compact with on_conflict='first' or 'mean' to accept that."
        )
    if on_conflict == "mean":
        counts = np.diff(np.append(starts, len(keys)))
        values = (np.add.reduceat(ordered.astype(np.float64), starts) / counts).astype(np.float32)
    else:
        values = scores[np.minimum.reduceat(order, starts)]
    return Merged(keys[starts], values, len(keys) - len(starts))


def join(parts: Iterable[PairPart], first: int, last: int) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Keys and scores of the parts whose query row lies in first .. last-1, in unit order."""
    keys, scores = [np.empty(0, np.uint64)], [np.empty(0, np.float32)]
    for part in parts:
        inside_range = (part.query_rows >= first) & (part.query_rows < last)
        pick = slice(None) if inside_range.all() else inside_range
        queries = part.query_rows[pick].astype(np.uint64)
        keys.append((queries << np.uint64(32)) | part.document_rows[pick])
        scores.append(part.scores[pick])
    return np.concatenate(keys), np.concatenate(scores)


def namer(folder: Path) -> Callable[[int, int], object]:
    """Shows a pair of rows by its ids (the tables are read when a message needs them)."""

    def name(query: int, document: int) -> object:
        return IdTable(folder / "ids", "queries").ids[query], IdTable(folder / "ids", "docs").ids[document]

    return name


def gather(
    folder: Path, ranges: Iterable[tuple[int, int, str]], low: int, high: int, classes: int, dtype: str
) -> NDArray[np.float32]:
    """Logits of the nodes low .. high-1 from parts; ConflictingScoresError when overlapping parts disagree."""
    out = np.full((high - low, classes), np.nan, dtype=np.float32)
    for start, end, name in sorted(ranges, key=lambda item: item[2]):
        first, last = max(low, start), min(high, end)
        if first >= last:
            continue
        values = read_row_part(folder, name).values[first - start : last - start]
        target = out[first - low : last - low]
        known = ~np.isnan(target)
        delta = np.abs(target[known].astype(np.float64) - values[known])
        if (delta > tolerance(dtype, values[known])).any():
            raise ConflictingScoresError(
                f"{folder}: nodes {first}-{last - 1} were scored twice with different logits (largest difference "
                f"{delta.max():.6g}). The teacher is not deterministic; delete parts/{name}.parquet to keep the other."
            )
        target[~known] = values[~known]
    return out
