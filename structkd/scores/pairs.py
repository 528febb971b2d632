"""PairScores: teacher scores of (query, document) pairs, mapped from a snapshot plus the parts that are newer."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError, MissingScoreError, UsageError
from structkd.ordering import order_ids
from structkd.scores.bundle import read_pairs
from structkd.scores.compaction.merge import Merged, merge, namer, not_in
from structkd.scores.layout.document_rows import blocks
from structkd.scores.layout.id_table import IdTable, TextHash
from structkd.scores.layout.parts import read_pair_part
from structkd.scores.layout.sealed import sealed_bytes
from structkd.scores.layout.shards import Shards
from structkd.scores.layout.snapshot import Csr, checked_path, latest, map_csr, newer_parts
from structkd.scores.manifest import PUBLISHED, Header, ScoreManifest, TeacherSpec

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Strings = list[str]  # the class has a method of that name
Nested = Sequence[Any] | NDArray[Any]  # strings, lists of strings, ...
Missing = Literal["error", "nan"]
Tables = Callable[[], tuple[IdTable, IdTable]]


class PairScores:
    """An open store of pair scores; read-only, safe to share between threads and processes.

    Positions number the stored pairs; `positions()` once and `take()` per training step runs at memory speed. An id
    whose text changed means its newest text; scores of the old text stay stored and are not shown.
    """

    def __init__(
        self, folder: Path, spec: TeacherSpec, manifest: ScoreManifest | None, tables: Tables, shards: Sequence[Csr]
    ) -> None:
        self.folder, self.spec, self.manifest = folder, spec, manifest
        self._load_tables = tables
        self._tables: tuple[IdTable, IdTable] | None = None
        self._shards = Shards(shards)

    @classmethod
    def open(cls, folder: Path, *, verify: str = "size") -> "PairScores":
        """Open the store in `folder`; see `structkd.scores.open`."""
        if (folder / PUBLISHED).is_file():
            published = ScoreManifest.read(folder / PUBLISHED)
            both, csr = read_pairs(folder, published, verify)
            return cls(folder, published.spec, published, lambda: both, [csr])
        header = Header.read(folder)
        for _ in range(10):  # gc may remove an old snapshot between reading its manifest and mapping its files
            manifest = latest(folder)
            try:
                shards = [map_csr(checked_path(folder, entry, verify)) for entry in manifest.files] if manifest else []
                newer = newer_parts(folder, manifest)
                break
            except FileNotFoundError as error:
                lost = error
        else:
            raise DataError(f"{lost.filename}: {lost.strerror}. Restore it, or delete the manifest and compact again.")

        def tables() -> tuple[IdTable, IdTable]:
            return IdTable(folder / "ids", "queries"), IdTable(folder / "ids", "docs")

        store = cls(folder, header.spec, manifest, tables, shards)
        if newer:
            merged = _merge_parts(folder, newer, header.spec)
            extra = not_in(store._shards, merged, dtype=store.dtype, teacher_dtype=header.spec.dtype, folder=folder)
            store = cls(folder, header.spec, manifest, tables, [*shards, extra.csr()])
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers that get the store by pickle map the files themselves."""
        return _reopen, (type(self), self.folder)

    # sizes and names

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"PairScores({str(self.folder)!r}: {len(self)} pairs of {self.spec.model!r}, {self.dtype})"

    @property
    def whole(self) -> bool:
        """Whether the manifest tells all: no newer parts, and no text that a newer one replaced."""
        return not self._replaced and self.manifest is not None and self.manifest.counts["rows"] == len(self)

    @property
    def dtype(self) -> str:
        """Dtype on disk: float16 or float32."""
        return self.manifest.dtype if self.manifest else "float32"

    @property
    def queries(self) -> IdTable:
        """Query rows -> (id, text hash)."""
        return self._both()[0]

    @property
    def documents(self) -> IdTable:
        """Document rows -> (id, text hash)."""
        return self._both()[1]

    def _both(self) -> tuple[IdTable, IdTable]:
        if self._tables is None:
            self._tables = self._load_tables()
        return self._tables

    @property
    def query_ids(self) -> Strings:
        """Ids of the queries that have scores."""
        if self._replaced:
            rows = np.unique(self.rows()[0])
        else:
            rows = np.unique(
                np.concatenate([np.empty(0, np.uint32), *(part.query_rows for part in self._shards.parts)])
            )
        return [self.queries.ids[row] for row in rows.tolist()]

    @property
    def document_ids(self) -> Strings:
        """Ids of the documents that have scores."""
        seen = np.zeros(len(self.documents), dtype=np.bool_)
        if self._replaced:
            seen[self.rows()[1]] = True
        else:
            for rows in chain.from_iterable(blocks(part.documents) for part in self._shards.parts):
                seen[rows] = True
        return [self.documents.ids[row] for row in np.flatnonzero(seen).tolist()]

    @property
    def num_shown(self) -> int:
        """Pairs whose texts are the newest of their ids."""
        return len(self.rows()[0]) if self._replaced else len(self)

    @property
    def _replaced(self) -> bool:
        """Whether an id has a newer text."""
        return any(table.newest_mask() is not None for table in (self.queries, self.documents))

    # lookups

    def lookup(self, query_ids: Nested, document_ids: Nested, missing: Missing = "error") -> FloatArray:
        """Scores of pairs given by their ids, float32, in order.

        Args:
            query_ids: [pairs], or nested lists or an array of any shape.
            document_ids: of the same shape.
            missing: "error" raises; "nan" marks absent pairs.

        Raises:
            MissingScoreError: with the count and three examples.
            DataError: the two differ in shape.
        """
        queries, documents = np.asarray(query_ids, dtype=object), np.asarray(document_ids, dtype=object)
        if queries.shape != documents.shape:
            raise DataError(f"lookup: query ids of shape {queries.shape}, document ids of shape {documents.shape}.")
        flat = queries.reshape(-1).tolist(), documents.reshape(-1).tolist()
        values = self._values(self.positions(*flat), missing, lambda i: (flat[0][i], flat[1][i]))
        return values.reshape(queries.shape)

    def lookup_rows(self, query_rows: IntArray, document_rows: IntArray, missing: Missing = "error") -> FloatArray:
        """`lookup` by rows of the id tables."""
        positions = self.positions_of_rows(query_rows, document_rows)
        return self._values(positions, missing, lambda i: (int(query_rows[i]), int(document_rows[i])))

    def lookup_texts(
        self,
        query_ids: Sequence[str],
        query_hashes: Sequence[TextHash],
        document_ids: Sequence[str],
        document_hashes: Sequence[TextHash],
    ) -> FloatArray:
        """Scores of pairs given by id and text hash, not-a-number where absent; an id without text matches any text."""
        rows = []
        for table, ids, hashes in (
            (self.queries, query_ids, query_hashes),
            (self.documents, document_ids, document_hashes),
        ):
            exact = table.find_texts(ids, hashes)
            rows.append(np.where(exact >= 0, exact, table.find_texts(ids, [None] * len(ids))))
        return self.lookup_rows(rows[0], rows[1], missing="nan")

    def _values(self, positions: IntArray, missing: Missing, name: Callable[[int], object]) -> FloatArray:
        absent = positions < 0
        if not absent.any():
            return self.take(positions)
        if missing == "nan":
            out = np.full(len(positions), np.nan, dtype=np.float32)
            out[~absent] = self.take(positions[~absent])
            return out
        if missing != "error":
            raise UsageError(f"missing={missing!r}; expected 'error' or 'nan'.")
        which = np.flatnonzero(absent)
        raise MissingScoreError(
            len(which),
            [name(int(i)) for i in which[:3]],
            f"{self.folder}: of {len(positions)} pairs",
            "Score them with this teacher first, or ask with missing='nan'.",
        )

    def positions(self, query_ids: Sequence[str], document_ids: Sequence[str]) -> IntArray:
        """Position of each pair, -1 where it is absent; `take(positions)` then costs one gather."""
        return self.positions_of_rows(self.queries.find(query_ids), self.documents.find(document_ids))

    def positions_of_rows(self, query_rows: IntArray, document_rows: IntArray) -> IntArray:
        """`positions` by rows of the id tables."""
        return self._shards.positions(query_rows, document_rows)

    def take(self, positions: NDArray[np.integer]) -> FloatArray:
        """Scores at positions, float32; DataError for a position outside the store (also -1: filter those first)."""
        at: IntArray = np.asarray(positions, dtype=np.int64)
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise DataError(f"{self.folder}: a position lies outside 0 .. {len(self) - 1}; -1 marks an absent pair.")
        return self._shards.take(at)

    # lists

    def list(self, query_id: str) -> tuple[Strings, FloatArray]:
        """Document ids and scores of one query, in ranking order; MissingScoreError when it has none."""
        row = int(self.queries.find([query_id])[0])
        documents, scores = self._list_rows(row)
        if not len(documents):
            raise MissingScoreError(1, [query_id], f"{self.folder}: lists of queries", "Score its documents first.")
        ids = [self.documents.ids[document] for document in documents]
        ranking = order_ids(scores, ids)
        return [ids[i] for i in ranking], scores[ranking]

    def _list_rows(self, query_row: int) -> tuple[NDArray[np.uint32], FloatArray]:
        rows, values = self._shards.list_rows(query_row)
        newest = self.documents.newest_mask()
        return (rows, values) if newest is None else (rows[newest[rows]], values[newest[rows]])

    def rows(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Flat columns of every shown pair: query rows, document rows, scores; ordered by query row."""
        queries, documents, scores = self._shards.columns()
        keep = np.ones(len(queries), dtype=np.bool_)
        for table, rows in ((self.queries, queries), (self.documents, documents)):
            if (newest := table.newest_mask()) is not None:
                keep &= newest[rows]
        if not keep.all():
            queries, documents, scores = queries[keep], documents[keep], scores[keep]
        return queries.astype(np.int64), documents.astype(np.int64), scores

    def pairs(self) -> tuple[Strings, Strings, FloatArray]:
        """Flat columns of every shown pair: query ids, document ids, scores; grouped by query."""
        queries, documents, scores = self.rows()
        query_ids, document_ids = self.queries.ids, self.documents.ids
        return [query_ids[row] for row in queries], [document_ids[row] for row in documents], scores


def _merge_parts(folder: Path, names: Sequence[str], spec: TeacherSpec) -> Merged:
    keys, scores = [], []
    for name in names:
        data = sealed_bytes(folder / "parts" / f"{name}.parquet")
        part = read_pair_part(folder, name, data)
        keys.append((part.query_rows.astype(np.uint64) << np.uint64(32)) | part.document_rows)
        scores.append(part.scores)
    return merge(np.concatenate(keys), np.concatenate(scores), dtype=spec.dtype, where=str(folder), name=namer(folder))


def _reopen(kind: type[PairScores], folder: Path) -> PairScores:
    return kind.open(folder)
