"""The published layout: portable parquet that DuckDB, polars and the datasets library read without structkd.

    <out>/manifest.json                      ScoreManifest; names every other file with its SHA-256
    <out>/README.md                          data-set card
    <out>/data/scores-00000.parquet          pairs: query_id, document_ids: list, scores: list<float>
    <out>/data/logits-00000.safetensors      rows: `logits`
    <out>/ids/{queries,docs}.parquet         pairs: id, text_hash of every id that occurs

Ids are int64 columns when every id is the plain decimal of its number, else strings. Scores are float32 values rounded
to the snapshot's dtype: byte-stream split of rounded values compresses as well as half floats, which DuckDB
cannot read in that encoding.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from structkd.errors import CorruptFileError
from structkd.files import inside
from structkd.scores.compaction.merge import first_of_each
from structkd.scores.layout.id_table import IdTable
from structkd.scores.layout.sealed import as_array, as_numpy, read_parquet
from structkd.scores.layout.snapshot import Csr, checked_path
from structkd.scores.manifest import ScoreManifest

FILE_ROWS = 60_000_000
_IDS = ("queries", "docs")
_INT64_DIGITS = 18


def plain_integers(ids: Sequence[str]) -> NDArray[np.int64] | None:
    """The ids as numbers when each is exactly the decimal of its number, else None ("007" and "7" stay apart)."""
    numbers = np.empty(len(ids), dtype=np.int64)
    for row, string in enumerate(ids):
        if not string.isascii() or not string.isdigit() or len(string) > _INT64_DIGITS:
            return None
        if string[0] == "0" and len(string) > 1:
            return None
        numbers[row] = int(string)
    return numbers


def write_pairs(
    folder: Path, queries: IdTable, documents: IdTable, rows: tuple[NDArray[np.int64], NDArray[np.int64], NDArray]
) -> list[tuple[Path, int]]:
    """Write the id tables and the lists; returns each data file with its number of pairs.

    Args:
        folder: of the published store.
        queries: table behind the query rows.
        documents: table behind the document rows.
        rows: query rows (ascending), document rows and scores of every pair.
    """
    query_rows, document_rows, scores = rows
    query_ids, query_slots = _used(queries, query_rows, folder / "ids" / "queries.parquet")
    document_ids, document_slots = _used(documents, document_rows, folder / "ids" / "docs.parquet")
    query_names, document_names = _column(query_ids), _column(document_ids)
    # lists are written in the order of their documents' ids, which delta coding needs
    rank = _rank(document_ids)
    order = np.lexsort((rank[document_slots], query_slots))
    query_slots, document_slots, scores = query_slots[order], document_slots[order], scores[order]
    starts = first_of_each(query_slots)
    files: list[tuple[Path, int]] = []
    cut = 0
    while cut < len(starts) or not files:
        end = max(int(np.searchsorted(starts, starts[cut] + FILE_ROWS)), cut + 1) if len(starts) else 0
        low = starts[cut] if len(starts) else 0
        high = starts[end] if end < len(starts) else len(scores)
        offsets = as_array((np.append(starts[cut:end], high) - low).astype(np.int32))
        table = pa.table(
            {
                "query_id": query_names.take(as_array(query_slots[starts[cut:end]])),
                "document_ids": pa.ListArray.from_arrays(
                    offsets, document_names.take(as_array(document_slots[low:high]))
                ),
                "scores": pa.ListArray.from_arrays(offsets, as_array(scores[low:high].astype(np.float32))),
            }
        )
        path = folder / "data" / f"scores-{len(files):05d}.parquet"
        _write_lists(table, path)
        files.append((path, int(high - low)))
        cut = end if len(starts) else 1
    return files


def _used(table: IdTable, rows: NDArray[np.int64], path: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Write the ids that occur; returns them and each row's place among them."""
    used, slots = np.unique(rows, return_inverse=True)
    ids = [table.ids[row] for row in used]
    schema = pa.schema([("id", pa.string()), ("text_hash", pa.binary(16))])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([ids, [table.hashes[row] for row in used]], schema=schema), path, compression="zstd")
    return ids, slots


def _column(ids: Sequence[str]) -> pa.Array:
    numbers = plain_integers(ids)
    return pa.array(ids, type=pa.string()) if numbers is None else as_array(numbers)


def _rank(ids: Sequence[str]) -> NDArray[np.int64]:
    """Place of each id in id order: numeric where ids are numbers."""
    numbers = plain_integers(ids)
    order = np.argsort(numbers) if numbers is not None else np.asarray(sorted(range(len(ids)), key=ids.__getitem__))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[order.astype(np.int64)] = np.arange(len(ids))
    return rank


def _write_lists(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encodings = {"scores.list.element": "BYTE_STREAM_SPLIT"}
    dictionary = []
    for name, kind in (("query_id", table.schema.field("query_id").type), ("document_ids.list.element", _item(table))):
        if pa.types.is_integer(kind):
            encodings[name] = "DELTA_BINARY_PACKED"
        else:
            dictionary.append(name)  # strings repeat across lists
    pq.write_table(
        table, path, compression="zstd", use_dictionary=dictionary or False, column_encoding=encodings, version="2.6"
    )


def _item(table: pa.Table) -> pa.DataType:
    return table.schema.field("document_ids").type.value_type


def read_pairs(folder: Path, manifest: ScoreManifest, verify: str) -> tuple[tuple[IdTable, IdTable], Csr]:
    """Id tables and lists of a published folder, in memory."""
    entries = {entry["path"]: entry for entry in manifest.files}
    for path in entries:
        inside(folder, path)
    if not any(path.startswith("data/") for path in entries):
        raise CorruptFileError(f"{folder}: the manifest names no data file. Restore it from a copy.")
    tables = []
    for name in _IDS:
        table, _ = read_parquet(checked_path(folder, entries[f"ids/{name}.parquet"], verify))
        tables.append(IdTable.of(table["id"].to_pylist(), table["text_hash"].to_pylist()))
    columns: list[list[NDArray]] = [[], [], [], []]
    for path in sorted(path for path in entries if path.startswith("data/")):
        table, _ = read_parquet(checked_path(folder, entries[path], verify))
        lists = table.combine_chunks()
        documents, scores = (_flat(lists[name]) for name in ("document_ids", "scores"))
        sizes = as_numpy(lists["document_ids"].combine_chunks().value_lengths())
        columns[0].append(_rows(tables[0], lists["query_id"].combine_chunks(), path))
        columns[1].append(sizes)
        columns[2].append(_rows(tables[1], documents, path))
        columns[3].append(as_numpy(scores))
    queries, sizes, document_rows, values = (np.concatenate(column) for column in columns)
    if len(document_rows) != len(values):
        raise CorruptFileError(f"{folder}: {len(document_rows)} documents but {len(values)} scores.")
    return (tables[0], tables[1]), _csr(queries, sizes, document_rows, values, manifest.dtype)


def _csr(queries: NDArray, sizes: NDArray, documents: NDArray, values: NDArray, dtype: str) -> Csr:
    """Sort documents by row within each list and lists by query row."""
    slots = np.repeat(queries, sizes)
    keys = (slots.astype(np.uint64) << np.uint64(32)) | documents.astype(np.uint64)
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys)
        slots, documents, values = slots[order], documents[order], values[order]
    starts = first_of_each(slots)
    return Csr(
        slots[starts].astype(np.uint32),
        np.append(starts, len(slots)).astype(np.int32),
        documents.astype(np.uint32),
        values.astype(dtype),
    )


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()


def _rows(table: IdTable, ids: pa.Array, path: str) -> NDArray[np.int64]:
    """Row of each id of a column."""
    if pa.types.is_integer(ids.type):
        numbers = np.asarray([int(string) for string in table.ids], dtype=np.int64)
        order = np.argsort(numbers)
        values = as_numpy(ids)
        places = np.searchsorted(numbers[order], values)
        known = places < len(numbers)
        known[known] = numbers[order][places[known]] == values[known]
        rows = np.where(known, order[np.minimum(places, len(numbers) - 1)], -1) if len(numbers) else places - 1
    else:
        coded = ids.dictionary_encode()
        of_code = table.find(coded.dictionary.to_pylist())
        rows = of_code[as_numpy(coded.indices)]
    if (rows < 0).any():
        raise CorruptFileError(f"{path}: {int((rows < 0).sum())} ids are not in its id table. Restore it from a copy.")
    return rows
