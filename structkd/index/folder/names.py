"""Document ids on disk: written as bytes and offsets, read memory-mapped; each decoded when it is asked for."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError
from structkd.ids import Ids, fingerprint_fields
from structkd.ordering import tie_rank

_CHUNK = 1 << 20


class StoredIds(Ids):
    """`Ids` over mapped arrays: a row is decoded when it is read, and the table from id to row is made when it is used.

    Ten million ids as Python strings take two gigabytes; here they take what the file takes.
    """

    __slots__ = ("_data", "_known", "_offsets")

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._data, self._offsets = data, offsets
        self._known: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        row = range(len(self))[row]
        return self._data[self._offsets[row] : self._offsets[row + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            offsets = self._offsets[start : start + _CHUNK + 1].tolist()
            data = self._data[offsets[0] : offsets[-1]].tobytes()
            first = offsets[0]
            for at, end in pairwise(offsets):
                yield data[at - first : end - first].decode("utf-8", "surrogatepass")

    def strings(self, rows: Any) -> list[str]:
        """The string of each row (rows must be valid: -1 is refused, never mapped)."""
        out = []
        for row in rows:
            if not 0 <= row < len(self):
                raise DataError(f"row {row} is outside the table of {len(self)} ids; mask invalid rows first.")
            out.append(self[int(row)])
        return out

    @property
    def _strings(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self)

    @property
    def _row(self) -> dict[str, int]:  # type: ignore[override]
        if self._known is None:
            self._known = {string: row for row, string in enumerate(self)}
        return self._known

    def fingerprint(self) -> str:
        """Identity of the ids and their order."""
        return fingerprint_fields(self)


def id_arrays(ids: Ids) -> dict[str, Tensor]:
    """What the file of ids holds: UTF-8 bytes, offsets [count + 1], tie ranks [count]."""
    encoded = [string.encode("utf-8", "surrogatepass") for string in ids]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(data) for data in encoded], out=offsets[1:])
    data = np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()
    return {
        "bytes": torch.from_numpy(data),
        "offsets": torch.from_numpy(offsets),
        "ties": torch.from_numpy(tie_rank(list(ids))),
    }


def row_number_arrays(count: int) -> dict[str, Tensor]:
    """`id_arrays` of the row numbers "0", "1", ... without making a string of each (test: equal to `id_arrays`)."""
    data = b"".join(
        "".join(map(str, range(start, min(count, start + _CHUNK)))).encode() for start in range(0, count, _CHUNK)
    )
    rows = np.arange(count, dtype=np.int64)
    digits = np.ones(count, dtype=np.int64)
    for power in range(1, len(str(count))):
        digits += rows >= 10**power
    offsets = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(digits, out=offsets[1:])
    # as strings, "7" < "70" < "8": compare the digits padded to one length, then the shorter first
    width = len(str(count))
    padded = rows * 10 ** (width - digits)
    ties = np.empty(count, dtype=np.int64)
    ties[np.lexsort((digits, padded))] = rows
    return {
        "bytes": torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()),
        "offsets": torch.from_numpy(offsets),
        "ties": torch.from_numpy(ties),
    }


def check_ids(ids: Sequence[str] | Ids, count: int) -> Ids:
    """One distinct id per vector."""
    checked = ids if isinstance(ids, Ids) else Ids(ids, "document id")
    if len(checked) != count:
        raise DataError(f"found {len(checked)} ids for {count} vectors; give one id per vector.")
    return checked
