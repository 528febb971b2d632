"""The opcodes of a pickled dict's (whole number, float) items, read at memory speed."""

from typing import no_type_check

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(nogil=True, cache=True)
@no_type_check
def _scan(data, at, keys, bits):
    """Items from `at` on until another opcode, the end of the data or of the room; returns how many and where."""
    count = 0
    end = len(data) - 14  # the longest item: BININT and BINFLOAT
    while at <= end and count < len(keys):
        code = data[at]
        if code == 0x4A:  # BININT
            key = np.int64(data[at + 1]) | np.int64(data[at + 2]) << 8 | np.int64(data[at + 3]) << 16
            key |= np.int64(np.int8(data[at + 4])) << 24
            after = at + 5
        elif code == 0x4D:  # BININT2
            key = np.int64(data[at + 1]) | np.int64(data[at + 2]) << 8
            after = at + 3
        elif code == 0x4B:  # BININT1
            key = np.int64(data[at + 1])
            after = at + 2
        else:
            break
        if data[after] != 0x47:  # BINFLOAT, big-endian
            break
        word = np.uint64(0)
        for i in range(1, 9):
            word = word << np.uint64(8) | np.uint64(data[after + i])
        keys[count] = key
        bits[count] = word
        count += 1
        at = after + 9
    return count, at


def scan_items(data: NDArray[np.uint8], at: int, room: int) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Keys and values of the items that begin at `at`, at most `room`, and where the next opcode stands."""
    keys, bits = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.uint64)
    count, end = _scan(data, at, keys, bits)
    return keys[:count].copy(), bits[:count].view(np.float64).copy(), int(end)
