"""Text tables in blocks: Arrow's CSV parser reads a block of lines at once; a block that it refuses is read line by
line, by rules that name the line at fault. Both give the same columns."""

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.packed import BROKEN, open_packed
from structkd.scores.formats.base import identifier, number

_BLOCK_BYTES = 1 << 22
_BLANKS = re.compile(rb"[ \t\x0b\x0c]+")
_PADDED = (b"\t ", b" \t", b"\n ", b" \n", b" \r", b"\r ")

Kind = Literal["id", "number", "text", "unused"]


@dataclass(frozen=True)
class Layout:
    """Columns of a file: what each holds.

    Attributes:
        columns: name -> kind, in the file's order; ids and texts are not empty, numbers finite.
        separator: a tab, or None for any run of blanks.
    """

    columns: Mapping[str, Kind]
    separator: Literal["\t"] | None = "\t"


@dataclass(frozen=True)
class Columns:
    """A block of lines: `texts` of id and text columns, `numbers` of number columns, and each row's line number."""

    texts: Mapping[str, pa.Array]
    numbers: Mapping[str, NDArray[np.float64]]
    lines: NDArray[np.int64]


def read_columns(path: Path, layout: Layout) -> Iterator[Columns]:
    """The columns of a file, block by block.

    Raises:
        DataError: with file and line: another number of columns, a number that is none or not finite, an empty id.
    """
    for first, data in line_blocks(path):
        columns = _parsed(data, first, layout)
        yield _explained(path, data, first, layout) if columns is None else columns


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines) of a text file in blocks of some megabytes, without byte order mark."""
    first, rest = 1, b""
    with open_packed(path) as handle:
        try:
            chunk = handle.read(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
            while chunk:
                end = chunk.rfind(b"\n") + 1
                if end:
                    data, rest = rest + chunk[:end], chunk[end:]
                    yield first, data
                    first += data.count(b"\n")
                else:
                    rest += chunk
                chunk = handle.read(_BLOCK_BYTES)
        except BROKEN as error:
            raise DataError(f"{path}:{first}: cannot be read to its end ({error}). Was the file cut short?") from None
    if rest:
        yield first, rest


def _parsed(data: bytes, first: int, layout: Layout) -> Columns | None:
    """The block by Arrow's parser; None when it or a check refuses something."""
    if any(pattern in data for pattern in _PADDED) or data.startswith((b" ", b"\t")) or data.endswith(b" "):
        if layout.separator == "\t":
            return None  # blanks around columns are taken off line by line
        data = b"\n".join(line.strip() for line in data.split(b"\n"))
    separator = "\t"
    if layout.separator is None:
        if b"\t" in data or b"  " in data or b"\x0b" in data or b"\x0c" in data:
            data = _BLANKS.sub(b"\t", data)
        else:
            separator = " "
    used = [name for name, kind in layout.columns.items() if kind != "unused"]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            read_options=pyarrow.csv.ReadOptions(
                column_names=list(layout.columns), use_threads=False, block_size=len(data) + 1
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=used,
                column_types={name: pa.float64() if layout.columns[name] == "number" else pa.string() for name in used},
                null_values=[],
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError):
        return None
    lines = _line_numbers(data, first, len(table))
    if lines is None:
        return None
    texts, numbers = {}, {}
    for name in used:
        column = table[name].combine_chunks()
        if layout.columns[name] == "number":
            numbers[name] = np.frombuffer(column.buffers()[1], dtype=np.float64, count=len(column))
            if not np.isfinite(numbers[name]).all():
                return None
        else:
            texts[name] = column
            if len(column) and not pc.min(pc.binary_length(column)).as_py():
                return None
    return Columns(texts, numbers, lines)


def _line_numbers(data: bytes, first: int, rows: int) -> NDArray[np.int64] | None:
    """Line number of each row; blank lines are counted, not kept. None when rows and lines do not fit."""
    if data.count(b"\n") + (not data.endswith(b"\n")) == rows:
        return np.arange(first, first + rows, dtype=np.int64)
    kept = [number for number, line in enumerate(data.split(b"\n"), start=first) if line.strip()]
    return np.asarray(kept, dtype=np.int64) if len(kept) == rows else None


def _explained(path: Path, data: bytes, first: int, layout: Layout) -> Columns:
    """The block line by line."""
    values: dict[str, list[Any]] = {name: [] for name in layout.columns}
    lines = []
    expected = ", ".join(layout.columns)
    for line_number, line in _lines(path, data, first):
        where = f"{path}:{line_number}"
        parts = [part.strip() for part in line.split("\t")] if layout.separator else line.split()
        if len(parts) != len(layout.columns):
            raise DataError(f"{where}: found {len(parts)} columns, expected {len(layout.columns)} ({expected}).")
        for (name, kind), part in zip(layout.columns.items(), parts, strict=True):
            if kind == "number":
                values[name].append(number(part, where, name))
            elif kind == "id":
                values[name].append(identifier(part, where, name.removesuffix("_id")))
            elif kind == "text" and not part:
                raise DataError(f"{where}: {name} is empty.")
            else:
                values[name].append(part)
        lines.append(line_number)
    kinds = layout.columns
    return Columns(
        {name: pa.array(held, pa.string()) for name, held in values.items() if kinds[name] in ("id", "text")},
        {name: np.asarray(held, np.float64) for name, held in values.items() if kinds[name] == "number"},
        np.asarray(lines, dtype=np.int64),
    )


def _lines(path: Path, data: bytes, first: int) -> Iterator[tuple[int, str]]:
    line_number = first - 1
    try:
        for line_number, line in enumerate(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"), start=first):
            if line.strip():
                yield line_number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line_number + 1}: cannot be read as UTF-8 text ({error}).") from None
