"""What readers give and writers take: plain tables of scores, and the small parsers that several formats share."""

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.ordering import order_ids
from structkd.scores.bundle import plain_integers
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.trec import read_lines

FloatArray = NDArray[np.float64]
Strings = list[str]
ScoreKind = Literal["score", "margin", "rank"]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of pairs as flat columns; a pair may be named twice (equal values merge on import).

    Attributes:
        query_ids: [pairs].
        document_ids: [pairs].
        scores: [pairs].
        kind: score: the teacher's own; margin: only differences within a query mean something; rank: only the
            order does (scores are -1, -2, ... by rank).
        query_texts: [pairs] where the file holds texts.
        document_texts: [pairs] where the file holds texts.
        notes: what the user should know about the file.
    """

    query_ids: Strings
    document_ids: Strings
    scores: FloatArray
    kind: ScoreKind = "score"
    query_texts: Strings | None = None
    document_texts: Strings | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.query_ids)


@dataclass(frozen=True)
class NodeTable:
    """Logits of nodes."""

    logits: NDArray[np.float32]
    graph_fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass
class Rows:
    """Columns under construction."""

    queries: Strings = field(default_factory=list)
    documents: Strings = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, query: str, document: str, score: float) -> None:
        """One pair."""
        self.queries.append(query)
        self.documents.append(document)
        self.scores.append(score)

    def table(self, kind: ScoreKind = "score", notes: Sequence[str] = ()) -> ScoreTable:
        """The finished table."""
        return ScoreTable(
            self.queries, self.documents, np.asarray(self.scores, dtype=np.float64), kind, notes=tuple(notes)
        )


@dataclass(frozen=True)
class Lists:
    """What pair writers get: ranked lists of a store and, when a collection is at hand, its texts.

    Attributes:
        lists: query id -> (document ids, scores), best first.
        query_texts: query id -> text.
        document_texts: document id -> text.
        model: the teacher's name.
    """

    lists: Mapping[str, tuple[Strings, FloatArray]]
    query_texts: Mapping[str, str] | None = None
    document_texts: Mapping[str, str] | None = None
    model: str = "structkd"


def lists_of(store: PairScores) -> dict[str, tuple[Strings, FloatArray]]:
    """Every list of a store in ranking order."""
    queries, documents, scores = store.rows()
    starts = np.flatnonzero(np.diff(queries, prepend=-1))
    ids = store.documents.ids
    out = {}
    for start, end in zip(starts, [*starts[1:], len(queries)], strict=True):
        names = [ids[row] for row in documents[start:end]]
        values = scores[start:end].astype(np.float64)
        ranking = order_ids(values, names)
        out[store.queries.ids[queries[start]]] = ([names[i] for i in ranking], values[ranking])
    return out


def nodes_of(store: NodeScores) -> NodeTable:
    """The logits of a store."""
    return NodeTable(store.logits, store.graph_fingerprint)


def number(text: Any, where: str, what: str = "score") -> float:
    """A finite float; DataError otherwise."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {what} {text!r} is not a number.") from None
    if isinstance(text, bool) or not math.isfinite(value):
        raise DataError(f"{where}: {what} {text!r} is not a finite number.")
    return value


def identifier(value: Any, where: str, what: str = "document") -> str:
    """A string id; whole numbers become their decimal, everything else is refused."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: {what} id {value!r}; expected a non-empty string or a whole number.")
    return str(value)


def columns(path: Path, width: int, names: str) -> Iterator[tuple[str, list[str]]]:
    """("file:line", columns) of a tab-separated file; DataError for another number of columns."""
    for line_number, line in read_lines(path):
        parts = line.split("\t")
        if len(parts) != width:
            raise DataError(f"{path}:{line_number}: found {len(parts)} columns, expected {width} ({names}).")
        yield f"{path}:{line_number}", parts


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of a file with one JSON value a line."""
    for line_number, line in read_lines(path):
        try:
            yield f"{path}:{line_number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line_number}: not JSON ({error}). Was the file cut short?") from None


def open_bytes(path: Path) -> bytes:
    """All bytes of a file, unpacked when gzip."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataError(f"{path}: gzip data is damaged or cut short ({error}).") from None


def json_ids(ids: Sequence[str]) -> list[Any]:
    """Ids for JSON: numbers when every one is the plain decimal of its number, as the public files have them."""
    numbers = plain_integers(ids)
    return list(ids) if numbers is None else numbers.tolist()


def json_names(lists: Lists) -> tuple[dict[str, Any], dict[str, Any]]:
    """Query id -> JSON id and document id -> JSON id, numbers only when all are."""
    queries = list(lists.lists)
    documents = list(dict.fromkeys(name for names, _ in lists.lists.values() for name in names))
    return dict(zip(queries, json_ids(queries), strict=True)), dict(zip(documents, json_ids(documents), strict=True))
