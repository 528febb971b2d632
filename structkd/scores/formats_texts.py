"""Formats that hold texts, margins alone, pickles or nothing but an order."""

import gzip
import io
import json
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from structkd.errors import ConflictingScoresError, DataError, UsageError
from structkd.files import atomic_path
from structkd.ids import text_hash
from structkd.scores.formats_base import (
    Lists,
    Rows,
    ScoreTable,
    columns,
    identifier,
    json_lines,
    json_names,
    number,
    open_bytes,
)
from structkd.scores.formats_lists import refuse_short
from structkd.scores.formats_runs import open_parquet, scores_by_query
from structkd.trec import read_lines, read_run

_TEXT_COLUMNS = "pos_score, neg_score, query, pos_text, neg_text"
_MAX_PICKLE_BYTES = 1 << 34
_PICKLE_GLOBALS = {
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
}


class _Texts:
    """Rows under construction whose ids are the hashes of their texts, unless the file has ids."""

    def __init__(self) -> None:
        self.rows, self.queries, self.documents = Rows(), list[str](), list[str]()

    def add(self, query: str, document: str, score: float, query_id: str = "", document_id: str = "") -> None:
        self.rows.add(query_id or text_hash(query).hex(), document_id or text_hash(document).hex(), score)
        self.queries.append(query)
        self.documents.append(document)

    def table(self) -> ScoreTable:
        flat = self.rows.table()
        return ScoreTable(flat.query_ids, flat.document_ids, flat.scores, "score", self.queries, self.documents)


def _texts_of(lists: Lists, path: Path) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Texts of every id, or an error that says how to give them."""
    if lists.query_texts is None or lists.document_texts is None:
        raise UsageError(f"{path}: this format holds texts, the store holds ids. Name their --collection.")
    for known, wanted, what in (
        (lists.query_texts, lists.lists.keys(), "queries"),
        (lists.document_texts, {name for names, _ in lists.lists.values() for name in names}, "documents"),
    ):
        if unknown := [name for name in wanted if name not in known]:
            raise DataError(f"{path}: {len(unknown)} {what} are not in the collection, for example {unknown[0]!r}.")
    return lists.query_texts, lists.document_texts


# margin-tsv-text


def read_margin_tsv_text(path: Path) -> ScoreTable:
    """Five tab-separated columns `pos_score neg_score query pos_text neg_text`; ids are the hashes of the texts."""
    rows = _Texts()
    for where, (positive, negative, query, pos_text, neg_text) in columns(path, 5, _TEXT_COLUMNS):
        rows.add(query, pos_text, number(positive, where, "pos_score"))
        rows.add(query, neg_text, number(negative, where, "neg_score"))
    return rows.table()


def write_margin_tsv_text(path: Path, lists: Lists) -> None:
    """Each list's best document against every other one; tabs and line ends inside texts become spaces."""
    refuse_short(path, lists)
    queries, documents = _texts_of(lists, path)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (names, scores) in lists.lists.items():
            values = scores.tolist()
            texts = [" ".join(documents[name].split()) for name in names]
            for text, score in zip(texts[1:], values[1:], strict=True):
                line = [repr(values[0]), repr(score), " ".join(queries[query].split()), texts[0], text]
                handle.write("\t".join(line) + "\n")


# tevatron


def read_tevatron(path: Path) -> ScoreTable:
    """{"query_id", "query", "positive_passages": [{docid, title, text, score}], "negative_passages": [...]} a line."""
    rows = _Texts()
    for where, value in json_lines(path):
        if not isinstance(value, dict) or not {"query_id", "query", "positive_passages"} <= value.keys():
            raise DataError(f"{where}: expected query_id, query, positive_passages and negative_passages.")
        for item in [*value["positive_passages"], *value.get("negative_passages", [])]:
            if not isinstance(item, dict) or not {"docid", "text", "score"} <= item.keys():
                raise DataError(f"{where}: a passage without docid, text or score; scores are what is imported here.")
            text = " ".join(part for part in (item.get("title", ""), item["text"]) if part)
            query_id = identifier(value["query_id"], where, "query")
            rows.add(value["query"], text, number(item["score"], where), query_id, identifier(item["docid"], where))
    return rows.table()


def write_tevatron(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive passage."""
    queries, documents = _texts_of(lists, path)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (names, scores) in lists.lists.items():
            passages = [
                {"docid": name, "title": "", "text": documents[name], "score": score}
                for name, score in zip(names, scores.tolist(), strict=True)
            ]
            line = {"query_id": query, "query": queries[query], "positive_passages": passages[:1]}
            _json_line(handle, line | {"negative_passages": passages[1:]})


def _json_line(handle: Any, value: Any) -> None:
    handle.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


# flagembedding


def read_flagembedding(path: Path) -> ScoreTable:
    """{"query", "pos", "neg", "pos_scores", "neg_scores"} a line; document ids are the hashes of the texts."""
    rows = _Texts()
    for where, value in json_lines(path):
        if not isinstance(value, dict) or not {"query", "pos", "neg"} <= value.keys():
            raise DataError(f"{where}: expected query, pos, neg, pos_scores and neg_scores.")
        for texts, scores in (("pos", "pos_scores"), ("neg", "neg_scores")):
            found = value.get(scores)
            if found is None or len(found) != len(value[texts]):
                count = "no" if found is None else len(found)
                raise DataError(f"{where}: {len(value[texts])} {texts} texts but {count} {scores}.")
            for text, score in zip(value[texts], found, strict=True):
                rows.add(value["query"], text, number(score, where, scores), str(value.get("id", "")))
    return rows.table()


def write_flagembedding(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive; the format has no place for document ids."""
    queries, documents = _texts_of(lists, path)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (names, scores) in lists.lists.items():
            texts, values = [documents[name] for name in names], scores.tolist()
            line = {"query": queries[query], "pos": texts[:1], "neg": texts[1:]}
            _json_line(handle, line | {"pos_scores": values[:1], "neg_scores": values[1:], "id": query})


# colbert-examples


def read_colbert_examples(path: Path) -> ScoreTable:
    """`[qid, [pid, score], ...]` a line; the scorer's own `[qid, [[score, pid], ...]]` is told apart and read."""
    rows = Rows()
    for where, value in json_lines(path):
        if not isinstance(value, list) or len(value) < 2 or not isinstance(value[1], list) or not value[1]:
            raise DataError(f"{where}: expected [qid, [pid, score], ...]; lists of ids alone are rank-permutations.")
        query = identifier(value[0], where, "query")
        swapped = len(value) == 2 and isinstance(value[1][0], list)
        for item in value[1] if swapped else value[1:]:
            if not isinstance(item, list) or len(item) != 2:
                raise DataError(f"{where}: found {item!r}, expected a pair of document and score.")
            document, score = item[::-1] if swapped else item
            rows.add(query, identifier(document, where), number(score, where))
    return rows.table()


def write_colbert_examples(path: Path, lists: Lists) -> None:
    """One list a line, best document first."""
    queries, documents = json_names(lists)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (names, scores) in lists.lists.items():
            items = [[documents[name], score] for name, score in zip(names, scores.tolist(), strict=True)]
            _json_line(handle, [queries[query], *items])


# rank-permutations


def read_rank_permutations(path: Path) -> ScoreTable:
    """Orders without scores: `query document rank` columns, a run whose ranks count, `[qid, pid, ...]` or
    {"query_id", "document_ids"} a line. Scores become -1, -2, ... by rank."""
    _, line = next(read_lines(path), (0, ""))
    rows = Rows()
    if line.lstrip()[:1] in ("[", "{"):
        for where, value in json_lines(path):
            query, documents = _ordered(value, where)
            for rank, document in enumerate(documents, start=1):
                rows.add(identifier(query, where, "query"), identifier(document, where), -rank)
    elif len(line.split()) == 3:
        for line_number, line in read_lines(path):
            where = f"{path}:{line_number}"
            if len(parts := line.split()) != 3:
                raise DataError(f"{where}: found {len(parts)} columns, expected 3 (query, document, rank).")
            rows.add(parts[0], parts[1], -number(parts[2], where, "rank"))
    else:
        for query, (documents, _) in read_run(path, by_rank=True).lists.items():
            for rank, document in enumerate(documents, start=1):
                rows.add(query, document, -rank)
    return rows.table("rank", [f"{path}: only the order counts; scores are -1, -2, ... by rank"])


def _ordered(value: Any, where: str) -> tuple[Any, list[Any]]:
    if isinstance(value, list) and len(value) > 1 and not any(isinstance(item, (list, dict)) for item in value):
        return value[0], value[1:]
    if isinstance(value, dict) and {"query_id", "document_ids"} <= value.keys():
        return value["query_id"], value["document_ids"]
    raise DataError(f"{where}: expected [qid, pid, ...] or an object with query_id and document_ids.")


def write_rank_permutations(path: Path, lists: Lists) -> None:
    """`query document rank`, tabs, ranks from 1 in ranking order."""
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (names, _) in lists.lists.items():
            handle.writelines(f"{query}\t{name}\t{rank}\n" for rank, name in enumerate(names, start=1))


# sbert-pickle


class _Restricted(pickle.Unpickler):
    """Builds dicts, lists, strings and numbers; any other global could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """The few constructors that numbers need."""
        if (module, name) in _PICKLE_GLOBALS:
            return super().find_class(module, name)
        raise DataError(f"the pickle asks for {module}.{name}; only plain numbers, strings, lists and dicts are read.")


def read_sbert_pickle(path: Path) -> ScoreTable:
    """Pickle (gzip or plain) of {query: {document: score}}, read without running any code of it."""
    data = open_bytes(path)
    if len(data) > _MAX_PICKLE_BYTES:
        raise DataError(f"{path}: {len(data)} bytes unpacked, at most {_MAX_PICKLE_BYTES} are read.")
    try:
        value = _Restricted(io.BytesIO(data)).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: not a readable pickle ({type(error).__name__}: {error}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, expected a dict query -> document -> score.")
    return scores_by_query(value, str(path))


def write_sbert_pickle(path: Path, lists: Lists) -> None:
    """Pickle of {query: {document: score}}, gzip when the name ends in .gz; ids are ints when every one is."""
    queries, documents = json_names(lists)
    value = {
        queries[query]: {documents[name]: score for name, score in zip(names, scores.tolist(), strict=True)}
        for query, (names, scores) in lists.lists.items()
    }
    data = pickle.dumps(value, protocol=4)
    with atomic_path(path) as draft:
        draft.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


# hf-margin


def read_hf_margin(path: Path) -> ScoreTable:
    """Parquet {query_id, positive_id, negative_id, score} where score is the margin positive - negative.

    A margin cannot give back two scores. Rows of a query are chained from its first positive, which gets 0: the
    differences are the file's, the constant is ours. What no chain joins to it is left out and counted in a note.
    """
    table = open_parquet(path)
    wanted = ["query_id", "positive_id", "negative_id", "score"]
    if not set(wanted) <= set(table.column_names):
        raise DataError(f"{path}: columns {table.column_names}; expected {wanted}.")
    edges: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
    for row, (query, positive, negative, margin) in enumerate(
        zip(*(table[name].to_pylist() for name in wanted), strict=True)
    ):
        where = f"{path}: row {row}"
        edges[identifier(query, where, "query")].append(
            (identifier(positive, where), identifier(negative, where), number(margin, where))
        )
    rows, lost = Rows(), 0
    for query, margins in edges.items():
        found = _chain(margins, f"{path}: query {query!r}")
        lost += len({name for edge in margins for name in edge[:2]} - found.keys())
        for document, score in found.items():
            rows.add(query, document, score)
    notes = [f"{path}: margins only: each query's first positive is set to 0, its other scores follow from it"]
    if lost:
        notes.append(f"{path}: {lost} pairs are joined to that positive by no margin and were left out")
    return rows.table("margin", notes)


def _chain(margins: list[tuple[str, str, float]], where: str) -> dict[str, float]:
    """Scores along the margins from the first positive; ConflictingScoresError when two ways disagree."""
    neighbours: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for positive, negative, margin in margins:
        neighbours[positive].append((negative, -margin))
        neighbours[negative].append((positive, margin))
    scores = {margins[0][0]: 0.0}
    queue = [margins[0][0]]
    while queue:
        here = queue.pop()
        for other, step in neighbours[here]:
            value = scores[here] + step
            if other not in scores:
                scores[other] = value
                queue.append(other)
            elif abs(scores[other] - value) > 1e-3 + 1e-4 * abs(value):
                raise ConflictingScoresError(
                    f"{where}: margins disagree about document {other!r}: {scores[other]:.6g} and {value:.6g}."
                )
    return scores


def write_hf_margin(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive of every other one of it; string ids, float64 margins."""
    refuse_short(path, lists)
    flat = [
        (query, names[0], name, scores[0] - score)
        for query, (names, scores) in lists.lists.items()
        for name, score in zip(names[1:], scores[1:].tolist(), strict=True)
    ]
    names = ["query_id", "positive_id", "negative_id", "score"]
    types = [pa.string(), pa.string(), pa.string(), pa.float64()]
    arrays = [pa.array([row[i] for row in flat], type=kind) for i, kind in enumerate(types)]
    with atomic_path(path) as draft:
        pq.write_table(pa.table(arrays, names=names), draft, compression="zstd")


def is_pickle(path: Path) -> bool:
    """True for a pickle of protocol 2 or newer, also inside gzip."""
    with open(path, "rb") as handle:
        head = handle.read(2)
    if head == b"\x1f\x8b":
        with gzip.open(path) as packed:
            head = packed.read(2)
    return len(head) == 2 and head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL
