"""Document rows of stored lists: three bytes each where they fit, four where they do not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKED_LIMIT = 1 << 24
"Document rows below this are stored in three bytes."

_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class PackedRows:
    """Document rows below 2^24 in three bytes: the lower two, and the third in an array of its own, both aligned.

    Indexing gives uint32 rows.
    """

    low: NDArray[np.uint16]
    high: NDArray[np.uint8]

    @classmethod
    def of(cls, rows: NDArray[np.uint32]) -> "PackedRows | NDArray[np.uint32]":
        """The rows in three bytes, or as they are where one does not fit."""
        low, high = np.empty(len(rows), np.uint16), np.empty(len(rows), np.uint8)
        for start in range(0, len(rows), _AT_ONCE):
            own = slice(start, start + _AT_ONCE)
            if int(rows[own].max()) >= PACKED_LIMIT:
                return rows
            low[own], high[own] = rows[own] & np.uint32(0xFFFF), rows[own] >> np.uint32(16)
        return cls(low, high)

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, places: Any) -> NDArray[np.uint32]:
        rows: NDArray[np.uint32] = self.high[places].astype(np.uint32)
        rows <<= np.uint32(16)
        rows |= self.low[places]
        return rows


DocumentRows = NDArray[np.uint32] | PackedRows


def blocks(rows: DocumentRows) -> Iterator[NDArray[np.uint32]]:
    """The rows a few million at once."""
    return (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
