"""What numba kernels of both halves share: the liberties that sums may take, and random words by hash.

A draw is a hash of where it stands: none is kept, and any can be made again.
"""

from typing import no_type_check

import numpy as np
import torch
from numba import njit

FAST = {"reassoc", "contract", "arcp", "nsz"}
"Flags of floating point: sums may be vectorised; infinities and not-a-numbers keep theirs."


def seed_of_draws(share: float) -> tuple[np.uint32, np.uint32, np.uint32]:
    """Two words of a seed from torch's random state, and the limit that a `share` of all draws lies below."""
    low, high = torch.randint(2**32, (2,)).numpy().astype(np.uint32)
    return low, high, np.uint32(share * 2**32)


@njit(inline="always")
@no_type_check
def mixed(word):  # pragma: no cover
    """A 32-bit word whose every bit depends on all bits of the one given (Wellons' lowbias32)."""
    word ^= word >> np.uint32(16)
    word = np.uint32(word * np.uint32(0x21F0AAAD))
    word ^= word >> np.uint32(15)
    word = np.uint32(word * np.uint32(0xD35A2D97))
    return word ^ (word >> np.uint32(15))


@njit(inline="always")
@no_type_check
def row_key(row, low, high):  # pragma: no cover
    """What all draws of a row share; `low` and `high` are the two words of a seed."""
    return mixed(np.uint32(mixed(np.uint32(row) ^ low) + high))


@njit(inline="always")
@no_type_check
def draw(key, column):  # pragma: no cover
    """The draw at a column of the row of this key."""
    return mixed(np.uint32(key + np.uint32(np.uint32(column) * np.uint32(0x9E3779B9))))
