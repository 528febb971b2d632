"""Training files of 2020: a line holds a query, a positive and a negative with their scores, as ids or as texts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from structkd.errors import DataError, UsageError
from structkd.ids import text_hash
from structkd.packed import text_writer
from structkd.scores.formats.base import Blocks, Lists, ScoreTable
from structkd.scores.formats.delimited import Columns, Kind, Layout, read_columns
from structkd.scores.pairs import PairScores
from structkd.trec import read_lines

_IDS: Mapping[str, Kind] = {
    "pos_score": "number", "neg_score": "number", "query_id": "id", "pos_pid": "id", "neg_pid": "id",
}  # fmt: skip
_TEXTS: Mapping[str, Kind] = {
    "pos_score": "number", "neg_score": "number", "query": "text", "pos_text": "text", "neg_text": "text",
}  # fmt: skip
_DECIMAL = r"^[-+]?[0-9]*\.[0-9]+([eE][-+]?[0-9]+)?$"

# margin-tsv-ids


def read_margin_tsv_ids(path: Path) -> Blocks:
    """Five tab-separated columns `pos_score neg_score query_id pos_pid neg_pid`, no header."""
    rows = won = 0
    for columns in read_columns(path, Layout(_IDS)):
        if not rows:
            _refuse_swapped(path, columns)
        rows += len(columns.lines)
        won += int((columns.numbers["pos_score"] > columns.numbers["neg_score"]).sum())
        yield _both(columns, "query_id", "pos_pid", "neg_pid")
    if rows and won < rows / 2:
        note = f"{path}: the positive outscores the negative in only {won} of {rows} lines; are the columns swapped?"
        yield _note(note)


def _refuse_swapped(path: Path, columns: Columns) -> None:
    """Ids before scores: the columns of scores hold whole numbers, those of ids decimals."""
    whole = all((column == np.floor(column)).all() for column in columns.numbers.values())
    decimal = pc.match_substring_regex(columns.texts["neg_pid"], _DECIMAL)
    if whole and len(columns.lines) and pc.sum(decimal).as_py() > len(columns.lines) / 2:
        at = decimal.index(True).as_py()
        raise DataError(
            f"{path}:{columns.lines[at]}: neg_pid {columns.texts['neg_pid'][at].as_py()!r} looks like a score and "
            f"pos_score {columns.numbers['pos_score'][at]:.0f} like an id; expected {', '.join(_IDS)}. Reorder them."
        )


def _both(columns: Columns, query: str, positive: str, negative: str) -> ScoreTable:
    """Two pairs of each line."""
    texts = columns.texts
    return ScoreTable(
        pa.concat_arrays([texts[query]] * 2),
        pa.concat_arrays([texts[positive], texts[negative]]),
        np.concatenate([columns.numbers["pos_score"], columns.numbers["neg_score"]]),
        lines=np.concatenate([columns.lines] * 2),
    )


def _note(text: str) -> ScoreTable:
    """A block without pairs."""
    nothing = pa.array([], pa.string())
    return ScoreTable(nothing, nothing, np.empty(0), notes=(text,), lines=np.empty(0, np.int64))


def write_margin_tsv_ids(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive against every other one of it."""
    with text_writer(path) as handle:
        for query, (documents, scores) in lists.items():
            refuse_short(path, query, documents)
            for name in (query, *documents):
                if name.strip() != name or set(name) & set("\t\n\r"):
                    raise DataError(f"{path}: id {name!r} has a tab, a line end or blanks around it; rename it.")
            values = scores.tolist()
            handle.writelines(
                f"{values[0]!r}\t{score!r}\t{query}\t{documents[0]}\t{document}\n"
                for document, score in zip(documents[1:], values[1:], strict=True)
            )


def write_margin_triples(path: Path, store: PairScores, triples: Path, block: int = 1 << 16) -> int:
    """`pos_score neg_score query_id pos_pid neg_pid` for each triple of a file, in its order; returns how many.

    Raises:
        DataError: a line of another number of columns.
        MissingScoreError: the store lacks a pair.
    """
    held: list[list[str]] = []
    count = 0
    with text_writer(path) as handle:

        def flush() -> None:
            if not held:
                return
            queries, positives, negatives = (list(column) for column in zip(*held, strict=True))
            scores = [store.lookup(queries, documents).tolist() for documents in (positives, negatives)]
            for line in zip(*scores, queries, positives, negatives, strict=True):
                handle.write("\t".join(map(str, line)) + "\n")
            held.clear()

        for line_number, line in read_lines(triples):
            parts = line.split("\t") if line.count("\t") == 2 else line.split()
            if len(parts) != 3:
                raise DataError(
                    f"{triples}:{line_number}: found {len(parts)} columns, expected query, positive, negative."
                )
            held.append(parts)
            count += 1
            if len(held) == block:
                flush()
        flush()
    return count


def refuse_short(path: Path, query: str, documents: list[str]) -> None:
    """DataError when a list has no second document to stand against its best."""
    if len(documents) < 2:
        raise DataError(
            f"{path}: query {query!r} has a single document; a file of positives against negatives cannot hold it. "
            "Use --format trec-run."
        )


# margin-tsv-text


def read_margin_tsv_text(path: Path) -> Blocks:
    """Five tab-separated columns `pos_score neg_score query pos_text neg_text`; ids are the hashes of the texts."""
    for columns in read_columns(path, Layout(_TEXTS)):
        table = _both(columns, "query", "pos_text", "neg_text")
        yield ScoreTable(
            hash_ids(table.query_ids),
            hash_ids(table.document_ids),
            table.scores,
            query_texts=table.query_ids,
            document_texts=table.document_ids,
            lines=table.lines,
        )


def hash_ids(texts: pa.Array) -> pa.Array:
    """The id of a text that has none: its hash."""
    coded = texts.dictionary_encode()
    hashes = [text_hash(text).hex() for text in coded.dictionary.to_pylist()]
    return pa.array(hashes, pa.string()).take(coded.indices)


def write_margin_tsv_text(path: Path, lists: Lists) -> None:
    """Each list's best document against every other one; tabs and line ends inside texts become spaces."""
    texts = Writable(lists, path)
    with text_writer(path) as handle:
        for query, (names, scores) in lists.items():
            refuse_short(path, query, names)
            values = scores.tolist()
            asked = " ".join(texts.query(query).split())
            found = [" ".join(text.split()) for text in texts.documents(names)]
            handle.writelines(
                f"{values[0]!r}\t{score!r}\t{asked}\t{found[0]}\t{text}\n"
                for text, score in zip(found[1:], values[1:], strict=True)
            )


class Writable:
    """The texts of what is written; an id without one is an error that says how to give it."""

    def __init__(self, lists: Lists, path: Path) -> None:
        if lists.query_texts is None or lists.document_texts is None:
            raise UsageError(f"{path}: this format holds texts, the store holds ids. Name their --collection.")
        self._queries, self._documents, self._path = lists.query_texts, lists.document_texts, path

    def query(self, name: str) -> str:
        """Text of a query."""
        return self._text(self._queries, name, "query")

    def documents(self, names: list[str]) -> list[str]:
        """Texts of documents."""
        return [self._text(self._documents, name, "document") for name in names]

    def _text(self, texts: Mapping[str, str], name: str, what: str) -> str:
        if name not in texts:
            raise DataError(f"{self._path}: {what} {name!r} is not in the collection. Name the one it comes from.")
        return texts[name]
