"""The log of a score store: immutable parquet parts under create-exclusive names, and the id tables they refer to.

    <root>/cache.json                          header (manifest.Header)
    <root>/ids/{queries,docs}-000NN.parquet   row -> (id, text_hash), numbered append-only segments
    <root>/parts/<unit>.parquet                pairs: q, d, score; rows: values of a node range
    <root>/plans/<input>.parquet               a frozen plan: the pairs that were missing when it was made

A visible file is complete. Each parquet file is sealed: its footer holds the SHA-256 of the whole file, taken with
the digest's own 64 characters as zeros, so any changed byte is found without a second file.
"""

import hashlib
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from structkd.errors import CorruptFileError, DataError, TeacherMismatchError
from structkd.files import create_exclusive, write_json
from structkd.ids import fingerprint_arrays, fingerprint_fields
from structkd.scores.manifest import HEADER, Header, TeacherSpec

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
TextHash = bytes | None  # None: the text was unknown when the id was written

_SEAL_KEY = "structkd.seal"
_SEAL_MARK = b"structkd-sha256:"
_WRITER = f"{socket.gethostname()}-{os.getpid()}"
_SEQUENCE = count()
_ID_SCHEMA = pa.schema([("id", pa.string()), ("text_hash", pa.binary(16))])


def temporary(folder: Path) -> Path:
    """A name that readers ignore and gc removes after a while."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".tmp-{_WRITER}-{uuid.uuid4().hex[:8]}-{next(_SEQUENCE)}"


# sealed parquet files


def as_array(values: NDArray[Any]) -> pa.Array:
    """A numpy vector as an Arrow array over the same memory (pa.array would import pandas: a second, once)."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def table_of(**columns: NDArray[Any]) -> pa.Table:
    """Numpy vectors as a table."""
    return pa.Table.from_arrays([as_array(column) for column in columns.values()], list(columns))


def as_numpy(array: pa.Array) -> NDArray[Any]:
    """An Arrow array of numbers without nulls as a read-only view (to_numpy would import pandas)."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    if array.null_count:
        raise CorruptFileError(f"a column of {array.type} holds {array.null_count} nulls; expected numbers.")
    if not len(array):
        return np.empty(0, dtype=dtype)
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=array.offset * dtype.itemsize)


def write_sealed(table: pa.Table, path: Path, footer: dict[str, str], **options: Any) -> None:
    """Write a parquet file whose footer holds `footer` and the digest of the whole file."""
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({**footer, _SEAL_KEY: _SEAL_MARK.decode() + "0" * 64})
    with open(path, "r+b") as handle:
        data = handle.read()
        place = _seal_place(data, path)
        handle.seek(place)
        handle.write(hashlib.sha256(data).hexdigest().encode())


def sealed_bytes(path: Path) -> bytes:
    """All bytes of a sealed file; CorruptFileError when one differs from what was written."""
    data = path.read_bytes()
    place = _seal_place(data, path)
    found = data[place : place + 64]
    digest = hashlib.sha256(data[:place])
    digest.update(b"0" * 64)
    digest.update(data[place + 64 :])
    if digest.hexdigest().encode() != found:
        raise CorruptFileError(f"{path}: its bytes differ from its checksum. Delete it and score that unit again.")
    return data


def _seal_place(data: bytes, path: Path) -> int:
    place = data.rfind(_SEAL_MARK)
    if place < 0 or len(data) < place + len(_SEAL_MARK) + 64:
        raise CorruptFileError(f"{path}: no checksum in its footer. It was cut short or another program wrote it.")
    return place + len(_SEAL_MARK)


def read_parquet(path: Path, data: bytes | None = None) -> tuple[pa.Table, dict[str, str]]:
    """Table and footer of a parquet file (or of its bytes); CorruptFileError when it cannot be read."""
    try:
        with pq.ParquetFile(path if data is None else pa.BufferReader(data), memory_map=data is None) as file:
            pairs = (file.metadata.metadata or {}).items()
            footer = {key.decode(): value.decode(errors="replace") for key, value in pairs if key != b"ARROW:schema"}
            return file.read(), footer
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable parquet file ({error}). Restore or delete it.") from None


# id tables


class IdTable:
    """Rows of (id, text hash): numbered segments that only ever grow; one row number never gets a second text."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._segments = 0
        self.ids: list[str] = []
        self.hashes: list[TextHash] = []
        self._latest: dict[str, int] = {}
        self._rows: dict[tuple[str, TextHash], int] | None = None
        self._keys = np.empty((0, 16), dtype=np.uint8)
        self._same: dict[bytes, list[int]] = {}
        self._same_rows = 0
        self.refresh()

    @classmethod
    def of(cls, ids: Sequence[str], hashes: Sequence[TextHash]) -> "IdTable":
        """A table that lies in no folder (that of a published store)."""
        table = cls(Path(os.devnull) / "none", "none")
        table._append(ids, hashes)
        return table

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, number: int) -> Path:
        """Where segment `number` lies."""
        return self._folder / f"{self._name}-{number:05d}.parquet"

    def refresh(self) -> None:
        """Read the segments that appeared since."""
        while (path := self.path(self._segments)).exists():
            table, footer = read_parquet(path)
            if footer.get("start") != str(len(self.ids)) or footer.get("rows") != str(len(table)):
                raise CorruptFileError(f"{path}: starts at row {footer.get('start')}, expected {len(self.ids)}.")
            self._append(table["id"].to_pylist(), table["text_hash"].to_pylist())
            self._segments += 1

    def _append(self, ids: Sequence[str], hashes: Sequence[TextHash]) -> None:
        start = len(self.ids)
        self.ids.extend(ids)
        self.hashes.extend(hashes)
        self._latest.update(zip(ids, range(start, len(self.ids)), strict=True))
        if self._rows is not None:
            self._rows.update(zip(zip(ids, hashes, strict=True), range(start, len(self.ids)), strict=True))

    def find(self, ids: Iterable[str]) -> IntArray:
        """Newest row of each id, -1 where it is unknown."""
        latest = self._latest
        return np.fromiter((latest.get(string, -1) for string in ids), dtype=np.int64)

    def find_texts(self, ids: Sequence[str], hashes: Sequence[TextHash]) -> IntArray:
        """Row of each (id, text hash), -1 where it is unknown."""
        rows = self._row_of()
        return np.fromiter((rows.get(key, -1) for key in zip(ids, hashes, strict=True)), dtype=np.int64, count=len(ids))

    def extend(self, ids: Sequence[str], hashes: Sequence[TextHash]) -> IntArray:
        """Row of each (id, text hash); unknown ones are written first, as the next segment.

        Two processes that extend at once cannot both get a number: the loser reads the winner's segment and tries
        again with what is still unknown.
        """
        while True:
            rows = self.find_texts(ids, hashes)
            unknown = dict.fromkeys((ids[i], hashes[i]) for i in np.flatnonzero(rows < 0).tolist())
            if not unknown:
                return rows
            self.refresh()
            unknown = {key: None for key in unknown if key not in self._row_of()}
            if unknown:
                self._write_segment([key[0] for key in unknown], [key[1] for key in unknown])
            self.refresh()

    def same_text(self, row: int) -> list[int]:
        """Rows of other ids (or of this id, earlier) with the same text; the row itself included."""
        for new in range(self._same_rows, len(self.ids)):
            if (text := self.hashes[new]) is not None:
                self._same.setdefault(text, []).append(new)
        self._same_rows = len(self.ids)
        own = self.hashes[row]
        return [row] if own is None else self._same[own]

    def is_newest(self, row: int) -> bool:
        """False when the row's id has a newer text."""
        return self._latest[self.ids[row]] == row

    def newest_mask(self) -> NDArray[np.bool_] | None:
        """[rows] True for the newest text of each id; None when every row is."""
        if len(self._latest) == len(self.ids):
            return None
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        mask[list(self._latest.values())] = True
        return mask

    def _write_segment(self, ids: list[str], hashes: list[TextHash]) -> None:
        table = pa.Table.from_arrays([pa.array(ids, pa.string()), pa.array(hashes, pa.binary(16))], schema=_ID_SCHEMA)
        path = temporary(self._folder)
        footer = {"start": str(len(self.ids)), "rows": str(len(ids))}
        with _removed_on_error(path):
            write_sealed(table, path, footer, compression="zstd")
            create_exclusive(path, self.path(self._segments))

    def keys(self, rows: IntArray) -> NDArray[np.uint8]:
        """[rows, 16] digest of (id, text hash): what a row means in any store."""
        if (known := len(self._keys)) < len(self.ids):
            fresh = b"".join(map(_key_digest, self.ids[known:], self.hashes[known:]))
            self._keys = np.concatenate([self._keys, np.frombuffer(fresh, dtype=np.uint8).reshape(-1, 16)])
        return self._keys[rows]

    def fingerprint(self) -> str:
        """Identity of the table's content."""
        return fingerprint_fields([self.keys(np.arange(len(self))).tobytes()])

    def _row_of(self) -> dict[tuple[str, TextHash], int]:
        if self._rows is None:
            self._rows = {key: row for row, key in enumerate(zip(self.ids, self.hashes, strict=True))}
        return self._rows


def _key_digest(string: str, text: TextHash) -> bytes:
    data = string.encode("utf-8", "surrogatepass")
    return hashlib.sha256(len(data).to_bytes(8, "little") + data + (text or b"")).digest()[:16]


class _removed_on_error:
    """A temporary file does not outlive a failed write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):
                self._path.unlink()


# parts


@dataclass(frozen=True)
class Unit:
    """A block of distinct pairs that is scored and committed as one.

    Attributes:
        name: first 16 hex digits of the SHA-256 of teacher and sorted keys: the same pairs have the same name.
        query_rows: int64 [pairs], sorted by (query row, document row).
        document_rows: int64 [pairs].
    """

    name: str
    query_rows: IntArray
    document_rows: IntArray

    def __len__(self) -> int:
        return len(self.query_rows)


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


class _Log:
    """What both kinds of log share: the header and the listing of parts."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header

    @property
    def spec(self) -> TeacherSpec:
        """The teacher."""
        return self.header.spec

    def units(self) -> set[str]:
        """Names of all committed units."""
        return set(part_names(self.folder))

    def _commit(self, name: str, table: pa.Table, footer: dict[str, str], provenance: dict[str, Any] | None) -> bool:
        target = self.folder / "parts" / f"{name}.parquet"
        if target.exists():
            return False
        path = temporary(self.folder / "parts")
        footer = {
            "teacher_fp": self.spec.fingerprint,
            "unit": name,
            **footer,
            "writer": _WRITER,
            "versions": _versions(),
            "provenance": _canonical(provenance or {}),
        }
        with _removed_on_error(path):
            # delta coding undoes the sort order of the rows; scores are close to random bits
            write_sealed(table, path, footer, compression="zstd", use_dictionary=False)
            return create_exclusive(path, target)


class PairLog(_Log):
    """Writer of a store of pairs; `PairLog.open` makes or continues one."""

    def __init__(self, folder: Path, header: Header) -> None:
        super().__init__(folder, header)
        self.queries = IdTable(folder / "ids", "queries")
        self.documents = IdTable(folder / "ids", "docs")

    @classmethod
    def open(cls, folder: str | Path, spec: TeacherSpec) -> "PairLog":
        """The log in `folder` for this teacher; TeacherMismatchError when the folder belongs to another."""
        if spec.kind != "pairs":
            raise DataError(f"{folder}: a teacher of kind {spec.kind!r} has no pair scores. Use kind='pairs'.")
        return cls(Path(folder), _header(Path(folder), Header(spec)))

    def unit(self, query_rows: IntArray, document_rows: IntArray) -> Unit:
        """These pairs as a unit; DataError when one occurs twice."""
        order = np.lexsort((document_rows, query_rows))
        queries, documents = query_rows[order], document_rows[order]
        twice = (queries[1:] == queries[:-1]) & (documents[1:] == documents[:-1])
        if twice.any():
            at = int(np.flatnonzero(twice)[0])
            pair = (self.queries.ids[queries[at]], self.documents.ids[documents[at]])
            raise DataError(f"{self.folder}: the pair {pair} occurs twice in one unit. Remove one.")
        keys = np.concatenate([self.queries.keys(queries), self.documents.keys(documents)], axis=1)
        words = np.ascontiguousarray(keys).view(">u8")
        block = keys[np.lexsort(words.T[::-1])].tobytes()
        name = hashlib.sha256(self.spec.fingerprint.encode() + block).hexdigest()[:16]
        return Unit(name, queries, documents)

    def plan(
        self,
        query_rows: IntArray,
        document_rows: IntArray,
        scored: Callable[[IntArray, IntArray], NDArray[np.bool_]],
        unit_rows: int = 20_000,
    ) -> list[Unit]:
        """Cut the pairs that have no score yet into units, once: the plan is kept under the name of its input.

        Asked again for the same pairs (after a crash, by another rank) the kept plan is returned, so unit names do not
        change while parts appear. Work left = plan minus `units()`.

        Args:
            query_rows: int64 [pairs]; duplicates count once.
            document_rows: int64 [pairs].
            scored: tells which of given pairs have a score (asked when the plan is new).
            unit_rows: pairs in a unit: what a killed process can lose.
        """
        keys = np.unique((query_rows.astype(np.uint64) << np.uint64(32)) | document_rows.astype(np.uint64))
        name = fingerprint_arrays(keys=keys, unit_rows=np.asarray(unit_rows))[:16]
        path = self.folder / "plans" / f"{name}.parquet"
        if not path.exists():
            keys = keys[~scored(*split_keys(keys))]
            draft = temporary(path.parent)
            with _removed_on_error(draft):
                write_sealed(table_of(key=keys), draft, {"input": name}, compression="zstd", use_dictionary=False)
                create_exclusive(draft, path)
        keys = as_numpy(read_parquet(path)[0]["key"].combine_chunks())
        queries, documents = split_keys(keys)
        return [
            self.unit(queries[start : start + unit_rows], documents[start : start + unit_rows])
            for start in range(0, len(keys), unit_rows)
        ]

    def pending(self, plan: Sequence[Unit], shard: tuple[int, int] = (0, 1)) -> list[Unit]:
        """Units of this shard (rank, world size) that nobody has committed."""
        rank, world = shard
        done = self.units()
        return [unit for unit in plan[rank::world] if unit.name not in done]

    def commit(self, unit: Unit, scores: NDArray[np.floating], provenance: dict[str, Any] | None = None) -> bool:
        """Make the scores of a unit durable; returns False when another worker had committed it.

        Args:
            unit: from `unit` or `plan`.
            scores: float32 [pairs], in the unit's order.
            provenance: JSON values kept in the footer and in later manifests; no part of the identity.

        Raises:
            DataError: wrong shape, not-a-number or infinity (with the count and three pairs).
        """
        scores = np.asarray(scores, dtype=np.float32)
        if scores.shape != (len(unit),):
            raise DataError(f"{self.folder}: scores of shape {scores.shape} for a unit of {len(unit)} pairs.")
        if not np.isfinite(scores).all():
            bad = np.flatnonzero(~np.isfinite(scores))
            shown = [(self.queries.ids[unit.query_rows[i]], self.documents.ids[unit.document_rows[i]]) for i in bad[:3]]
            raise DataError(
                f"{self.folder}: the teacher gave {len(bad)} of {len(unit)} scores that are no finite numbers, for "
                f"example {', '.join(map(str, shown))}. Nothing of this unit was kept; mend the teacher."
            )
        arrays = {"q": unit.query_rows.astype(np.uint32), "d": unit.document_rows.astype(np.uint32), "score": scores}
        footer = {
            "input_fp": fingerprint_arrays(q=arrays["q"], d=arrays["d"]),
            "rows": str(len(unit)),
            "payload": fingerprint_arrays(**arrays),
        }
        return self._commit(unit.name, table_of(**arrays), footer, provenance)

    def read(self, name: str) -> PairPart:
        """A committed unit."""
        return read_pair_part(self.folder, name)


class RowLog(_Log):
    """Writer of a store of node logits; `RowLog.open` makes or continues one."""

    @classmethod
    def open(
        cls, folder: str | Path, spec: TeacherSpec, graph_fingerprint: str, num_nodes: int, num_classes: int
    ) -> "RowLog":
        """The log in `folder` for this teacher and graph; TeacherMismatchError when the folder belongs to another."""
        if spec.kind != "rows":
            raise DataError(f"{folder}: a teacher of kind {spec.kind!r} has no node logits. Use kind='rows'.")
        header = Header(spec, graph_fingerprint, num_nodes, num_classes)
        return cls(Path(folder), _header(Path(folder), header))

    def unit(self, low: int, high: int) -> str:
        """Name of the unit of the nodes low .. high-1."""
        fields = [self.spec.fingerprint, str(self.header.graph_fingerprint), str(low), str(high)]
        return fingerprint_fields(fields)[:16]

    def plan(self, unit_rows: int = 65_536) -> list[tuple[int, int]]:
        """All node ranges."""
        nodes = self.header.num_nodes or 0
        return [(low, min(low + unit_rows, nodes)) for low in range(0, nodes, unit_rows)]

    def pending(self, plan: Sequence[tuple[int, int]], shard: tuple[int, int] = (0, 1)) -> list[tuple[int, int]]:
        """Ranges of this shard (rank, world size) that nobody has committed."""
        rank, world = shard
        done = self.units()
        return [(low, high) for low, high in plan[rank::world] if self.unit(low, high) not in done]

    def commit(self, low: int, values: NDArray[np.floating], provenance: dict[str, Any] | None = None) -> bool:
        """Make the logits of the nodes low .. low+len(values)-1 durable; False when they were committed before.

        Raises:
            DataError: wrong shape, outside the graph, not-a-number or infinity.
        """
        values = np.ascontiguousarray(values, dtype=np.float32)
        nodes, classes = self.header.num_nodes or 0, self.header.num_classes or 0
        if values.ndim != 2 or values.shape[1] != classes or low < 0 or low + len(values) > nodes or not len(values):
            raise DataError(
                f"{self.folder}: logits of shape {values.shape} for the nodes from {low}; the store holds "
                f"{nodes} nodes x {classes} classes."
            )
        if not np.isfinite(values).all():
            bad = low + np.flatnonzero(~np.isfinite(values).all(axis=1))
            raise DataError(
                f"{self.folder}: {len(bad)} nodes have logits that are no finite numbers, for example nodes "
                f"{', '.join(map(str, bad[:3]))}. Nothing of this range was kept; mend the teacher."
            )
        high = low + len(values)
        column = pa.FixedSizeListArray.from_arrays(as_array(values.reshape(-1)), classes)
        payload = fingerprint_arrays(values=values)
        footer = {
            "input_fp": str(self.header.graph_fingerprint),
            "rows": str(len(values)),
            "low": str(low),
            "high": str(high),
            "payload": payload,
        }
        return self._commit(self.unit(low, high), pa.Table.from_arrays([column], ["values"]), footer, provenance)

    def read(self, name: str) -> RowPart:
        """A committed range."""
        return read_row_part(self.folder, name)

    def missing(self) -> list[tuple[int, int]]:
        """Node ranges that have no logits yet, ascending."""
        return uncovered([read_row_range(self.folder, name) for name in self.units()], self.header.num_nodes or 0)


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
        return sorted(
            name.removesuffix(".parquet") for name in os.listdir(folder / "parts") if not name.startswith(".tmp-")
        )
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


def _header(folder: Path, header: Header) -> Header:
    """Create the header or check the one that is there."""
    path = folder / HEADER
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{folder}: is a file; expected a folder for teacher scores.")
        draft = temporary(folder)
        write_json(draft, header.to_json())
        create_exclusive(draft, path)
    found = Header.read(folder)
    found.spec.require(header.spec, folder)
    for name, have, want in (
        ("graph_fingerprint", found.graph_fingerprint, header.graph_fingerprint),
        ("num_nodes", found.num_nodes, header.num_nodes),
        ("num_classes", found.num_classes, header.num_classes),
    ):
        if have != want:
            raise TeacherMismatchError(str(folder), {name: (have, want)})
    return found


def _versions() -> str:
    return f"structkd {version('structkd')}, pyarrow {pa.__version__}, numpy {np.__version__}"


def _canonical(value: dict[str, Any]) -> str:

    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
