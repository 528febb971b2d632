"""TREC files: runs (six columns, or the four-column `query doc rank score`) and their writer."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.ordering import order_ids
from structkd.packed import BROKEN, open_packed, open_text, text_writer

_COLUMNS = {6: (0, 2, 3, 4), 4: (0, 1, 2, 3)}  # columns -> positions of query, document, rank, score


@dataclass(frozen=True)
class Run:
    """A ranked list per query.

    Attributes:
        lists: query id -> (document ids, scores float64), in ranking order (score descending, id ascending)
            unless the run was read with `by_rank`, then in the file's rank order.
    """

    lists: dict[str, tuple[list[str], NDArray[np.float64]]]

    def __len__(self) -> int:
        return sum(len(documents) for documents, _ in self.lists.values())

    def pairs(self) -> tuple[list[str], list[str], NDArray[np.float64]]:
        """Flat columns: query ids, document ids, scores."""
        queries = [query for query, (documents, _) in self.lists.items() for _ in documents]
        documents = [document for documents, _ in self.lists.values() for document in documents]
        scores = [scores for _, scores in self.lists.values()]
        return queries, documents, np.concatenate(scores) if scores else np.empty(0)

    def cut(self, depth: int) -> "Run":
        """The first `depth` documents of each list."""
        return Run({query: (documents[:depth], scores[:depth]) for query, (documents, scores) in self.lists.items()})


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of a UTF-8 text file, plain, gzip or zstd, without byte order mark and line ends; blank
    lines are skipped."""
    with open_text(path) as handle:
        number = 0
        try:
            for number, line in enumerate(handle, start=1):
                line = line.rstrip("\n")
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:  # decoded ahead, so the line is still to be found
            raise DataError(f"{path}:{_undecodable(path)}: cannot be read as UTF-8 text ({error.reason}).") from None
        except BROKEN as error:
            raise DataError(f"{path}:{number + 1}: cannot be read to its end ({error}). Was it cut short?") from None


def _undecodable(path: str | Path) -> int:
    """The first line that is no UTF-8."""
    with open_packed(path) as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def read_run(path: str | Path, *, by_rank: bool = False) -> Run:
    """Read a run; columns are separated by tabs or any white space.

    Args:
        path: six columns `query Q0 document rank score tag` or four `query document rank score`; plain or gzip.
        by_rank: order by the rank column and ignore the scores (re-rankers often leave the first stage's scores).

    Raises:
        DataError: with file and line: wrong column count, a score or rank that is no number, a pair named twice.
    """
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    width = 0
    for number, line in read_lines(path):
        columns = line.split("\t") if line.count("\t") in (3, 5) else line.split()
        width = width or len(columns)
        if len(columns) != width or width not in _COLUMNS:
            both = "6 (query Q0 document rank score tag) or 4 (query document rank score)"
            expected = width if width in _COLUMNS else both
            raise DataError(f"{path}:{number}: found {len(columns)} columns, expected {expected}.")
        query, document, rank_text, score_text = (columns[i].strip() for i in _COLUMNS[width])
        try:
            rank, score = float(rank_text), float(score_text)
        except ValueError:
            raise DataError(f"{path}:{number}: rank {rank_text!r} and score {score_text!r} must be numbers.") from None
        if not math.isfinite(score):
            raise DataError(f"{path}:{number}: score {score_text!r} is not finite. Remove the line or mend the run.")
        listed = rows.setdefault(query, {})
        if document in listed:
            raise DataError(f"{path}:{number}: query {query!r} lists document {document!r} twice. Remove one line.")
        listed[document] = (rank, score)
    lists = {}
    for query, listed in rows.items():
        documents = list(listed)
        scores = np.asarray([listed[document][1] for document in documents], dtype=np.float64)
        keys = np.asarray([-listed[document][0] for document in documents]) if by_rank else scores
        positions = order_ids(keys, documents)
        lists[query] = ([documents[i] for i in positions], scores[positions])
    return Run(lists)


def write_run(path: str | Path, run: Run, tag: str = "structkd") -> None:
    """Write six TREC columns atomically, ranks from 1, in the order of the run; scores keep float64 digits.

    A name that ends in .gz or .zst is packed.

    Raises:
        DataError: an id holds white space, which separates the columns.
    """
    write_lists(path, run.lists.items(), tag)


def write_lists(
    path: str | Path, lists: Iterable[tuple[str, tuple[list[str], NDArray[np.float64]]]], tag: str = "structkd"
) -> None:
    """`write_run` of lists that come one by one."""
    with text_writer(path) as handle:
        for query, (documents, scores) in lists:
            for name, what in ((query, "query"), *((document, "document") for document in documents)):
                if len(name.split()) != 1:
                    raise DataError(f"{path}: {what} id {name!r} holds white space, which separates a run's columns.")
            handle.writelines(
                f"{query} Q0 {document} {rank} {score!r} {tag}\n"
                for rank, (document, score) in enumerate(zip(documents, scores.tolist(), strict=True), start=1)
            )


def run_of(query_ids: Sequence[str], document_ids: Sequence[str], scores: NDArray[np.floating]) -> Run:
    """Group flat columns into a run in ranking order; DataError when a pair occurs twice."""
    grouped: dict[str, dict[str, float]] = {}
    for query, document, score in zip(query_ids, document_ids, scores, strict=True):
        listed = grouped.setdefault(query, {})
        if document in listed:
            raise DataError(f"query {query!r} lists document {document!r} twice.")
        listed[document] = float(score)
    lists = {}
    for query, listed in grouped.items():
        documents, values = list(listed), np.asarray(list(listed.values()), dtype=np.float64)
        positions = order_ids(values, documents)
        lists[query] = ([documents[i] for i in positions], values[positions])
    return Run(lists)
