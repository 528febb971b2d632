"""Tables: parquet of pairs or of parallel lists under their usual names, the same as JSON lines or CSV, margins."""

import csv
import json
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from structkd.errors import ConflictingScoresError, CorruptFileError, DataError
from structkd.files import atomic_path
from structkd.packed import open_text
from structkd.scores.formats.base import (
    BLOCK_ROWS,
    Blocks,
    Lists,
    Rows,
    ScoreTable,
    identifier,
    json_lines,
    json_names,
    number,
)
from structkd.scores.formats.margins import refuse_short
from structkd.scores.formats.runs import read_trec_run, write_trec_run
from structkd.trec import read_lines

QUERY_NAMES = ("query_id", "qid", "q_id", "query-id")
DOCUMENT_NAMES = (
    "document_ids", "document_id", "doc_ids", "doc_id", "docid", "docno", "corpus_id", "corpus-id", "passage_id", "pid",
)  # fmt: skip
SCORE_NAMES = ("scores", "score", "label")
_BATCH_LISTS = 1 << 13
_SPILLS = 64

# parquet, pylate


def read_parquet_table(path: Path) -> Blocks:
    """A parquet table: query, document and score columns under their usual names, flat or as parallel lists."""
    row = 0
    for batch in read_batches(path):
        query = _named(batch, QUERY_NAMES, path)
        document = _named(batch, DOCUMENT_NAMES, path)
        score = next((name for name in SCORE_NAMES if name in batch.schema.names), None)
        if score is None and "rank" not in batch.schema.names:
            raise DataError(f"{path}: columns {batch.schema.names}; expected one of {SCORE_NAMES} or rank.")
        columns = batch[query], batch[document], batch[score or "rank"]
        table = _flat(*columns, row)
        if table is None:
            table = _by_row(*columns, row, path)
        yield table if score else _as_ranks(table)
        row += len(batch)


def read_batches(path: Path, names: Iterable[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A parquet file, or a folder's data/*.parquet or train*.parquet, batch by batch."""
    if path.is_dir():
        found = [sorted(path.glob(pattern)) for pattern in ("data/*.parquet", "train*.parquet", "train/*.parquet")]
        files = next((some for some in found if some), [])
        if not files:
            raise DataError(f"{path}: no data/*.parquet or train*.parquet in this folder.")
        for file in files:
            yield from read_batches(file, names)
        return
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with pq.ParquetFile(path) as file:
            lists = any(pa.types.is_list(field.type) for field in file.schema_arrow)
            yield from file.iter_batches(_BATCH_LISTS if lists else BLOCK_ROWS, columns=names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable parquet file ({error}).") from None


def open_parquet(path: Path) -> pa.Table:
    """All batches of `read_batches` as one table."""
    return pa.Table.from_batches(read_batches(path))


def column_names(path: Path) -> list[str]:
    """Column names of a parquet file."""
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable parquet file ({error}).") from None


def _named(batch: pa.RecordBatch, names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in batch.schema.names:
            return name
    raise DataError(f"{path}: columns {batch.schema.names}; expected one of {names}.")


def _flat(queries: pa.Array, documents: pa.Array, scores: pa.Array, row: int) -> ScoreTable | None:
    """The batch column by column; None when a value needs a closer look."""
    rows = np.arange(row, row + len(queries), dtype=np.int64)
    is_list = [pa.types.is_list(column.type) or pa.types.is_large_list(column.type) for column in (documents, scores)]
    if any(column.null_count for column in (queries, documents, scores)) or is_list[0] != is_list[1]:
        return None
    if is_list[0]:
        sizes = documents.value_lengths().to_numpy(zero_copy_only=False)
        if not np.array_equal(sizes, scores.value_lengths().to_numpy(zero_copy_only=False)):
            return None
        repeats = np.repeat(np.arange(len(sizes)), sizes)
        queries, rows = queries.take(pa.array(repeats)), rows[repeats]
        documents, scores = documents.flatten(), scores.flatten()
    ids = [_strings(column) for column in (queries, documents)]
    numeric = pa.types.is_floating(scores.type) or pa.types.is_integer(scores.type)
    if ids[0] is None or ids[1] is None or scores.null_count or not numeric:
        return None
    values = scores.to_numpy(zero_copy_only=False).astype(np.float64)
    if not np.isfinite(values).all():
        return None
    return ScoreTable(ids[0], ids[1], values, lines=rows, unit="row")


def _strings(ids: pa.Array) -> pa.Array | None:
    """Ids as strings; None where one is missing, empty, a list in disguise or no id."""
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if pa.types.is_integer(ids.type) and not ids.null_count:
        return ids.cast(pa.string())
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)) or ids.null_count:
        return None
    if len(ids) and (not pc.min(pc.binary_length(ids)).as_py() or pc.any(pc.starts_with(ids, "[")).as_py()):
        return None
    return ids.cast(pa.string())


def _by_row(queries: pa.Array, documents: pa.Array, scores: pa.Array, row: int, path: Path) -> ScoreTable:
    """The batch row by row: lists that are strings are parsed, what is wrong is named with its row."""
    rows = Rows(path)
    columns = (column.to_pylist() for column in (queries, documents, scores))
    for line, (name, found, value) in enumerate(zip(*columns, strict=True), start=row):
        where = f"{path}: row {line}"
        _add_row(rows, identifier(name, where, "query"), found, value, where, line)
    table = rows.take()
    return ScoreTable(table.query_ids, table.document_ids, table.scores, lines=table.lines, unit="row")


def _add_row(rows: Rows, query: str, documents: Any, scores: Any, where: str, line: int) -> None:
    documents, scores = _parsed(documents, where), _parsed(scores, where)
    if not isinstance(documents, list):
        documents, scores = [documents], [scores]
    if not isinstance(scores, list) or len(scores) != len(documents):
        count = len(scores) if isinstance(scores, list) else 1
        raise DataError(f"{where}: {len(documents)} documents but {count} scores; expected one score per document.")
    for document, score in zip(documents, scores, strict=True):
        rows.add(query, identifier(document, where), number(score, where), line)


def _parsed(value: Any, where: str) -> Any:
    """Some public tables store lists as strings: they are JSON and parsed as such, never evaluated."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{where}: {value[:60]!r} looks like a list but is not JSON.") from None
    return value


def _as_ranks(table: ScoreTable) -> ScoreTable:
    return ScoreTable(table.query_ids, table.document_ids, -table.scores, "rank", lines=table.lines, unit="row")


def write_parquet_table(path: Path, lists: Lists) -> None:
    """query_id, document_ids (list), scores (list of float32); ids are numbers when every one is."""
    query_type, document_type = json_names(lists)
    schema = pa.schema(
        [
            ("query_id", _arrow(query_type)),
            ("document_ids", pa.list_(_arrow(document_type))),
            ("scores", pa.list_(pa.float32())),
        ]
    )
    with atomic_path(path) as draft, pq.ParquetWriter(draft, schema, compression="zstd") as writer:
        for part in _parts(lists):
            names = [document_type(name) for _, (found, _) in part for name in found]
            offsets = pa.array(np.cumsum([0, *(len(found) for _, (found, _) in part)]), type=pa.int32())
            values = np.concatenate([scores for _, (_, scores) in part]).astype(np.float32)
            columns = [
                pa.array([query_type(query) for query, _ in part], schema.field("query_id").type),
                pa.ListArray.from_arrays(offsets, pa.array(names, _arrow(document_type))),
                pa.ListArray.from_arrays(offsets, pa.array(values)),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _arrow(kind: type) -> pa.DataType:
    return pa.int64() if kind is int else pa.string()


def _parts(lists: Lists) -> Iterator[list[tuple[str, tuple[list[str], np.ndarray]]]]:
    """Some lists at a time, some hundred thousand pairs."""
    held: list[tuple[str, tuple[list[str], np.ndarray]]] = []
    count = 0
    for item in lists.items():
        held.append(item)
        count += len(item[1][0])
        if count >= 4 * BLOCK_ROWS:
            yield held
            held, count = [], 0
    if held:
        yield held


def read_pylate(path: Path) -> Blocks:
    """PyLate's table {query_id, document_ids, scores}: parquet, a folder with train*.parquet, or JSON lines."""
    return _read_json_table(path) if path.is_file() and not is_parquet(path) else read_parquet_table(path)


def _read_json_table(path: Path) -> Blocks:
    rows = Rows(path)
    for line, value in json_lines(path):
        where = f"{path}:{line}"
        if not isinstance(value, dict):
            raise DataError(f"{where}: found a JSON {type(value).__name__}, expected an object.")
        query, documents, scores = (
            next((value[name] for name in names if name in value), None)
            for names in (QUERY_NAMES, DOCUMENT_NAMES, SCORE_NAMES)
        )
        if query is None or documents is None or scores is None:
            raise DataError(f"{where}: fields {sorted(value)}; expected query_id, document_ids and scores.")
        _add_row(rows, identifier(query, where, "query"), documents, scores, where, line)
        if rows.full:
            yield rows.take()
    yield rows.take()


# lightning-ir


def read_lightning_ir(path: Path) -> Blocks:
    """A Lightning IR run: parquet or JSON (lines) with qid/query_id, docno/doc_id, score; a TREC run; or a CSV."""
    if is_parquet(path):
        return read_parquet_table(path)
    _, line = next(read_lines(path), (0, ""))
    if line.lstrip().startswith("{"):
        return _read_json_table(path)
    if is_header(line):
        return _read_csv(path, "\t" if "\t" in line else ",")
    return read_trec_run(path)


def is_header(line: str) -> bool:
    """Whether a line names the columns of a table of scores."""
    first = line.split("\t")[0] if "\t" in line else line.split(",")[0]
    return first.strip().strip('"').lower() in QUERY_NAMES


def _read_csv(path: Path, separator: str) -> Blocks:
    with open_text(path, newline="") as text:
        reader = csv.DictReader(text, delimiter=separator)
        header = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = header
        query, document, score = (
            next((name for name in names if name in header), None)
            for names in (QUERY_NAMES, DOCUMENT_NAMES, SCORE_NAMES)
        )
        if query is None or document is None or score is None:
            raise DataError(f"{path}:1: columns {header}; expected query_id, doc_id and score.")
        rows = Rows(path)
        try:
            for line in reader:
                where = f"{path}:{reader.line_num}"
                if None in line or None in line.values():
                    found = (
                        sum(value is not None for value in line.values()) + len(line.get(None) or []) - (None in line)
                    )
                    raise DataError(f"{where}: found {found} columns, expected {len(header)} ({', '.join(header)}).")
                rows.add(
                    identifier(line[query], where, "query"),
                    identifier(line[document], where),
                    number(line[score], where),
                    reader.line_num,
                )
                if rows.full:
                    yield rows.take()
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not readable as CSV ({error}).") from None
        yield rows.take()


def write_lightning_ir(path: Path, lists: Lists) -> None:
    """Parquet with query_id, doc_id, rank, score; a TREC run when the name ends in .run or .tsv (also packed)."""
    if {".run", ".tsv"} & set(path.suffixes):
        write_trec_run(path, lists)
        return
    schema = pa.schema(
        [("query_id", pa.string()), ("doc_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())]
    )
    with atomic_path(path) as draft, pq.ParquetWriter(draft, schema, compression="zstd") as writer:
        for part in _parts(lists):
            flat = [
                (query, document, rank, score)
                for query, (documents, scores) in part
                for rank, (document, score) in enumerate(zip(documents, scores.tolist(), strict=True), start=1)
            ]
            arrays = [
                pa.array(column, kind) for column, kind in zip(zip(*flat, strict=True), schema.types, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


# hf-margin

_MARGIN = ("query_id", "positive_id", "negative_id", "score")


def read_hf_margin(path: Path) -> Blocks:
    """Parquet {query_id, positive_id, negative_id, score} where score is the margin positive - negative.

    A margin cannot give back two scores. Rows of a query are chained from its first positive, which gets 0: the
    differences are the file's, the constant is ours. What no chain joins to it is left out and counted in a note.
    Rows of a query may stand anywhere, so large files are first split by query into temporary files.
    """
    notes = [f"{path}: margins only: each query's first positive is set to 0, its other scores follow from it"]
    rows, lost = Rows(path, "margin"), 0
    with tempfile.TemporaryDirectory(prefix="structkd-margins-") as folder:
        for margins in _by_query(path, Path(folder)):
            edges: dict[str, list[tuple[str, str, float, int]]] = defaultdict(list)
            for query, positive, negative, margin, row in zip(
                *(column.to_pylist() for column in margins.columns), strict=True
            ):
                where = f"{path}: row {row}"
                edges[identifier(query, where, "query")].append(
                    (identifier(positive, where), identifier(negative, where), number(margin, where), row)
                )
            for query, own in edges.items():
                found = _chain(own, f"{path}: query {query!r}")
                lost += len({name for edge in own for name in edge[:2]} - found.keys())
                rows.add_list(query, list(found), list(found.values()), own[0][3])
                if rows.full:
                    yield rows.take()
    if lost:
        notes.append(f"{path}: {lost} pairs are joined to that positive by no margin and were left out")
    yield rows.take(notes)


def _by_query(path: Path, folder: Path) -> Iterator[pa.Table]:
    """Tables that hold every row of their queries, with row numbers."""
    held: list[pa.RecordBatch] = []
    spills: list[pa.RecordBatchFileWriter] = []
    row = 0
    for batch in read_batches(path):
        if not set(_MARGIN) <= set(batch.schema.names):
            raise DataError(f"{path}: columns {batch.schema.names}; expected {list(_MARGIN)}.")
        columns = [batch[name] for name in _MARGIN] + [pa.array(range(row, row + len(batch)), pa.int64())]
        held.append(pa.RecordBatch.from_arrays(columns, names=[*_MARGIN, "row"]))
        row += len(batch)
        if sum(map(len, held)) >= 8 * BLOCK_ROWS:
            _spill(held, spills, folder)
            held = []
    if not spills:
        if held:
            yield pa.Table.from_batches(held)
        return
    if held:
        _spill(held, spills, folder)
    for writer in spills:
        writer.close()
    for number_ in range(len(spills)):
        with pa.OSFile(str(folder / str(number_)), "rb") as source:
            yield pa.ipc.open_file(source).read_all()


def _spill(held: list[pa.RecordBatch], spills: list[pa.RecordBatchFileWriter], folder: Path) -> None:
    """Append rows to the temporary files by the hash of their query."""
    table = pa.Table.from_batches(held)
    if not spills:
        for place in range(_SPILLS):
            spills.append(pa.ipc.new_file(str(folder / str(place)), table.schema))
    coded = table["query_id"].combine_chunks().dictionary_encode()
    of_code = np.asarray([zlib.crc32(str(query).encode()) % _SPILLS for query in coded.dictionary.to_pylist()])
    place = of_code[coded.indices.to_numpy(zero_copy_only=False)]
    order = np.argsort(place, kind="stable")
    table = table.take(pa.array(order))
    cuts = np.searchsorted(place[order], np.arange(_SPILLS + 1))
    for writer, start, end in zip(spills, cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        if end > start:
            writer.write_table(table.slice(start, end - start))


def _chain(margins: list[tuple[str, str, float, int]], where: str) -> dict[str, float]:
    """Scores along the margins from the first positive; ConflictingScoresError when two ways disagree."""
    neighbours: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for positive, negative, margin, _ in margins:
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
    schema = pa.schema([(name, pa.string()) for name in _MARGIN[:3]] + [(_MARGIN[3], pa.float64())])
    with atomic_path(path) as draft, pq.ParquetWriter(draft, schema, compression="zstd") as writer:
        for part in _parts(lists):
            flat = []
            for query, (names, scores) in part:
                refuse_short(path, query, names)
                flat += [
                    (query, names[0], name, margin)
                    for name, margin in zip(names[1:], (scores[0] - scores[1:]).tolist(), strict=True)
                ]
            arrays = [
                pa.array(column, kind) for column, kind in zip(zip(*flat, strict=True), schema.types, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def is_parquet(path: Path) -> bool:
    """True for a file that starts as parquet does."""
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return handle.read(4) == b"PAR1"
