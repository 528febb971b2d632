"""index.json: what an index is, how it was built, and path, size and checksum of each of its files, and its own."""

import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from structkd.errors import CorruptFileError, DataError
from structkd.files import inside, read_json, sha256_file, write_text

FORMAT = "structkd-index"
VERSION = 2
MANIFEST = "index.json"
_UNSEALED = "0" * 64  # what stands where the checksum goes while it is computed
ENGINES = ("structkd", "torch", "numpy", "faiss-cpu", "faiss-gpu-cu12", "bm25s", "pyserini", "pymilvus")
"Packages that write indexes; the manifest keeps the versions of those that are installed."


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


def write_manifest(folder: Path, manifest: IndexManifest) -> None:
    """Write index.json atomically: from then on the folder holds this index."""
    body = {item.name: getattr(manifest, item.name) for item in fields(manifest)}
    body["files"] = [vars(file) for file in manifest.files]
    body = {"format": FORMAT, "version": VERSION, "sha256": _UNSEALED} | body
    write_text(folder / MANIFEST, seal(json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))


def read_manifest(folder: Path) -> IndexManifest:
    """Read index.json.

    Raises:
        DataError: no index there, another tool's, or another format version.
        CorruptFileError: cut, or a byte differs from what was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST} there; expected a folder written by `structkd index build`.")
    body = read_json(path)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise DataError(f"{path}: found format {_name(body)!r}, expected {FORMAT!r}. Is this another tool's index?")
    if body.get("version") != VERSION:
        raise DataError(
            f"{path}: found format version {body.get('version')!r}, expected {VERSION}. "
            "Build the index again with this version of structkd."
        )
    if not _whole(path):
        raise CorruptFileError(f"{path}: differs from its own checksum. Copy the index again, or build it again.")
    known = {item.name for item in fields(IndexManifest)}
    try:
        values = {name: value for name, value in body.items() if name in known}
        values["files"] = tuple(StoredFile(**file) for file in body["files"])
        return IndexManifest(**values)
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: the manifest is incomplete ({error}). Build the index again.") from None


def earlier(folder: Path) -> IndexManifest | None:
    """The manifest of the index that stands in a folder; None when there is none that can be read."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return read_manifest(folder)
    except DataError:
        return None


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
        DataError: no index there, or one of another tool or format version.
    """
    path = Path(folder)
    problems = []
    try:
        manifest = read_manifest(path)
    except DataError as error:
        if not (path / MANIFEST).is_file() or (not isinstance(error, CorruptFileError) and _whole(path / MANIFEST)):
            raise
        return Report(1, ((MANIFEST, str(error)),))
    for file in manifest.files:
        found = inside(path, file.path)
        if not found.is_file():
            problems.append((file.path, "missing"))
        elif found.stat().st_size != file.bytes:
            problems.append((file.path, f"found {found.stat().st_size} bytes, expected {file.bytes}"))
        elif sha256_file(found) != file.sha256:
            problems.append((file.path, "bytes differ from the checksum in the manifest"))
    return Report(len(manifest.files) + 1, tuple(problems))


def seal(text: str) -> str:
    """The text of a manifest with its checksum in the place that was kept for it."""
    return text.replace(_UNSEALED, hashlib.sha256(text.encode()).hexdigest(), 1)


def _whole(path: Path) -> bool:
    """Whether a manifest is, byte by byte, what was sealed."""
    text = path.read_text(encoding="utf-8")
    sealed = re.search(r'"sha256": "([0-9a-f]{64})"', text)
    return sealed is not None and seal(text.replace(sealed[1], _UNSEALED, 1)) == text


def _name(body: object) -> object:
    return body.get("format") if isinstance(body, dict) else type(body).__name__
