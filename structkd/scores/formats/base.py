"""What readers give and writers take: blocks of score columns, ranked lists, and the small parsers that formats share.

A reader is a generator of `ScoreTable` blocks, so that a file of any size is imported in constant memory; a writer
goes through the lists of a store one after another.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.ordering import order_ids
from structkd.progress import track
from structkd.scores.bundle import plain_integers
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.trec import read_lines

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Strings = list[str]
ScoreKind = Literal["score", "margin", "rank"]

BLOCK_ROWS = 1 << 17


@dataclass(frozen=True)
class ScoreTable:
    """Scores of pairs as flat columns, of a whole file or of a block of it; a pair may be named twice.

    Attributes:
        query_ids: [pairs] strings.
        document_ids: [pairs] strings.
        scores: [pairs], finite.
        kind: score: the teacher's own; margin: only differences within a query mean something; rank: only the
            order does (scores are -1, -2, ... by rank).
        query_texts: [pairs] where the file holds texts.
        document_texts: [pairs] where the file holds texts.
        notes: what the user should know about the file; a block tells what was not told before it.
        lines: [pairs] where each pair stands in the file: line numbers from 1, or row numbers of a table from 0.
        unit: what `lines` counts.
    """

    query_ids: pa.Array
    document_ids: pa.Array
    scores: FloatArray
    kind: ScoreKind = "score"
    query_texts: pa.Array | None = None
    document_texts: pa.Array | None = None
    notes: tuple[str, ...] = ()
    lines: IntArray | None = None
    unit: Literal["line", "row"] = "line"

    def __len__(self) -> int:
        return len(self.query_ids)

    def with_texts(
        self, queries: Callable[[list[str]], list[str]], documents: Callable[[list[str]], list[str]]
    ) -> "ScoreTable":
        """The same pairs with the texts that two functions give to distinct ids."""
        columns = []
        for ids, texts in ((self.query_ids, queries), (self.document_ids, documents)):
            coded = ids.dictionary_encode()
            columns.append(pa.array(texts(coded.dictionary.to_pylist()), pa.string()).take(coded.indices))
        return replace(self, query_texts=columns[0], document_texts=columns[1])

    def places_of(self, query: str, document: str) -> list[int]:
        """Positions of one pair."""
        here = pc.and_(pc.equal(self.query_ids, query), pc.equal(self.document_ids, document))
        return [int(at) for at in np.flatnonzero(here.to_numpy(zero_copy_only=False))]

    def place(self, at: int) -> str:
        """Where in the file a position stands, to put behind the file's name."""
        if self.lines is None:
            return ""
        return f":{self.lines[at]}" if self.unit == "line" else f": row {self.lines[at]}"


Blocks = Iterator[ScoreTable]


def joined(blocks: Iterable[ScoreTable]) -> ScoreTable:
    """One table of all blocks."""
    held = list(blocks)
    if not held:
        return Rows().take()

    def column(name: str) -> Any:
        parts = [getattr(block, name) for block in held]
        if parts[0] is None:
            return None
        return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.concat_arrays(parts)

    names = ("query_ids", "document_ids", "scores", "query_texts", "document_texts", "lines")
    notes = tuple(note for block in held for note in block.notes)
    return replace(held[0], notes=notes, **{name: column(name) for name in names})


@dataclass(frozen=True)
class NodeTable:
    """Logits of nodes."""

    logits: NDArray[np.float32]
    graph_fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass
class Rows:
    """A block under construction."""

    path: Path = Path()
    kind: ScoreKind = "score"
    queries: Strings = field(default_factory=list)
    documents: Strings = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    query_texts: Strings | None = None
    document_texts: Strings | None = None

    @property
    def full(self) -> bool:
        """Whether the block should be taken."""
        return len(self.queries) >= BLOCK_ROWS

    def add(self, query: str, document: str, score: float, line: int = 0) -> None:
        """One pair."""
        self.queries.append(query)
        self.documents.append(document)
        self.scores.append(score)
        self.lines.append(line)

    def add_list(self, query: str, documents: Sequence[Any], scores: Sequence[Any], line: int) -> None:
        """A query's list as it came out of JSON: its ids and scores are checked here."""
        if not {type(one) for one in documents} <= {str, int} or "" in documents:
            documents = [identifier(one, f"{self.path}:{line}") for one in documents]
        if not {type(one) for one in scores} <= {float} or not all(map(math.isfinite, scores)):
            scores = [number(one, f"{self.path}:{line}") for one in scores]
        self.queries.extend([query] * len(documents))
        self.documents.extend(map(str, documents))
        self.scores.extend(scores)
        self.lines.extend([line] * len(documents))

    def take(self, notes: Sequence[str] = ()) -> ScoreTable:
        """The finished block; the next one begins."""
        table = ScoreTable(
            pa.array(self.queries, pa.string()),
            pa.array(self.documents, pa.string()),
            np.asarray(self.scores, dtype=np.float64),
            self.kind,
            None if self.query_texts is None else pa.array(self.query_texts, pa.string()),
            None if self.document_texts is None else pa.array(self.document_texts, pa.string()),
            tuple(notes),
            np.asarray(self.lines, dtype=np.int64),
        )
        for column in (self.queries, self.documents, self.scores, self.lines, self.query_texts, self.document_texts):
            if column is not None:
                column.clear()
        return table


@dataclass(frozen=True)
class Lists:
    """What pair writers get: ranked lists and, when a collection is at hand, its texts.

    Attributes:
        lists: query id -> (document ids, scores), best first; a store's are made one by one.
        query_texts: query id -> text.
        document_texts: document id -> text.
        model: the teacher's name.
    """

    lists: Mapping[str, tuple[Strings, FloatArray]]
    query_texts: Mapping[str, str] | None = None
    document_texts: Mapping[str, str] | None = None
    model: str = "structkd"

    def items(self) -> Iterator[tuple[str, tuple[Strings, FloatArray]]]:
        """(query id, (document ids, scores)) of every list, for writing: shows how far it is."""
        return track(self.lists.items(), "writing lists", late=True)


class StoreLists(Mapping[str, tuple[Strings, FloatArray]]):
    """The lists of a store in ranking order, made when they are asked for: constant memory."""

    def __init__(self, store: PairScores) -> None:
        self.store = store
        self._queries = dict.fromkeys(store.query_ids)
        self.pairs = store.num_shown

    def __len__(self) -> int:
        return len(self._queries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._queries)

    def __getitem__(self, query: str) -> tuple[Strings, FloatArray]:
        if query not in self._queries:
            raise KeyError(query)
        documents, scores = self.store.list(query)
        return documents, scores.astype(np.float64)


def lists_of(store: PairScores) -> dict[str, tuple[Strings, FloatArray]]:
    """Every list of a store in ranking order, all in memory."""
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
    if isinstance(text, bool) or (isinstance(text, str) and "_" in text):  # Python reads 1_0 as ten
        raise DataError(f"{where}: {what} {text!r} is not a number.")
    if not math.isfinite(value):
        raise DataError(f"{where}: {what} {text!r} is not a finite number.")
    return value


def identifier(value: Any, where: str, what: str = "document") -> str:
    """A string id; whole numbers become their decimal, everything else is refused."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise DataError(f"{where}: {what} id {value!r}; expected a non-empty string or a whole number.")
    return str(value)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a file with one JSON value a line."""
    for line_number, line in read_lines(path):
        try:
            yield line_number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{line_number}: not JSON ({error}). Was the file cut short?") from None


def json_names(lists: Lists) -> tuple[type, type]:
    """What turns query ids and document ids into JSON values: int when every one is the plain decimal of its number."""
    queries = int if plain_integers(list(lists.lists)) is not None else str
    if isinstance(lists.lists, StoreLists):
        names: Sequence[str] = lists.lists.store.document_ids
    else:
        names = list(dict.fromkeys(name for found, _ in lists.lists.values() for name in found))
    return queries, int if plain_integers(names) is not None else str
