"""Sort the pairs of several parts by key and make them distinct, within the tolerance of the teacher's dtype."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import ConflictingScoresError
from structkd.scores.layout.id_table import IdTable
from structkd.scores.layout.parts import PairPart, split_keys
from structkd.scores.layout.shards import Shards
from structkd.scores.layout.snapshot import Csr

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
    name: Callable[[int, int], tuple[str, str]],
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
    if (keys[1:] > keys[:-1]).all():
        return Merged(keys, scores, 0)
    order = np.argsort(keys, kind="stable")  # parts are sorted, so this merges runs
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
            f"compact with on_conflict='first' or 'mean' to accept that.",
            shown[0],
        )
    if on_conflict == "mean":
        counts = np.diff(np.append(starts, len(keys)))
        values = (np.add.reduceat(ordered.astype(np.float64), starts) / counts).astype(np.float32)
    else:
        values = scores[np.minimum.reduceat(order, starts)]
    return Merged(keys[starts], values, len(keys) - len(starts))


def join(parts: Iterable[PairPart], first: int, last: int) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Keys and scores of the parts whose query row lies in first .. last-1.

    They come in unit order; parts whose keys do not overlap come in key order instead, which saves sorting them.
    """
    pieces: list[tuple[NDArray[np.uint64], NDArray[np.float32]]] = []
    for part in parts:
        low, high = np.searchsorted(part.query_rows, [first, last]) if len(part.query_rows) else (0, 0)
        if high > low:
            keys = part.query_rows[low:high].astype(np.uint64) << np.uint64(32)
            keys |= part.document_rows[low:high]
            pieces.append((keys, part.scores[low:high]))
    by_key = sorted(pieces, key=lambda piece: int(piece[0][0]))
    if all(before[0][-1] < after[0][0] for before, after in pairwise(by_key)):
        pieces = by_key
    keys = np.concatenate([np.empty(0, np.uint64), *(keys for keys, _ in pieces)])
    return keys, np.concatenate([np.empty(0, np.float32), *(scores for _, scores in pieces)])


def not_in(shards: Shards, merged: Merged, *, dtype: str, teacher_dtype: str, folder: Path) -> Merged:
    """The pairs that the shards lack; ConflictingScoresError where a pair has another value there.

    Args:
        shards: what is stored.
        merged: newer pairs.
        dtype: of the stored scores; half floats may differ by their rounding.
        teacher_dtype: sets the tolerance.
        folder: of the store.
    """
    queries, documents = split_keys(merged.keys)
    positions = shards.positions(queries, documents)
    twice = positions >= 0
    if not twice.any():
        return merged
    stored, fresh = shards.take(positions[twice]), merged.scores[twice]
    rounding = np.abs(stored, dtype=np.float64) * 2.0**-10 if dtype == "float16" else 0.0
    bad = np.flatnonzero(np.abs(stored.astype(np.float64) - fresh) > tolerance(teacher_dtype, fresh) + rounding)
    if len(bad):
        at = np.flatnonzero(twice)[bad[0]]
        pair = namer(folder)(int(queries[at]), int(documents[at]))
        raise ConflictingScoresError(
            f"{folder}: {len(bad)} pairs have another score in a newer part than in the snapshot, for example "
            f"{pair}: {stored[bad[0]]:.6g} and {fresh[bad[0]]:.6g}. Compact with on_conflict='first' or 'mean'.",
            pair,
        )
    return Merged(merged.keys[~twice], merged.scores[~twice], merged.dropped + len(stored))


def namer(folder: Path) -> Callable[[int, int], tuple[str, str]]:
    """Shows a pair of rows by its ids (the tables are read when a message needs them)."""

    def name(query: int, document: int) -> tuple[str, str]:
        return IdTable(folder / "ids", "queries").ids[query], IdTable(folder / "ids", "docs").ids[document]

    return name
