"""Shards: the lists of one or more CSR files searched as one table of pairs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.scores.layout._lookup import find_numba
from structkd.scores.layout.snapshot import Csr

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


class Shards:
    """CSR files side by side; a position numbers the pairs through all of them.

    Attributes:
        parts: the files' lists, empty ones left out.
        bases: [files + 1] position of each file's first pair.
    """

    def __init__(self, parts: Sequence[Csr]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.bases = np.cumsum([0, *(len(part) for part in self.parts)])
        self._slots: list[tuple[int, NDArray[np.int32]]] | None = None

    def __len__(self) -> int:
        return int(self.bases[-1])

    @property
    def ordered(self) -> bool:
        """Whether every file's queries lie behind those of the file before."""
        return all(before.query_rows[-1] < after.query_rows[0] for before, after in pairwise(self.parts))

    def slots(self) -> list[tuple[int, NDArray[np.int32]]]:
        """Per file: its first query row, and from there query row -> list number, -1 where it has none."""
        if self._slots is None:
            self._slots = [(int(part.query_rows[0]), _slots(part.query_rows)) for part in self.parts]
        return self._slots

    def positions(self, query_rows: IntArray, document_rows: IntArray) -> IntArray:
        """Position of each pair, -1 where it is absent."""
        query_rows = np.ascontiguousarray(query_rows, dtype=np.int64)
        document_rows = np.ascontiguousarray(document_rows, dtype=np.int64)
        out = np.full(len(query_rows), -1, dtype=np.int64)
        for part, (first, slots), base in zip(self.parts, self.slots(), self.bases[:-1], strict=True):
            own = query_rows - first if first else query_rows
            find_numba(slots, part.offsets, part.documents, own, document_rows, int(base), out)
        return out

    def take(self, positions: IntArray) -> FloatArray:
        """Scores at positions that the caller has checked."""
        if len(self.parts) == 1:
            return _gather(self.parts[0].scores, positions)
        out = np.empty(positions.shape, dtype=np.float32)
        for part, low, high in zip(self.parts, self.bases[:-1], self.bases[1:], strict=True):
            here = (positions >= low) & (positions < high)
            out[here] = _gather(part.scores, positions[here] - low)
        return out

    def list_rows(self, query_row: int) -> tuple[NDArray[np.uint32], FloatArray]:
        """Documents and scores of one query, in file order."""
        documents, scores = [np.empty(0, np.uint32)], [np.empty(0, np.float32)]
        for part, (first, slots) in zip(self.parts, self.slots(), strict=True):
            slot = slots[query_row - first] if 0 <= query_row - first < len(slots) else -1
            if slot >= 0:
                own = slice(part.offsets[slot], part.offsets[slot + 1])
                documents.append(part.documents[own])
                scores.append(part.scores[own].astype(np.float32))
        return np.concatenate(documents), np.concatenate(scores)

    def columns(self) -> tuple[NDArray[np.integer], NDArray[np.integer], FloatArray]:
        """Query rows, document rows, scores of every pair; ordered by query row."""
        columns = [
            (np.repeat(part.query_rows, np.diff(part.offsets)), part.documents[:], part.scores.astype(np.float32))
            for part in self.parts
        ]
        if not columns:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        queries, documents, scores = (np.concatenate(column) for column in zip(*columns, strict=True))
        if not self.ordered:
            order = np.lexsort((documents, queries))
            queries, documents, scores = queries[order], documents[order], scores[order]
        return queries, documents, scores


def _slots(query_rows: NDArray[np.uint32]) -> NDArray[np.int32]:
    first = int(query_rows[0])
    slots = np.full(int(query_rows[-1]) + 1 - first, -1, dtype=np.int32)
    slots[query_rows - np.uint32(first)] = np.arange(len(query_rows), dtype=np.int32)
    return slots


def _gather(scores: NDArray[np.floating], positions: NDArray[np.integer]) -> FloatArray:
    """Gather and widen; the range was checked, so clipping changes nothing and saves a second check."""
    out: Any = np.take(scores, positions, mode="clip").astype(np.float32, copy=False)
    return out  # type: ignore[no-any-return]
