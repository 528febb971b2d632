"""Runs: one scored (or ranked) document a line, and BEIR's one JSON object of a whole run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import DataError
from structkd.packed import BROKEN, open_text, text_writer
from structkd.scores.formats.base import Blocks, Lists, Rows, ScoreTable, identifier, json_lines, number
from structkd.scores.formats.delimited import Columns, Kind, Layout, read_columns
from structkd.trec import read_lines, write_lists

_SIX: dict[str, Kind] = {
    "query_id": "id", "q0": "unused", "document_id": "id", "rank": "number", "score": "number", "tag": "unused",
}  # fmt: skip
_FOUR: dict[str, Kind] = {"query_id": "id", "document_id": "id", "rank": "number", "score": "number"}
_THREE: dict[str, Kind] = {"query_id": "id", "document_id": "id", "rank": "number"}

# trec-run


def read_trec_run(path: Path) -> Blocks:
    """Six columns `query Q0 document rank score tag`, or four `query document rank score`."""
    other = lists = 0
    for columns in read_columns(path, run_layout(path)):
        _whole_ranks(path, columns)
        found = _disagreements(columns)
        other, lists = other + found[0], lists + found[1]
        yield _pairs(columns, columns.numbers["score"])
    if other:
        note = (
            f"{path}: in {other} of {lists} lists the rank column disagrees with the scores; the scores "
            "count here. For a re-ranked run that kept its first stage's scores use --format rank-permutations."
        )
        yield Rows().take([note])


def run_layout(path: Path) -> Layout:
    """Layout of a run from its first line; DataError for another number of columns."""
    line_number, line = next(read_lines(path), (1, ""))
    tabs = line.count("\t") + 1
    width = tabs if tabs in (4, 6) else len(line.split())
    for columns in (_SIX, _FOUR):
        if width == len(columns):
            return Layout(columns, "\t" if width == tabs else None)
    raise DataError(
        f"{path}:{line_number}: found {width} columns, expected 6 (query Q0 document rank score tag) or 4 "
        "(query document rank score)."
    )


def _pairs(columns: Columns, scores: np.ndarray, kind: str = "score") -> ScoreTable:
    ids = columns.texts["query_id"], columns.texts["document_id"]
    return ScoreTable(*ids, scores, "rank" if kind == "rank" else "score", lines=columns.lines)


def _whole_ranks(path: Path, columns: Columns) -> None:
    """Decimals in the rank column: rank and score change places."""
    ranks = columns.numbers["rank"]
    if (bad := np.flatnonzero((ranks != np.floor(ranks)) | (ranks < 0))).size:
        at = bad[0]
        score = columns.numbers["score"][at] if "score" in columns.numbers else None
        hint = "" if score is None else f", the score is {score:g}: do the two columns change places?"
        raise DataError(f"{path}:{columns.lines[at]}: rank {ranks[at]:g}; expected 0, 1, 2, ...{hint}")


def _disagreements(columns: Columns) -> tuple[int, int]:
    """In how many lists of a block a document has a better score than one that stands above it, and how many lists."""
    coded = columns.texts["query_id"].dictionary_encode()
    queries = coded.indices.to_numpy()
    order = np.lexsort((columns.numbers["rank"], queries))
    scores, queries = columns.numbers["score"][order], queries[order]
    rising = (scores[1:] > scores[:-1]) & (queries[1:] == queries[:-1])
    return len(np.unique(queries[1:][rising])), len(coded.dictionary)


def write_trec_run(path: Path, lists: Lists) -> None:
    """Six columns, best first."""
    write_lists(path, lists.items(), tag=lists.model.replace(" ", "_") or "structkd")


# beir-run


def read_beir_run(path: Path) -> Blocks:
    """One JSON object {query: {document: score}}, query after query."""
    rows = Rows(path)
    for line, query, found in _items(path):
        where = f"{path}:{line}"
        if not isinstance(found, dict):
            raise DataError(f"{where}: query {query!r} holds a {type(found).__name__}, expected document -> score.")
        for document, score in found.items():
            if type(score) is not float:
                number(score, f"{where}: query {query!r}, document {document!r}")
        rows.add_list(identifier(query, where, "query"), list(found), list(map(float, found.values())), line)
        if rows.full:
            yield rows.take()
    yield rows.take()


def _items(path: Path) -> Iterator[tuple[int, Any, Any]]:
    """(line, key, value) of a JSON object in a file, of which one item at a time is in memory."""
    text = _Text(path)
    if text.peek() != "{":
        start = text.buffer[text.at : text.at + 20]
        raise DataError(f"{path}:{text.line}: found {start!r}, expected a JSON object of query -> document -> score.")
    text.skip("{")
    while text.peek() != "}":
        line = text.line
        key = text.value()
        if text.peek() != ":":
            raise text.broken("expected a colon")
        text.skip(":")
        yield line, key, text.value()
        if text.peek() == ",":
            text.skip(",")
        elif text.peek() != "}":
            raise text.broken("expected a comma or the object's end")
    text.skip("}")
    if text.peek():
        raise text.broken("something follows the object")


class _Text:
    """A JSON text that is read as far as it is needed."""

    def __init__(self, path: Path) -> None:
        self.path, self.buffer, self.at, self.line = path, "", 0, 1
        self._chunks = _chunks(path)
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self.at < len(self.buffer):
                letter = self.buffer[self.at]
                if not letter.isspace():
                    return letter
                self.skip(letter)
            if not self._more():
                return ""

    def skip(self, letter: str) -> None:
        """Go on behind a character."""
        self.at += len(letter)
        self.line += letter == "\n"

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.broken(error.msg) from None
                continue
            if end == len(self.buffer) and self._more():  # a number may go on
                continue
            self.line += self.buffer.count("\n", self.at, end)
            self.at = end
            return value

    def broken(self, why: str) -> DataError:
        """What is wrong at this place."""
        return DataError(
            f"{self.path}:{self.line}: not a JSON object of query -> document -> score ({why}). Was it cut short?"
        )

    def _more(self) -> bool:
        chunk = next(self._chunks, "")
        self.buffer, self.at = self.buffer[self.at :] + chunk, 0
        return bool(chunk)


def _chunks(path: Path) -> Iterator[str]:
    with open_text(path) as handle:
        size = 1 << 16
        try:
            while chunk := handle.read(size):
                yield chunk
                size = min(2 * size, 1 << 24)
        except (UnicodeDecodeError, *BROKEN) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from None


def write_beir_run(path: Path, lists: Lists) -> None:
    """One JSON object {query: {document: score}}."""
    with text_writer(path) as handle:
        before = "{"
        for query, (documents, scores) in lists.items():
            found = dict(zip(documents, scores.tolist(), strict=True))
            handle.write(f"{before}{_json(query)}: {_json(found)}")
            before = ", "
        handle.write("}\n" if before == ", " else "{}\n")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# rank-permutations


def read_rank_permutations(path: Path) -> Blocks:
    """Orders without scores: `query document rank` columns, a run whose ranks count, `[qid, pid, ...]` or
    {"query_id", "document_ids"} a line. Scores become -1, -2, ... by rank."""
    _, line = next(read_lines(path), (1, ""))
    if line.lstrip()[:1] in ("[", "{"):
        yield from _read_json_orders(path)
    elif 3 in (line.count("\t") + 1, len(line.split())):
        layout = Layout(_THREE, "\t" if line.count("\t") == 2 else None)
        yield from _read_ranks(path, layout)
    else:
        yield from _read_ranks(path, run_layout(path))
    yield Rows(kind="rank").take([f"{path}: only the order counts; scores are -1, -2, ... by rank"])


def _read_ranks(path: Path, layout: Layout) -> Blocks:
    shift = None
    for columns in read_columns(path, layout):
        _whole_ranks(path, columns)
        ranks = columns.numbers["rank"]
        if shift is None:
            shift = float(ranks.min(initial=1) == 0)  # some count from 0
        yield _pairs(columns, -(ranks + shift), "rank")


def _read_json_orders(path: Path) -> Blocks:
    rows = Rows(path, "rank")
    for line, value in json_lines(path):
        query, documents = _ordered(value, f"{path}:{line}")
        names = identifier(query, f"{path}:{line}", "query")
        rows.add_list(names, documents, [-float(rank) for rank in range(1, len(documents) + 1)], line)
        if rows.full:
            yield rows.take()
    yield rows.take()


def _ordered(value: Any, where: str) -> tuple[Any, list[Any]]:
    if isinstance(value, list) and len(value) > 1 and not any(isinstance(item, (list, dict)) for item in value):
        return value[0], value[1:]
    if isinstance(value, dict) and {"query_id", "document_ids"} <= value.keys():
        if isinstance(value["document_ids"], list):
            return value["query_id"], value["document_ids"]
        raise DataError(f"{where}: document_ids is a {type(value['document_ids']).__name__}, expected a list.")
    raise DataError(f"{where}: expected [qid, pid, ...] or an object with query_id and document_ids.")


def write_rank_permutations(path: Path, lists: Lists) -> None:
    """`query document rank`, tabs, ranks from 1 in ranking order."""
    with text_writer(path) as handle:
        for query, (names, _) in lists.items():
            for name in (query, *names):
                if set(name) & set("\t\n\r"):
                    raise DataError(f"{path}: id {name!r} has a tab or a line end in it; rename it.")
            handle.writelines(f"{query}\t{name}\t{rank}\n" for rank, name in enumerate(names, start=1))
