"""An index folder: vectors and other arrays in safetensors files, opened memory-mapped; the manifest written last.

<index>/index.json              manifest: kind, metric, dim, count, recall, versions; path, bytes, sha256 of each file
<index>/vectors-<tag>.safetensors   "vectors" float32 [count, dim] (normalised under cosine)
<index>/ids-<tag>.safetensors       "bytes" uint8, "offsets" int64 [count + 1], "ties" int64 [count]
<index>/<engine>-<tag>.*            what the kind itself needs

Every build writes under a new tag, so a build that is killed leaves the old index as it was: its manifest and its files
are untouched until the new manifest takes the name in one rename; only then are the old files removed.
"""

import importlib.metadata
import json
import mmap
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.sparse import csr_array, save_npz
from torch import Tensor

from structkd.errors import CorruptFileError, DataError
from structkd.files import atomic_path, inside, read_json, sha256_file, sync_folder, write_json
from structkd.ids import Ids, fingerprint_fields
from structkd.index.base import folder_of
from structkd.index.names import StoredIds, check_ids, id_arrays, row_number_arrays

FORMAT = "structkd-index"
VERSION = 1
MANIFEST = "index.json"
_HEADER_BYTES = (
    256  # header of the vector file, padded with spaces: data starts on a cache line, length known at the end
)
_FORGET_BYTES = 1 << 30
_PACKAGES = ("structkd", "torch", "numpy", "faiss-cpu", "faiss-gpu-cu12", "bm25s")


@dataclass(frozen=True)
class StoredFile:
    """One file of an index as the manifest names it."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class IndexManifest:
    """What index.json holds."""

    kind: str
    "Which engine answers: flat, ivf-sq8, ivf-pq, hnsw, bm25, ..."

    metric: str
    "cosine, ip, l2; bm25 for texts."

    count: int
    "Documents."

    dim: int | None = None
    "Dimensions of the vectors; None for texts."

    normalized: bool = False
    "Whether the stored vectors have length one."

    dtype: str = "float32"
    "Type of the stored vectors."

    encoder: str | None = None
    "Fingerprint of the encoder that made the vectors, when it is known."

    corpus: str | None = None
    "Fingerprint of the document ids in row order."

    reason: str | None = None
    "Why this kind was chosen, when it was chosen automatically."

    build_seconds: float = 0.0
    "Wall time of the build."

    recall: dict[str, Any] | None = None
    "Measured against exact search: k, sample, value."

    parameters: dict[str, Any] = field(default_factory=dict)
    "What the engine was built with and searches with."

    built: dict[str, str] = field(default_factory=dict)
    "Versions of the packages that wrote it."

    files: tuple[StoredFile, ...] = ()
    "Every file of the index but this one."

    @property
    def bytes(self) -> int:
        """Size of the index files."""
        return sum(file.bytes for file in self.files)


class Draft:
    """An index being written: new files under one tag, then the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = uuid.uuid4().hex[:12]
        self._names: list[str] = []

    @contextmanager
    def file(self, stem: str, suffix: str) -> Iterator[Path]:
        """A path to write one file to; it is renamed into place, complete, at the end of the block."""
        name = f"{stem}-{self.tag}{suffix}"
        with atomic_path(self.folder / name) as temporary:
            yield temporary
        self._names.append(name)

    def stored(self, manifest: IndexManifest) -> "Stored":
        """What is already written, to read while the rest is built."""
        return Stored(
            self.folder, replace(manifest, files=tuple(StoredFile(name, 0, "") for name in self._names)), True
        )

    def arrays(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one safetensors file."""
        with self.file(stem, ".safetensors") as path:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def ids(self, ids: Sequence[str] | Ids | None, count: int) -> str:
        """Write the document ids (row numbers when None) and their tie ranks; the fingerprint of the ids.

        Raises:
            DataError: an id repeats, or there is not one per document.
        """
        if ids is None:
            self.arrays("ids", row_number_arrays(count))
            return fingerprint_fields(map(str, range(count)))
        checked = check_ids(ids, count)
        self.arrays("ids", id_arrays(checked))
        return checked.fingerprint()

    def commit(self, manifest: IndexManifest) -> IndexManifest:
        """Write the manifest last, then remove what no longer belongs to the index."""
        paths = [self.folder / name for name in self._names]
        files = tuple(StoredFile(path.name, path.stat().st_size, sha256_file(path)) for path in paths)
        complete = replace(manifest, files=files, built=_versions())
        body = {item.name: getattr(complete, item.name) for item in fields(complete)}
        body["files"] = [vars(file) for file in files]
        write_json(self.folder / MANIFEST, {"format": FORMAT, "version": VERSION} | body)
        _remove_others(self.folder, keep={MANIFEST, *self._names})
        return complete


class VectorWriter:
    """Writes rows of float32 vectors to one safetensors file, block by block; the count is known at the end."""

    def __init__(self, handle: IO[bytes], dim: int) -> None:
        self.dim, self.count = dim, 0
        self._handle = handle
        handle.write(b" " * (8 + _HEADER_BYTES - 8))

    def add(self, block: Tensor) -> None:
        """Append prepared rows [rows, dim]."""
        self._handle.write(block.cpu().contiguous().numpy().tobytes())
        self.count += len(block)

    def close(self) -> None:
        """Write the header now that the count is known."""
        size = self.count * self.dim * 4
        entry = {"dtype": "F32", "shape": [self.count, self.dim], "data_offsets": [0, size]}
        header = json.dumps({"vectors": entry}).encode().ljust(_HEADER_BYTES - 8)
        self._handle.seek(0)
        self._handle.write(len(header).to_bytes(8, "little") + header)
        self._handle.flush()


@dataclass(frozen=True)
class Stored:
    """An index folder opened for reading."""

    folder: Path
    manifest: IndexManifest
    frugal: bool = False
    "Whether `forget` acts."

    def path(self, stem: str) -> Path:
        """The file whose name starts with `stem`; DataError when the index has none."""
        for file in self.manifest.files:
            if file.path.startswith(f"{stem}-"):
                return inside(self.folder, file.path)
        raise CorruptFileError(f"{self.folder}: the manifest names no {stem} file. Build the index again.")

    def arrays(self, stem: str) -> dict[str, Tensor]:
        """The tensors of one safetensors file, memory-mapped."""
        path = self.path(stem)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptFileError(
                f"{path}: cannot be read ({error}). Build the index again or copy it anew."
            ) from None

    @cached_property
    def vectors(self) -> Tensor:
        """float32 [count, dim], memory-mapped."""
        mapped, shape, start = self._mapped
        return torch.frombuffer(mapped, dtype=torch.float32, count=shape[0] * shape[1], offset=start).view(*shape)

    @cached_property
    def _mapped(self) -> tuple[mmap.mmap, list[int], int]:
        """The vector file mapped (private, so that torch gets a writable buffer; nothing writes), shape, first byte."""
        path = self.path("vectors")
        try:
            with path.open("rb") as handle:
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            length = int.from_bytes(mapped[:8], "little")
            entry = json.loads(mapped[8 : 8 + length])["vectors"]
            shape, (first, last) = [int(size) for size in entry["shape"]], entry["data_offsets"]
            if entry["dtype"] != "F32" or len(shape) != 2 or first != 0 or last != shape[0] * shape[1] * 4:
                raise ValueError(f"unexpected entry {entry}")
            if 8 + length + last != len(mapped):
                raise ValueError(f"{len(mapped)} bytes, expected {8 + length + last}")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CorruptFileError(f"{path}: cannot be read ({error}). Build the index again.") from None
        return mapped, shape, 8 + length

    def forget(self, rows: int) -> None:
        """While an index is built: give mapped pages back after every gigabyte read, so that memory stays bounded."""
        self._read[0] += rows * (self.manifest.dim or 0) * 4
        if self.frugal and self._read[0] > _FORGET_BYTES:
            self._mapped[0].madvise(mmap.MADV_DONTNEED)
            self._read[0] = 0

    @cached_property
    def _read(self) -> list[int]:
        return [0]

    def check_shape(self) -> None:
        """CorruptFileError when the vector file holds another shape than the manifest says (maps it, reads nothing)."""
        rows = self.manifest.parameters.get("vectors", self.manifest.count)  # many vectors per document, or one
        found, expected = list(self.vectors.shape), [rows, self.manifest.dim]
        if found != expected:
            raise CorruptFileError(f"{self.path('vectors')}: found shape {found}, expected {expected}.")

    @cached_property
    def _id_arrays(self) -> dict[str, Tensor]:
        return self.arrays("ids")

    @cached_property
    def ids(self) -> Ids:
        """The document ids, each decoded when it is asked for."""
        arrays = self._id_arrays
        ids = StoredIds(arrays["bytes"].numpy(), arrays["offsets"].numpy())
        if len(ids) != self.manifest.count:
            raise CorruptFileError(f"{self.path('ids')}: found {len(ids)} ids, expected {self.manifest.count}.")
        return ids

    @cached_property
    def ties(self) -> NDArray[np.int64]:
        """Tie rank of each row."""
        ties: NDArray[np.int64] = self._id_arrays["ties"].numpy()
        return ties


def draft(folder: str | Path) -> Draft:
    """Start writing an index in `folder` (created with its parents; an old index there stays until the commit)."""
    path = folder_of(folder)
    path.mkdir(parents=True, exist_ok=True)
    strangers = sorted(p.name for p in path.iterdir() if not _ours(p.name))
    if strangers and not (path / MANIFEST).exists():
        raise DataError(
            f"{path}: holds other files ({', '.join(strangers[:3])}), expected an empty folder or an index. "
            "Choose another --out."
        )
    return Draft(path)


def open_stored(folder: str | Path, expect_encoder: str | None = None) -> Stored:
    """Read the manifest and check the sizes of the files (cheap; `verify` reads every byte).

    Raises:
        DataError: no index there, another format version, or the vectors come from another encoder.
        CorruptFileError: a file is missing or has another size.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path}: no {MANIFEST} there; expected a folder written by `structkd index build`.")
    manifest = _read_manifest(path)
    for file in manifest.files:
        found = inside(path, file.path)
        if not found.is_file():
            raise CorruptFileError(f"{found}: the file is missing; {MANIFEST} names it. Copy the index again.")
        if found.stat().st_size != file.bytes:
            raise CorruptFileError(
                f"{found}: found {found.stat().st_size} bytes, expected {file.bytes}. Copy the index again."
            )
    stored = Stored(path, manifest)
    if manifest.dim is not None:
        stored.check_shape()
    if expect_encoder is not None and manifest.encoder != expect_encoder:
        raise DataError(
            f"{path}: the vectors come from encoder {manifest.encoder}, expected {expect_encoder}. "
            "Encode queries and documents with one encoder."
        )
    return stored


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    files: int
    "Files that the manifest names, and the manifest."

    problems: tuple[tuple[str, str], ...]
    "(path, problem) of each file that is missing, cut or differs from its checksum."

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems


def verify(folder: str | Path) -> Report:
    """Read every byte of an index and compare it with the manifest.

    Raises:
        DataError: no index there, or its manifest cannot be read.
    """
    path = Path(folder)
    problems = []
    manifest = _read_manifest(path)
    for file in manifest.files:
        found = inside(path, file.path)
        if not found.is_file():
            problems.append((file.path, "missing"))
        elif found.stat().st_size != file.bytes:
            problems.append((file.path, f"found {found.stat().st_size} bytes, expected {file.bytes}"))
        elif sha256_file(found) != file.sha256:
            problems.append((file.path, "bytes differ from the checksum in the manifest"))
    return Report(len(manifest.files) + 1, tuple(problems))


def write_graph(path: str | Path, graph: csr_array) -> None:
    """Write a sparse matrix as .npz, atomically; scipy.sparse.load_npz reads it."""
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        save_npz(handle, graph)


def _read_manifest(folder: Path) -> IndexManifest:
    path = folder / MANIFEST
    body = read_json(path)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(f"{path}: found format {_name(body)!r}, expected {FORMAT!r}. Is this another tool's index?")
    if body.get("version") != VERSION:
        raise DataError(
            f"{path}: found format version {body.get('version')!r}, expected {VERSION}. "
            "Build the index again with this version of structkd."
        )
    known = {item.name for item in fields(IndexManifest)}
    try:
        values = {name: value for name, value in body.items() if name in known}
        values["files"] = tuple(StoredFile(**file) for file in body["files"])
        return IndexManifest(**values)
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: the manifest is incomplete ({error}). Build the index again.") from None


def _name(body: object) -> object:
    return body.get("format") if isinstance(body, dict) else type(body).__name__


def _ours(name: str) -> bool:
    """Whether a file name is one that builds write (manifest, tagged files, temporary files)."""
    stem = name.split(".")[0]
    tag = stem.rpartition("-")[2]
    return name == MANIFEST or name.startswith(".tmp-") or (len(tag) == 12 and set(tag) <= set("0123456789abcdef"))


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Remove files of earlier builds, complete or killed."""
    for path in folder.iterdir():
        if path.name not in keep and path.is_file() and _ours(path.name):
            path.unlink(missing_ok=True)
    sync_folder(folder)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
