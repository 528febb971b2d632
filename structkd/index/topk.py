"""TopK, what every search returns: lists in ranking order, with invalid places; ranking, exclusions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError
from structkd.ids import Ids
from structkd.ordering import order
from structkd.trec import Run

NO_ROW = -1


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
            return first_kept(top, keep, k)
        fetch = min(count, fetch * 2)


def first_kept(top: TopK, keep: NDArray[np.bool_], k: int) -> TopK:
    """The first k kept places of each list, moved together."""
    positions = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, positions, axis=1)
    rows = np.full((len(keep), k), NO_ROW, dtype=np.int64)
    scores = np.full((len(keep), k), -np.inf, dtype=np.float32)
    width = positions.shape[1]
    rows[:, :width] = np.where(kept, np.take_along_axis(top.rows, positions, axis=1), NO_ROW)
    scores[:, :width] = np.where(kept, np.take_along_axis(top.scores, positions, axis=1), -np.inf)
    return TopK(rows, scores, rows >= 0, top.table)
