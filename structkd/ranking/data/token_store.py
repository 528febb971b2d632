"""Token ids of many texts in flat files that are read where they lie: tokenised once, in memory never.

<folder>/ids.bin       uint16 (uint32 for larger vocabularies), one text's ids after another
<folder>/offsets.npy   int64 [texts + 1], in units of stored numbers
<folder>/hashes.npy    uint64 [texts, 2], first 16 bytes of each key's SHA-256, sorted
<folder>/rows.npy      int64 [texts], the text of each hash
<folder>/store.json    written last: {"dtype", "planes", "texts"}

8.8 million passages of 75 tokens take 1.3 GB of ids, and 32 bytes each to find them.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.files import read_json, write_json

Tokenise = Callable[[list[Any]], list[NDArray[np.int32]]]

_CHUNK = 1024  # texts tokenised at a time
_SMALL = np.iinfo(np.uint16).max


class TokenStore:
    """Token ids under the hash of their text (or of a pair of texts).

    Attributes:
        folder: where they lie.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        described = read_json(self.folder / "store.json")
        self._planes, self._dtype = described["planes"], np.dtype(described["dtype"])
        self._offsets: NDArray[np.int64] = np.load(self.folder / "offsets.npy", mmap_mode="r")
        self._hashes: NDArray[np.uint64] = np.load(self.folder / "hashes.npy", mmap_mode="r")
        self._rows: NDArray[np.int64] = np.load(self.folder / "rows.npy", mmap_mode="r")
        count = int(self._offsets[-1])
        self._ids: NDArray[Any] = np.empty(0, dtype=self._dtype)
        if count:  # a plain view of the map is cheaper to slice
            self._ids = np.asarray(np.memmap(self.folder / "ids.bin", dtype=self._dtype, mode="r", shape=(count,)))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Size of the token ids."""
        return int(self._ids.nbytes)

    def get(self, keys: Sequence[Any]) -> list[NDArray[np.int32] | None]:
        """Token ids of each key, None for a key that was not stored."""
        if not len(keys) or not len(self):
            return [None] * len(keys)
        hashes = hashes_of(keys)
        places = np.minimum(np.searchsorted(self._hashes[:, 0], hashes[:, 0]), len(self) - 1)
        known = (self._hashes[places] == hashes).all(axis=1)
        rows = self._rows[places]
        return [self._read(int(row)) if found else None for row, found in zip(rows, known, strict=True)]

    def _read(self, row: int) -> NDArray[np.int32]:
        ids = self._ids[self._offsets[row] : self._offsets[row + 1]].astype(np.int32)
        return ids if self._planes == 1 else ids.reshape(self._planes, -1)

    @classmethod
    def build(cls, folder: str | Path, keys: Iterable[Any], tokenise: Tokenise) -> "TokenStore":
        """Tokenise the distinct keys, some at a time; a folder that is whole already is opened as it is.

        Two processes may build the same folder: the first to finish names it, the other's copy goes away.
        """
        target = Path(folder)
        if (target / "store.json").is_file():
            return cls(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")
        try:
            _write(temporary, keys, tokenise)
            with suppress(OSError):  # another process was first
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(target)


def hashes_of(keys: Sequence[Any]) -> NDArray[np.uint64]:
    """uint64 [keys, 2]: the identity of each text, or of each tuple of texts."""
    digests = (hashlib.sha256(_bytes(key)).digest()[:16] for key in keys)
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def _bytes(key: Any) -> bytes:
    """A tuple's parts behind their lengths, so that ("ab", "c") is not ("a", "bc")."""
    if isinstance(key, str):
        return key.encode("utf-8", "surrogatepass")
    parts = [part.encode("utf-8", "surrogatepass") for part in key]
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _write(folder: Path, keys: Iterable[Any], tokenise: Tokenise) -> None:
    """All files; ids go to disk chunk by chunk, as uint32 from the first id on that needs it."""
    folder.mkdir()
    seen: set[bytes] = set()
    hashes: list[NDArray[np.uint64]] = []
    lengths: list[int] = []
    planes = 1
    dtype: np.dtype[Any] = np.dtype(np.uint16)
    path = folder / "ids.bin"
    for chunk in _chunks(keys):
        named = hashes_of(chunk)
        fresh = [i for i, row in enumerate(named) if not (row.tobytes() in seen or seen.add(row.tobytes()))]  # type: ignore[func-returns-value]
        if not fresh:
            continue
        arrays = tokenise([chunk[i] for i in fresh])
        flat = np.concatenate([one.reshape(-1) for one in arrays])
        planes = 1 if arrays[0].ndim == 1 else arrays[0].shape[0]
        if dtype.itemsize == 2 and len(flat) and int(flat.max()) > _SMALL:
            dtype = np.dtype(np.uint32)
            _widen(path)
        with open(path, "ab") as handle:
            handle.write(flat.astype(dtype).tobytes())
        hashes.append(named[fresh])
        lengths += [one.size for one in arrays]
    path.touch()
    table = np.concatenate(hashes) if hashes else np.empty((0, 2), dtype=np.uint64)
    order = np.lexsort((table[:, 1], table[:, 0]))
    first = table[order, 0]
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = first[1:] != first[:-1]  # of two keys that share 64 bits the second is tokenised when it is asked for
    np.save(folder / "hashes.npy", table[order][keep])
    np.save(folder / "rows.npy", order[keep].astype(np.int64))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    write_json(folder / "store.json", {"dtype": dtype.name, "planes": planes, "texts": len(lengths)})


def _widen(path: Path) -> None:
    """Rewrite what is there in four bytes."""
    if path.is_file():
        path.write_bytes(np.fromfile(path, dtype=np.uint16).astype(np.uint32).tobytes())


def _chunks(keys: Iterable[Any]) -> Iterator[list[Any]]:
    source = iter(keys)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk
