"""Id tables: rows of (id, text hash) in numbered segments that only ever grow.

<root>/ids/{queries,docs}-000NN.parquet   row -> (id, text_hash)
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from structkd.errors import CorruptFileError
from structkd.files import create_exclusive
from structkd.ids import fingerprint_fields
from structkd.scores.sealed import read_parquet, removed_on_error, temporary, write_sealed

IntArray = NDArray[np.int64]
TextHash = bytes | None  # None: the text was unknown when the id was written

_ID_SCHEMA = pa.schema([("id", pa.string()), ("text_hash", pa.binary(16))])


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
        with removed_on_error(path):
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
