"""Id tables: rows of (id, text hash) in numbered segments that only ever grow.

<root>/ids/{queries,docs}-000NN.parquet   row -> (id, text_hash)
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from structkd.errors import CorruptFileError, DataError
from structkd.files import create_exclusive
from structkd.ids import fingerprint_fields, text_hash
from structkd.scores.layout.sealed import read_parquet, removed_on_error, temporary, write_sealed

IntArray = NDArray[np.int64]
TextHash = bytes | None  # None: the text was unknown when the id was written

_DIGITS = 8  # whole numbers of fewer digits are looked up in an array: 40 MB at most
_PLAIN = re.compile(r"(0|[1-9][0-9]{0,6})\Z")
_Key = str | tuple[str, bytes]
_ID_SCHEMA = pa.schema([("id", pa.string()), ("text_hash", pa.binary(16))])


class IdTable:
    """Rows of (id, text hash): numbered segments that only ever grow; one row number never gets a second text."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._segments = 0
        self.ids: list[str] = []
        self.hashes: list[TextHash] = []
        self._latest: dict[str, int] | None = None  # both are made when they are first asked
        self._rows: dict[_Key, int] | None = None
        self._direct: NDArray[np.int32] | None = None
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
        places = range(start, len(self.ids))
        if self._latest is not None:
            self._latest.update(zip(ids, places, strict=True))
        self._note_numbers(ids, hashes, start)
        if self._rows is not None:
            self._rows.update(zip(map(_key, ids, hashes), places, strict=True))

    def find(self, ids: Iterable[str]) -> IntArray:
        """Newest row of each id, -1 where it is unknown."""
        latest = self._row_of_id()
        return np.fromiter((latest.get(string, -1) for string in ids), dtype=np.int64)

    def find_texts(self, ids: Sequence[str], hashes: Sequence[TextHash]) -> IntArray:
        """Row of each (id, text hash), -1 where it is unknown."""
        rows = self._row_of()
        return np.fromiter((rows.get(key, -1) for key in map(_key, ids, hashes)), dtype=np.int64, count=len(ids))

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
            unknown = {key: None for key in unknown if _key(*key) not in self._row_of()}
            if unknown:
                self._write_segment([key[0] for key in unknown], [key[1] for key in unknown])

    def intern(self, ids: Sequence[str] | pa.Array, texts: Sequence[str] | pa.Array | None) -> IntArray:
        """Row of each id with its text; new ones are written first.

        Raises:
            DataError: an id is empty or no string.
        """
        if texts is None and isinstance(ids, pa.Array) and (numbers := _plain(ids)) is not None:
            return self._intern_numbers(numbers)
        names, place = _coded(ids, "id")
        if "" in names:
            raise DataError("id '': expected a non-empty string.")
        if texts is None:
            return self.extend(names, [None] * len(names))[place]
        words, text_place = _coded(texts, "text")
        both, back = np.unique(place * len(words) + text_place, return_inverse=True)
        hashes = [text_hash(word) for word in words]
        pairs = [divmod(code, len(words)) for code in both.tolist()]
        return self.extend([names[name] for name, _ in pairs], [hashes[word] for _, word in pairs])[back]

    def _intern_numbers(self, numbers: IntArray) -> IntArray:
        """`intern` of ids that are whole numbers, through an array instead of a dict of strings."""
        if self._direct is None:
            self._direct = np.full(1 << 16, -1, dtype=np.int32)
            self._note_numbers(self.ids, self.hashes, 0)
        while True:
            self._make_room(int(numbers.max(initial=0)))
            rows = self._direct[numbers]
            if not (unknown := rows < 0).any():
                return rows.astype(np.int64)
            fresh = np.unique(numbers[unknown]).astype(str).tolist()
            self._write_segment(fresh, [None] * len(fresh))

    def _make_room(self, number: int) -> None:
        if self._direct is not None and number >= len(self._direct):
            grown = np.full(max(number + 1, min(2 * number, 10**_DIGITS // 10)), -1, dtype=np.int32)
            grown[: len(self._direct)] = self._direct
            self._direct = grown

    def _note_numbers(self, ids: Sequence[str], hashes: Sequence[TextHash], start: int) -> None:
        """Rows of the ids that are whole numbers without text."""
        if self._direct is None:
            return
        for row, (string, text) in enumerate(zip(ids, hashes, strict=True), start=start):
            if text is None and _PLAIN.match(string):
                self._make_room(int(string))
                self._direct[int(string)] = row

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
        return self._row_of_id()[self.ids[row]] == row

    def newest_mask(self) -> NDArray[np.bool_] | None:
        """[rows] True for the newest text of each id; None when every row is."""
        latest = self._row_of_id()
        if len(latest) == len(self.ids):
            return None
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        mask[list(latest.values())] = True
        return mask

    def _write_segment(self, ids: list[str], hashes: Sequence[TextHash]) -> None:
        """Add rows; when another process took the segment's number, its rows are read instead."""
        table = pa.Table.from_arrays([pa.array(ids, pa.string()), pa.array(hashes, pa.binary(16))], schema=_ID_SCHEMA)
        path = temporary(self._folder)
        footer = {"start": str(len(self.ids)), "rows": str(len(ids))}
        with removed_on_error(path):
            write_sealed(table, path, footer, compression="zstd")
            won = create_exclusive(path, self.path(self._segments))
        if won:
            self._append(ids, hashes)
            self._segments += 1
        else:
            self.refresh()

    def keys(self, rows: IntArray) -> NDArray[np.uint8]:
        """[rows, 16] digest of (id, text hash): what a row means in any store."""
        if (known := len(self._keys)) < len(self.ids):
            fresh = b"".join(map(_key_digest, self.ids[known:], self.hashes[known:]))
            self._keys = np.concatenate([self._keys, np.frombuffer(fresh, dtype=np.uint8).reshape(-1, 16)])
        return self._keys[rows]

    def fingerprint(self) -> str:
        """Identity of the table's content."""
        return fingerprint_fields([self.keys(np.arange(len(self))).tobytes()])

    def _row_of(self) -> "dict[_Key, int]":
        if self._rows is None:
            self._rows = {key: row for row, key in enumerate(map(_key, self.ids, self.hashes))}
        return self._rows

    def _row_of_id(self) -> dict[str, int]:
        if self._latest is None:
            self._latest = {string: row for row, string in enumerate(self.ids)}
        return self._latest


def _coded(values: Sequence[str] | pa.Array, what: str) -> tuple[list[str], IntArray]:
    """Distinct strings in order of appearance, and the place of each value among them."""
    if isinstance(values, pa.Array):
        if values.null_count:
            raise DataError(f"{what} None: expected a string.")
        coded = values.dictionary_encode()
        return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)
    place: dict[str, int] = {}
    slots = np.fromiter((place.setdefault(value, len(place)) for value in values), dtype=np.int64, count=len(values))
    for value in place:
        if not isinstance(value, str):
            raise DataError(f"{what} {value!r}: expected a non-empty string.")
    return list(place), slots


def _plain(ids: pa.Array) -> IntArray | None:
    """The ids as numbers when each is the plain decimal of a number with few digits."""
    if ids.null_count or not len(ids) or not pa.types.is_string(ids.type):
        return None
    if pc.max(pc.binary_length(ids)).as_py() >= _DIGITS or not pc.all(pc.ascii_is_decimal(ids)).as_py():
        return None
    numbers = ids.cast(pa.int64())
    return numbers.to_numpy() if numbers.cast(pa.string()).equals(ids) else None  # "007" is another id than "7"


def _key(string: str, text: TextHash) -> _Key:
    """What tells rows apart; the string alone saves a tuple for each of millions of ids without text."""
    return string if text is None else (string, text)


def _key_digest(string: str, text: TextHash) -> bytes:
    data = string.encode("utf-8", "surrogatepass")
    return hashlib.sha256(len(data).to_bytes(8, "little") + data + (text or b"")).digest()[:16]
