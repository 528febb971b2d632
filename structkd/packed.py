"""Files as they come: plain, gzip or zstd, told by their first bytes and not by their name."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from structkd.errors import DataError
from structkd.files import atomic_path

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BROKEN = (EOFError, OSError, zlib.error)
"What reading a damaged or cut packed file raises."


def open_packed(path: str | Path) -> io.BufferedIOBase:
    """The unpacked bytes of a file as a stream.

    Raises:
        DataError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, "rb") as probe:
        head = probe.read(4)
    if head[:2] == _GZIP:
        return gzip.GzipFile(path, "rb")
    if head == _ZSTD:
        import pyarrow as pa  # here alone: few files are zstd, and every command imports this

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return open(path, "rb")


def open_text(path: str | Path, newline: str | None = None) -> io.TextIOWrapper:
    """`open_packed` as UTF-8 text without its byte order mark; `newline` as `open` has it."""
    return io.TextIOWrapper(cast(io.BufferedReader, open_packed(path)), encoding="utf-8-sig", newline=newline)


def unpacked(path: str | Path) -> bytes:
    """All unpacked bytes of a file; DataError when it is damaged or cut short."""
    with open_packed(path) as handle:
        try:
            return handle.read()
        except BROKEN as error:
            raise DataError(f"{path}: its packed data is damaged or cut short ({error}).") from None


@contextmanager
def packed_writer(path: str | Path) -> Iterator[io.BufferedIOBase]:
    """A stream into a file that appears whole or not at all; packed when its name ends in .gz or .zst."""
    path = Path(path)
    with atomic_path(path) as draft:
        below: Any = None
        stream: io.BufferedIOBase
        if path.suffix == ".gz":
            below = open(draft, "wb")  # noqa: SIM115 (closed below)
            stream = gzip.GzipFile(filename="", fileobj=below, mode="wb", compresslevel=6, mtime=0)
        elif path.suffix == ".zst":
            import pyarrow as pa

            stream = io.BufferedWriter(pa.CompressedOutputStream(pa.OSFile(str(draft), "wb"), "zstd"))
        else:
            stream = open(draft, "wb")  # noqa: SIM115
        try:
            yield stream
        finally:
            stream.close()
            if below is not None:
                below.close()


@contextmanager
def text_writer(path: str | Path) -> Iterator[io.TextIOWrapper]:
    """`packed_writer` for UTF-8 text with line feeds."""
    with packed_writer(path) as stream:
        text = io.TextIOWrapper(cast(io.BufferedWriter, stream), encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()
