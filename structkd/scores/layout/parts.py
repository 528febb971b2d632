"""Parts: the committed units of a log, read and checked.

<root>/parts/<unit>.parquet   pairs: q, d, score; rows: values of a node range
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from structkd.errors import CorruptFileError
from structkd.ids import fingerprint_arrays
from structkd.scores.layout.sealed import as_numpy, read_parquet, sealed_bytes
from structkd.scores.manifest import Header

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class PairPart:
    """A committed unit of pairs."""

    name: str
    footer: dict[str, str]
    query_rows: NDArray[np.uint32]
    document_rows: NDArray[np.uint32]
    scores: FloatArray


@dataclass(frozen=True)
class RowPart:
    """A committed range of nodes: values of the rows low .. high-1."""

    name: str
    footer: dict[str, str]
    low: int
    high: int
    values: FloatArray


def uncovered(ranges: Iterable[tuple[int, int]], num_nodes: int) -> list[tuple[int, int]]:
    """What of 0 .. num_nodes-1 the ranges leave out."""
    out, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            out.append((at, low))
        at = max(at, high)
    if at < num_nodes:
        out.append((at, num_nodes))
    return out


def part_names(folder: Path) -> list[str]:
    """Names of the committed units, sorted."""
    with suppress(FileNotFoundError):
        listed = os.listdir(folder / "parts")  # thousands of names at each opening, so nothing but what is needed
        return sorted([name[:-8] for name in listed if name.endswith(".parquet") and name[0] != "."])
    return []


def read_pair_part(folder: Path, name: str, data: bytes | None = None) -> PairPart:
    """A part of a store of pairs (from its bytes, when they were read before); CorruptFileError when it is none."""
    path = folder / "parts" / f"{name}.parquet"
    table, footer = read_parquet(path, data)
    if table.column_names != ["q", "d", "score"]:
        raise CorruptFileError(f"{path}: columns {table.column_names}, expected ['q', 'd', 'score'].")
    columns = [as_numpy(table[column].combine_chunks()) for column in table.column_names]
    return PairPart(name, footer, *columns)


def read_row_part(folder: Path, name: str, data: bytes | None = None) -> RowPart:
    """A part of a store of node logits (from its bytes, when they were read before)."""
    path = folder / "parts" / f"{name}.parquet"
    table, footer = read_parquet(path, data)
    if table.column_names != ["values"]:
        raise CorruptFileError(f"{path}: columns {table.column_names}, expected ['values'].")
    column = table["values"].combine_chunks()
    values = as_numpy(column.values).reshape(len(column), column.type.list_size)
    return RowPart(name, footer, *_range(footer, path), values)


def read_row_range(folder: Path, name: str) -> tuple[int, int]:
    """Node range of a part, from its footer alone."""
    path = folder / "parts" / f"{name}.parquet"
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable parquet file ({error}). Restore or delete it.") from None
    return _range({key.decode(): value.decode(errors="replace") for key, value in metadata.items()}, path)


def _range(footer: dict[str, str], path: Path) -> tuple[int, int]:
    try:
        return int(footer["low"]), int(footer["high"])
    except (KeyError, ValueError):
        raise CorruptFileError(f"{path}: its footer has no node range. Restore or delete it.") from None


def check_part(folder: Path, name: str, header: Header) -> tuple[str, list[int]]:
    """Verify one part to the last byte: seal, payload, teacher, name.

    Returns:
        SHA-256 of the file, and how many rows of each id table it needs (none for node logits).

    Raises:
        CorruptFileError: with what differs.
    """
    path = folder / "parts" / f"{name}.parquet"
    data = sealed_bytes(path)
    if header.spec.kind == "pairs":
        pairs = read_pair_part(folder, name, data)
        footer = pairs.footer
        needed = [int(rows.astype(np.int64).max(initial=-1)) + 1 for rows in (pairs.query_rows, pairs.document_rows)]
        payload = fingerprint_arrays(q=pairs.query_rows, d=pairs.document_rows, score=pairs.scores)
    else:
        rows = read_row_part(folder, name, data)
        needed = []
        footer, payload = rows.footer, fingerprint_arrays(values=rows.values)
    expected = {"teacher_fp": header.spec.fingerprint, "unit": name, "payload": payload}
    for field, value in expected.items():
        if footer.get(field) != value:
            raise CorruptFileError(f"{path}: {field} is {footer.get(field)!r}, expected {value!r}. Delete the part.")
    return hashlib.sha256(data).hexdigest(), needed


def split_keys(keys: NDArray[np.uint64]) -> tuple[IntArray, IntArray]:
    """Query and document rows of joined 64-bit keys."""
    return (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def part_line(part: PairPart | RowPart, rows: int, data: bytes) -> str:
    """A part's line in a manifest."""
    return f"{part.name} {rows} {part.footer.get('payload')} {hashlib.sha256(data).hexdigest()}"


def collect_provenance(provenance: dict[str, Any], footer: dict[str, str]) -> None:
    """Gather where parts came from: every distinct value under its name."""
    found = json.loads(footer.get("provenance", "{}")) | {"versions": footer.get("versions")}
    for name, value in found.items():
        values = provenance.setdefault(name, [])
        if value not in values:
            values.append(value)
