"""Names and identity: external string ids <-> int64 rows, texts, pairs of texts, and fingerprints."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError

IntArray = NDArray[np.int64]


class Ids:
    """An ordered set of distinct string ids; an id's row is its position.

    Raises:
        DataError: an id is empty, is no string, or occurs twice.
    """

    __slots__ = ("_row", "_strings")

    def __init__(self, strings: Iterable[str], what: str = "id") -> None:
        self._strings = tuple(strings)
        self._row = {string: row for row, string in enumerate(self._strings)}
        if len(self._row) != len(self._strings):
            seen: set[str] = set()
            twice = next(s for s in self._strings if s in seen or seen.add(s))  # type: ignore[func-returns-value]
            raise DataError(f"{what} {twice!r} occurs twice; ids must be distinct. Remove or rename one of the two.")
        for string in self._strings:
            if not isinstance(string, str) or not string:
                row = self._row[string]
                raise DataError(f"{what} {string!r} at row {row}: expected a non-empty string. Write str(...).")

    def __len__(self) -> int:
        return len(self._strings)

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)

    def __getitem__(self, row: int) -> str:
        return self._strings[row]

    def __contains__(self, string: object) -> bool:
        return string in self._row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and self._strings == other._strings

    def __hash__(self) -> int:
        return hash(self._strings)

    def __repr__(self) -> str:
        return f"Ids({len(self)}: {', '.join(self._strings[:3])}{', ...' if len(self) > 3 else ''})"

    def find(self, strings: Iterable[str]) -> IntArray:
        """Row of each string, -1 where it is unknown."""
        row = self._row
        return np.fromiter((row.get(string, -1) for string in strings), dtype=np.int64)

    def rows(self, strings: Sequence[str], where: str = "ids") -> IntArray:
        """Row of each string; DataError with the count and three examples when some are unknown."""
        rows = self.find(strings)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(repr(strings[i]) for i in missing[:3])
            raise DataError(
                f"{where}: {len(missing)} of {len(strings)} ids are unknown, for example {shown}; "
                f"{len(self)} ids are known. Was it built from another corpus?"
            )
        return rows

    def strings(self, rows: Iterable[int] | IntArray) -> list[str]:
        """The string of each row (rows must be valid: -1 is refused, never mapped)."""
        out = []
        for row in rows:
            if not 0 <= row < len(self._strings):
                raise DataError(f"row {row} is outside the table of {len(self)} ids; mask invalid rows first.")
            out.append(self._strings[row])
        return out

    def fingerprint(self) -> str:
        """Identity of the ids and their order."""
        return fingerprint_fields(self._strings)


@dataclass(frozen=True)
class Texts:
    """Texts under their ids, in row order."""

    ids: Ids
    texts: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts):
            raise DataError(f"{len(self.ids)} ids but {len(self.texts)} texts; give one text per id.")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pairs:
    """(query, document) pairs as rows of two text tables, so that each distinct text exists once.

    Attributes:
        queries: the query table.
        documents: the document table.
        query_rows: int64 [pairs], rows of `queries`.
        document_rows: int64 [pairs], rows of `documents`.
    """

    queries: Texts
    documents: Texts
    query_rows: IntArray
    document_rows: IntArray

    def __post_init__(self) -> None:
        for name, table in (("query_rows", self.queries), ("document_rows", self.documents)):
            rows = np.asarray(getattr(self, name), dtype=np.int64)
            object.__setattr__(self, name, rows)
            if rows.ndim != 1 or (len(rows) and (rows.min() < 0 or rows.max() >= len(table))):
                raise DataError(f"{name} must be a vector of rows in [0, {len(table)}); found shape {rows.shape}.")
        if len(self.query_rows) != len(self.document_rows):
            raise DataError(f"{len(self.query_rows)} query rows but {len(self.document_rows)} document rows.")

    def __len__(self) -> int:
        return len(self.query_rows)

    def take(self, positions: Any) -> "Pairs":
        """The pairs at these positions (any numpy index), over the same tables."""
        return Pairs(self.queries, self.documents, self.query_rows[positions], self.document_rows[positions])

    @property
    def query_ids(self) -> list[str]:
        """Query id of each pair."""
        return self.queries.ids.strings(self.query_rows)

    @property
    def document_ids(self) -> list[str]:
        """Document id of each pair."""
        return self.documents.ids.strings(self.document_rows)

    @property
    def query_texts(self) -> list[str]:
        """Query text of each pair."""
        return [self.queries.texts[row] for row in self.query_rows]

    @property
    def document_texts(self) -> list[str]:
        """Document text of each pair."""
        return [self.documents.texts[row] for row in self.document_rows]


def text_hash(text: str) -> bytes:
    """First 16 bytes of SHA-256 of the UTF-8 text: the identity of a text under whatever id."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def fingerprint_json(value: Any) -> str:
    """SHA-256 of canonical JSON (sorted keys, no white space, ASCII), hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def fingerprint_fields(fields: Iterable[str | bytes]) -> str:
    """SHA-256 of length-prefixed fields, hexadecimal; ("ab", "c") and ("a", "bc") differ, as they must."""
    digest = hashlib.sha256()
    for field in fields:
        data = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else field
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def fingerprint_arrays(**arrays: NDArray[Any]) -> str:
    """SHA-256 over named arrays: name, dtype, shape and bytes of each, in name order."""
    fields: list[str | bytes] = []
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        fields += [name, array.dtype.str, repr(array.shape), array.tobytes()]
    return fingerprint_fields(fields)
