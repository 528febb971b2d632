"""The log of a score store: immutable parquet parts under create-exclusive names, and the plans they follow.

    <root>/cache.json                          header (manifest.Header)
    <root>/parts/<unit>.parquet                what one unit's teacher calls gave (see `parts`)
    <root>/plans/<input>.parquet               a frozen plan: the pairs that were missing when it was made

A visible file is complete. Ids are written before any part that refers to them (see `id_table`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import structkd
from structkd.errors import DataError, TeacherMismatchError
from structkd.files import create_exclusive, write_json
from structkd.ids import fingerprint_arrays, fingerprint_fields
from structkd.scores.layout.id_table import IdTable
from structkd.scores.layout.parts import (
    PairPart,
    RowPart,
    part_names,
    read_pair_part,
    read_row_part,
    read_row_range,
    split_keys,
    uncovered,
)
from structkd.scores.layout.sealed import (
    WRITER,
    as_array,
    as_numpy,
    read_parquet,
    removed_on_error,
    table_of,
    temporary,
    write_sealed,
)
from structkd.scores.manifest import HEADER, Header, TeacherSpec

IntArray = NDArray[np.int64]


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

    def withdraw(self, names: Iterable[str]) -> None:
        """Remove units that nothing refers to yet: those of an import that failed."""
        for name in names:
            (self.folder / "parts" / f"{name}.parquet").unlink(missing_ok=True)

    def _commit(self, name: str, table: pa.Table, footer: dict[str, str], provenance: dict[str, Any] | None) -> bool:
        target = self.folder / "parts" / f"{name}.parquet"
        if target.exists():
            return False
        path = temporary(self.folder / "parts")
        footer = {
            "teacher_fp": self.spec.fingerprint,
            "unit": name,
            **footer,
            "writer": WRITER,
            "versions": _versions(),
            "provenance": _canonical(provenance or {}),
        }
        with removed_on_error(path):
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
        block = keys[_canonical_order(keys)].tobytes()
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
            with removed_on_error(draft):
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


def _canonical_order(keys: NDArray[np.uint8]) -> IntArray:
    """An order of distinct 32-byte keys that depends on nothing but the keys: by a mix of their words, then by all."""
    words = np.ascontiguousarray(keys).view("<u8")
    mixed = words[:, 0] + words[:, 2] * np.uint64(0x9E3779B97F4A7C15)
    order = np.argsort(mixed)
    ordered = mixed[order]
    return np.lexsort((*words.T, mixed)) if (ordered[1:] == ordered[:-1]).any() else order


def _versions() -> str:
    return f"structkd {structkd.__version__}, pyarrow {pa.__version__}, numpy {np.__version__}"


def _canonical(value: dict[str, Any]) -> str:

    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
