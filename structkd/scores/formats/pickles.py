"""Pickles of {query: {document: score}}, read without building any object but numbers, strings and lists of them.

A stream of the opcodes that plain dicts of numbers take is read here, in constant memory: the public file of 160
million pairs fills 17 GB as a dict. Pickles with other opcodes (numpy's numbers, protocol 0) go through an unpickler
that refuses every global but a few constructors of numbers. Neither can run code.
"""

import io
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from structkd.errors import DataError
from structkd.packed import BROKEN, open_packed, packed_writer, unpacked
from structkd.scores.formats._opcodes import scan_items
from structkd.scores.formats.base import BLOCK_ROWS, Blocks, Lists, ScoreTable, identifier, json_names, number

_MAX_BYTES = 1 << 34
_GLOBALS = {
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
}
_CHUNK = 1 << 22
_ROOM = 1000  # items that pickle writes between two SETITEMS
_OUTER, _SHARED = object(), object()


class _Other(Exception):
    """An opcode that plain dicts of numbers do not take."""


def is_pickle(path: Path) -> bool:
    """True for a pickle of protocol 2 or newer, also packed."""
    with open_packed(path) as handle:
        try:
            head = handle.read(2)
        except BROKEN:
            return False
    return len(head) == 2 and head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL


def read_sbert_pickle(path: Path) -> Blocks:
    """Pickle (plain, gzip or zstd) of {query: {document: score}}, read without running any code of it."""
    blocks = _blocks(path, _streamed(path))
    try:
        first = next(blocks)
    except _Other:
        blocks = _blocks(path, _loaded(path))
        first = next(blocks)
    yield first
    try:
        yield from blocks
    except _Other as error:
        raise DataError(f"{path}: {error}; expected a dict query -> document -> score throughout.") from None


Item = tuple[Any, list[Any], list[Any]]


def _blocks(path: Path, items: Iterator[Item]) -> Blocks:
    """Blocks of (query, pieces of documents, pieces of scores)."""
    block = _Block(path)
    for query, documents, scores in items:
        block.add(identifier(query, str(path), "query"), documents, scores)
        if block.count >= BLOCK_ROWS:
            yield block.table()
            block = _Block(path)
    yield block.table()


class _Block:
    """Lists of a block as they come: arrays of whole numbers and of floats, or lists of anything."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queries: list[str] = []
        self._sizes: list[int] = []
        self._documents: list[Any] = []
        self._scores: list[np.ndarray] = []
        self.count = 0

    def add(self, query: str, documents: list[Any], scores: list[Any]) -> None:
        """One query's pieces."""
        size = 0
        for names, values in zip(documents, scores, strict=True):
            if not isinstance(values, np.ndarray):
                for name, score in zip(names, values, strict=True):
                    number(score, f"{self._path}: query {query!r}, document {name!r}")
                names = [identifier(name, f"{self._path}: query {query!r}") for name in names]
                values = np.asarray(values, dtype=np.float64)
            self._documents.append(names)
            self._scores.append(values)
            size += len(names)
        self._queries.append(query)
        self._sizes.append(size)
        self.count += size

    def table(self) -> ScoreTable:
        """The block."""
        place = np.repeat(np.arange(len(self._queries)), self._sizes)
        scores = np.concatenate([np.empty(0), *self._scores])
        if (bad := np.flatnonzero(~np.isfinite(scores))).size:
            query = self._queries[place[bad[0]]]
            raise DataError(f"{self._path}: query {query!r} has the score {scores[bad[0]]}, which is no finite number.")
        if all(isinstance(names, np.ndarray) for names in self._documents):
            documents = pa.array(np.concatenate([np.empty(0, np.int64), *self._documents])).cast(pa.string())
        else:
            documents = pa.array([str(name) for names in self._documents for name in names], pa.string())
        return ScoreTable(pa.array(self._queries, pa.string()).take(pa.array(place, pa.int64())), documents, scores)


def _loaded(path: Path) -> Iterator[Item]:
    """The whole dict by the restricted unpickler."""
    data = unpacked(path)
    if len(data) > _MAX_BYTES:
        raise DataError(f"{path}: {len(data)} bytes unpacked, at most {_MAX_BYTES} are read.")
    try:
        value = _Restricted(io.BytesIO(data)).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: not a readable pickle ({type(error).__name__}: {error}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, expected a dict query -> document -> score.")
    for query, found in value.items():
        if not isinstance(found, dict):
            raise DataError(f"{path}: query {query!r} holds a {type(found).__name__}, expected document -> score.")
        yield query, [list(found)], [list(found.values())]


class _Restricted(pickle.Unpickler):
    """Builds dicts, lists, strings and numbers; any other global could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """The few constructors that numbers need."""
        if (module, name) in _GLOBALS:
            return super().find_class(module, name)
        raise DataError(f"the pickle asks for {module}.{name}; only plain numbers, strings, lists and dicts are read.")


def _streamed(path: Path) -> Iterator[Item]:
    """The items of the outer dict as its opcodes come; `_Other` for anything that is no plain dict of numbers."""
    with open_packed(path) as handle:
        machine = _Machine(path, handle)
        try:
            yield from machine.items()
        except BROKEN as error:
            raise DataError(f"{path}: not a readable pickle ({error}). Was it cut short?") from None


class _Machine:
    """A pickle's stack machine for dicts of numbers and strings; a dict is the flat list of its keys and values."""

    def __init__(self, path: Path, handle: io.BufferedIOBase) -> None:
        self._path, self._handle = path, handle
        self._data, self._at = b"", 0
        self._bytes = np.frombuffer(self._data, np.uint8)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def items(self) -> Iterator[Item]:
        """(key, pieces of keys, pieces of values) of the outer dict's inner dicts."""
        started = False
        while True:
            code = self._take(1)
            if code in (b"J", b"M", b"K") and self._run():
                continue
            if code == b"}":
                self._stack.append(_Dict() if started else _OUTER)
                started = True
            elif code == b"(":
                self._marks.append(len(self._stack))
            elif code in (b"u", b"s"):
                if code == b"u":
                    start = self._marks.pop()
                else:
                    start = len(self._stack) - (1 if isinstance(self._stack[-1], _Run) else 2)
                held = self._stack[start:]
                del self._stack[start:]
                target = self._stack[-1]
                if isinstance(target, _Dict):
                    target.add(held)
                    continue
                if target is not _OUTER:
                    raise _Other("a container that is no dict")
                if any(isinstance(item, _Run) for item in held):
                    raise DataError(f"{self._path}: a query holds a number, expected document -> score.")
                for key, inner in zip(held[::2], held[1::2], strict=True):
                    if not isinstance(inner, _Dict):
                        raise DataError(
                            f"{self._path}: query {key!r} holds a {type(inner).__name__}, expected document -> score."
                        )
                    yield key, inner.keys, inner.values
            elif code == b".":
                if self._stack != [_OUTER]:
                    raise _Other("no dict at the top")
                return
            else:
                self._value(code)

    def _value(self, code: bytes) -> None:
        """Opcodes of numbers, strings and the memo."""
        if code in _FIXED:
            form = _FIXED[code]
            self._stack.append(form.unpack(self._take(form.size))[0])
        elif code in _STRINGS:
            (length,) = _STRINGS[code].unpack(self._take(_STRINGS[code].size))
            self._stack.append(self._take(length).decode("utf-8", "surrogatepass"))
        elif code == b"\x8a":
            self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))
        elif code == b"\x94":
            self._memorise(len(self._memo))
        elif code in _PUTS:
            self._memorise(_PUTS[code].unpack(self._take(_PUTS[code].size))[0])
        elif code in _GETS:
            value = self._memo.get(_GETS[code].unpack(self._take(_GETS[code].size))[0], _SHARED)
            if value is _SHARED:
                raise _Other("a dict that stands in two places")
            self._stack.append(value)
        elif code == b"\x80":
            self._take(1)
        elif code == b"\x95":
            self._take(8)
        else:
            raise _Other(f"opcode {code!r}")

    def _memorise(self, place: int) -> None:
        """Only strings come back; what a dict holds must not stay in memory."""
        self._memo[place] = self._stack[-1] if isinstance(self._stack[-1], str) else _SHARED

    def _run(self) -> bool:
        """Many (whole number, float) items at once; False where there are none. The first opcode was taken."""
        keys, values, end = scan_items(self._bytes, self._at - 1, _ROOM)
        if len(keys):
            self._stack.append(_Run(keys, values))
            self._at = end
        return bool(len(keys))

    def _take(self, count: int) -> bytes:
        if len(self._data) - self._at < count:
            self._data, self._at = self._data[self._at :] + self._handle.read(max(_CHUNK, count)), 0
            self._bytes = np.frombuffer(self._data, np.uint8)
            if len(self._data) < count:
                raise DataError(f"{self._path}: not a readable pickle (it ends in the middle). Was it cut short?")
        self._at += count
        return self._data[self._at - count : self._at]


class _Run:
    """Keys and values that came at once."""

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys, self.values = keys, values


class _Dict:
    """An inner dict: pieces of keys and of values."""

    def __init__(self) -> None:
        self.keys: list[Any] = []
        self.values: list[Any] = []

    def add(self, held: list[Any]) -> None:
        """Items from the stack: single keys and values in turn, and runs of both."""
        keys: list[Any] = []
        values: list[Any] = []
        rest = iter(held)
        for item in rest:
            if isinstance(item, _Run):
                self._flush(keys, values)
                keys, values = [], []
                self.keys.append(item.keys)
                self.values.append(item.values)
            else:
                keys.append(item)
                values.append(next(rest))
        self._flush(keys, values)

    def _flush(self, keys: list[Any], values: list[Any]) -> None:
        if keys:
            self.keys.append(keys)
            self.values.append(values)


_FIXED = {b"J": struct.Struct("<i"), b"K": struct.Struct("<B"), b"M": struct.Struct("<H"), b"G": struct.Struct(">d")}
_STRINGS = {b"\x8c": struct.Struct("<B"), b"X": struct.Struct("<I"), b"\x8d": struct.Struct("<Q")}
_PUTS = {b"q": struct.Struct("<B"), b"r": struct.Struct("<I")}
_GETS = {b"h": struct.Struct("<B"), b"j": struct.Struct("<I")}


def write_sbert_pickle(path: Path, lists: Lists) -> None:
    """Pickle of {query: {document: score}}, packed when the name ends in .gz or .zst; ids are ints when every one is.

    The outer dict's opcodes are written here, so that one list at a time is in memory.
    """
    query_type, document_type = json_names(lists)
    with packed_writer(path) as handle:
        handle.write(b"\x80\x02}")
        for query, (names, scores) in lists.items():
            inner = {document_type(name): score for name, score in zip(names, scores.tolist(), strict=True)}
            handle.write(b"(" + _opcodes(query_type(query)) + _opcodes(inner) + b"u")
        handle.write(b".")


def _opcodes(value: Any) -> bytes:
    """A value's opcodes without protocol and stop; its memo numbers begin anew, which is allowed."""
    return pickle.dumps(value, protocol=2)[2:-1]
