"""Formats with one score (or rank) per pair in a flat or list table: runs, BEIR results, parquet tables."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from structkd.errors import CorruptFileError, DataError
from structkd.files import atomic_path, write_text
from structkd.scores.formats_base import Lists, Rows, ScoreTable, identifier, json_ids, json_lines, number, open_bytes
from structkd.trec import Run, read_lines, read_run, write_run

QUERY_NAMES = ("query_id", "qid", "query-id")
DOCUMENT_NAMES = (
    "document_ids",
    "document_id",
    "doc_ids",
    "doc_id",
    "docid",
    "docno",
    "corpus_id",
    "passage_id",
    "pid",
)
SCORE_NAMES = ("scores", "score", "label")

# trec-run


def read_trec_run(path: Path) -> ScoreTable:
    """Six columns `query Q0 document rank score tag`, or four `query document rank score`."""
    run = read_run(path)
    queries, documents, scores = run.pairs()
    by_rank = read_run(path, by_rank=True)
    other = sum(by_rank.lists[query][0] != documents for query, (documents, _) in run.lists.items())
    notes = []
    if other:
        notes.append(
            f"{path}: in {other} of {len(run.lists)} lists the rank column disagrees with the scores; the scores "
            "count here. For a re-ranked run that kept its first stage's scores use --format rank-permutations."
        )
    return ScoreTable(queries, documents, scores, notes=tuple(notes))


def write_trec_run(path: Path, lists: Lists) -> None:
    """Six columns, best first."""
    write_run(path, Run(dict(lists.lists)), tag=lists.model.replace(" ", "_") or "structkd")


# beir-run


def read_beir_run(path: Path) -> ScoreTable:
    """One JSON object {query: {document: score}}."""
    try:
        value = json.loads(open_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a JSON object of query -> document -> score ({error}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: found a JSON {type(value).__name__}, expected an object query -> document -> score.")
    return scores_by_query(value, str(path))


def scores_by_query(value: Mapping[Any, Any], where: str) -> ScoreTable:
    """Flat columns of {query: {document: score}}."""
    rows = Rows()
    for query, found in value.items():
        if not isinstance(found, Mapping):
            raise DataError(f"{where}: query {query!r} holds a {type(found).__name__}, expected document -> score.")
        for document, score in found.items():
            here = f"{where}: query {query!r}, document {document!r}"
            rows.add(identifier(query, where, "query"), identifier(document, where), number(score, here))
    return rows.table()


def write_beir_run(path: Path, lists: Lists) -> None:
    """One JSON object {query: {document: score}}."""
    value = {
        query: dict(zip(documents, scores.tolist(), strict=True)) for query, (documents, scores) in lists.lists.items()
    }
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


# parquet, pylate, lightning-ir


def read_parquet_table(path: Path) -> ScoreTable:
    """A parquet table: query, document and score columns under their usual names, flat or as parallel lists."""
    return table_rows(open_parquet(path), str(path))


def open_parquet(path: Path) -> pa.Table:
    """A parquet file, or a folder's data/*.parquet or train*.parquet as one table."""
    if path.is_dir():
        files = (
            sorted(path.glob("data/*.parquet"))
            or sorted(path.glob("train*.parquet"))
            or sorted(path.glob("train/*.parquet"))
        )
        if not files:
            raise DataError(f"{path}: no data/*.parquet or train*.parquet in this folder.")
        return pa.concat_tables([open_parquet(file) for file in files])
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable parquet file ({error}).") from None


def table_rows(table: pa.Table, where: str) -> ScoreTable:
    """Scores of a table; DataError names the row of unequal lists, null ids and scores that are no numbers."""
    query = _named(table, QUERY_NAMES, where)
    document = _named(table, DOCUMENT_NAMES, where)
    score = next((name for name in SCORE_NAMES if name in table.column_names), None)
    if score is None and "rank" not in table.column_names:
        raise DataError(f"{where}: columns {table.column_names}; expected one of {SCORE_NAMES} or rank.")
    queries = table[query].to_pylist()
    documents = table[document].to_pylist()
    values = table[score or "rank"].to_pylist()
    rows = Rows()
    for line, (name, found, value) in enumerate(zip(queries, documents, values, strict=True)):
        here = f"{where}: row {line}"
        name = identifier(name, here, "query")
        found, value = _parsed(found, here), _parsed(value, here)
        if not isinstance(found, list):
            found, value = [found], [value]
        if not isinstance(value, list) or len(found) != len(value):
            count = len(value) if isinstance(value, list) else 1
            raise DataError(f"{here}: {len(found)} documents but {count} scores; expected one score per document.")
        for one, its_score in zip(found, value, strict=True):
            rows.add(name, identifier(one, here), number(its_score, here) * (1 if score else -1))
    return rows.table("score" if score else "rank")


def _named(table: pa.Table, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(f"{where}: columns {table.column_names}; expected one of {names}.")


def _parsed(value: Any, where: str) -> Any:
    """Some public tables store lists as strings: they are JSON and parsed as such, never evaluated."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{where}: {value[:60]!r} looks like a list but is not JSON.") from None
    return value


def write_parquet_table(path: Path, lists: Lists) -> None:
    """query_id, document_ids (list), scores (list of float32); ids are numbers when every one is."""
    documents = [name for names, _ in lists.lists.values() for name in names]
    names = json_ids(documents)
    values = np.concatenate([scores for _, scores in lists.lists.values()] or [np.empty(0)])
    offsets = pa.array(np.cumsum([0, *(len(names) for names, _ in lists.lists.values())]), type=pa.int32())
    table = pa.table(
        {
            "query_id": pa.array(json_ids(list(lists.lists))),
            "document_ids": pa.ListArray.from_arrays(offsets, pa.array(names, type=None if names else pa.string())),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.float32))),
        }
    )
    with atomic_path(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def read_pylate(path: Path) -> ScoreTable:
    """PyLate's table {query_id, document_ids, scores}: parquet, a folder with train*.parquet, or JSON lines."""
    if path.is_file() and not is_parquet(path):
        return _read_json_table(path)
    return read_parquet_table(path)


def _read_json_table(path: Path) -> ScoreTable:
    rows = Rows()
    for where, value in json_lines(path):
        if not isinstance(value, dict):
            raise DataError(f"{where}: found a JSON {type(value).__name__}, expected an object.")
        query = next((value[name] for name in QUERY_NAMES if name in value), None)
        documents = next((value[name] for name in DOCUMENT_NAMES if name in value), None)
        scores = next((value[name] for name in SCORE_NAMES if name in value), None)
        if query is None or documents is None or scores is None:
            raise DataError(f"{where}: fields {sorted(value)}; expected query_id, document_ids and scores.")
        documents, scores = _parsed(documents, where), _parsed(scores, where)
        if not isinstance(documents, list):
            documents, scores = [documents], [scores]
        if not isinstance(scores, list) or len(scores) != len(documents):
            raise DataError(f"{where}: {len(documents)} documents but another number of scores.")
        for document, score in zip(documents, scores, strict=True):
            rows.add(identifier(query, where, "query"), identifier(document, where), number(score, where))
    return rows.table()


def read_lightning_ir(path: Path) -> ScoreTable:
    """A Lightning IR run: parquet or JSON (lines) with qid/query_id, docno/doc_id, score; a TREC run; or a CSV."""
    if is_parquet(path):
        return read_parquet_table(path)
    _, line = next(read_lines(path), (0, ""))
    if line.lstrip().startswith("{"):
        return _read_json_table(path)
    if line.lower().startswith(("q_id", *QUERY_NAMES)):
        return _read_csv(path, "\t" if "\t" in line else ",")
    return read_trec_run(path)


def _read_csv(path: Path, separator: str) -> ScoreTable:
    text = io.StringIO(open_bytes(path).decode("utf-8-sig"), newline="")
    reader = csv.DictReader(text, delimiter=separator)
    header = reader.fieldnames or []
    query = next((name for name in QUERY_NAMES if name in header), None)
    document = next((name for name in DOCUMENT_NAMES if name in header), None)
    if query is None or document is None or "score" not in header:
        raise DataError(f"{path}:1: columns {header}; expected query_id, doc_id and score.")
    rows = Rows()
    for line in reader:
        where = f"{path}:{reader.line_num}"
        rows.add(
            identifier(line[query], where, "query"), identifier(line[document], where), number(line["score"], where)
        )
    return rows.table()


def write_lightning_ir(path: Path, lists: Lists) -> None:
    """Parquet with query_id, doc_id, rank, score; a TREC run when the name ends in .run or .tsv."""
    if path.suffix in (".run", ".tsv"):
        write_trec_run(path, lists)
        return
    flat = [
        (query, document, rank, score)
        for query, (documents, scores) in lists.lists.items()
        for rank, (document, score) in enumerate(zip(documents, scores, strict=True), start=1)
    ]
    names = ("query_id", "doc_id", "rank", "score")
    types = (pa.string(), pa.string(), pa.int32(), pa.float32())
    arrays = [pa.array([row[i] for row in flat], type=kind) for i, kind in enumerate(types)]
    with atomic_path(path) as draft:
        pq.write_table(pa.table(arrays, names=list(names)), draft, compression="zstd")


def is_parquet(path: Path) -> bool:
    """True for a file that starts as parquet does."""
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return handle.read(4) == b"PAR1"
