"""Sealed parquet files, which hold their own checksum, and numpy vectors as Arrow arrays without a copy.

The footer of a sealed file holds the SHA-256 of the whole file, taken with the digest's own 64 characters as zeros, so
any changed byte is found without a second file.
"""

import hashlib
import os
import socket
import uuid
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from structkd.errors import CorruptFileError

WRITER = f"{socket.gethostname()}-{os.getpid()}"
_SEAL_KEY = "structkd.seal"
_SEAL_MARK = b"structkd-sha256:"
_SEQUENCE = count()


def temporary(folder: Path) -> Path:
    """A name that readers ignore and gc removes after a while."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".tmp-{WRITER}-{uuid.uuid4().hex[:8]}-{next(_SEQUENCE)}"


class removed_on_error:
    """A temporary file does not outlive a failed write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):
                self._path.unlink()


def as_array(values: NDArray[Any]) -> pa.Array:
    """A numpy vector as an Arrow array over the same memory (pa.array would import pandas: a second, once)."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def table_of(**columns: NDArray[Any]) -> pa.Table:
    """Numpy vectors as a table."""
    return pa.Table.from_arrays([as_array(column) for column in columns.values()], list(columns))


def as_numpy(array: pa.Array) -> NDArray[Any]:
    """An Arrow array of numbers without nulls as a read-only view (to_numpy would import pandas)."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    if array.null_count:
        raise CorruptFileError(f"a column of {array.type} holds {array.null_count} nulls; expected numbers.")
    if not len(array):
        return np.empty(0, dtype=dtype)
    return np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=array.offset * dtype.itemsize)


def write_sealed(table: pa.Table, path: Path, footer: dict[str, str], **options: Any) -> None:
    """Write a parquet file whose footer holds `footer` and the digest of the whole file."""
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({**footer, _SEAL_KEY: _SEAL_MARK.decode() + "0" * 64})
    with open(path, "r+b") as handle:
        data = handle.read()
        place = _seal_place(data, path)
        handle.seek(place)
        handle.write(hashlib.sha256(data).hexdigest().encode())


def sealed_bytes(path: Path) -> bytes:
    """All bytes of a sealed file; CorruptFileError when one differs from what was written."""
    data = path.read_bytes()
    place = _seal_place(data, path)
    found = data[place : place + 64]
    digest = hashlib.sha256(data[:place])
    digest.update(b"0" * 64)
    digest.update(data[place + 64 :])
    if digest.hexdigest().encode() != found:
        raise CorruptFileError(f"{path}: its bytes differ from its checksum. Delete it and score that unit again.")
    return data


def _seal_place(data: bytes, path: Path) -> int:
    place = data.rfind(_SEAL_MARK)
    if place < 0 or len(data) < place + len(_SEAL_MARK) + 64:
        raise CorruptFileError(f"{path}: no checksum in its footer. It was cut short or another program wrote it.")
    return place + len(_SEAL_MARK)


def read_parquet(path: Path, data: bytes | None = None) -> tuple[pa.Table, dict[str, str]]:
    """Table and footer of a parquet file (or of its bytes); CorruptFileError when it cannot be read."""
    try:
        with pq.ParquetFile(path if data is None else pa.BufferReader(data), memory_map=data is None) as file:
            pairs = (file.metadata.metadata or {}).items()
            footer = {key.decode(): value.decode(errors="replace") for key, value in pairs if key != b"ARROW:schema"}
            return file.read(), footer
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{path}: not a readable parquet file ({error}). Restore or delete it.") from None
