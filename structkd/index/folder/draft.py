"""An index being written: files under a new tag, the manifest last, so that a build that is killed changes nothing.

The old index's manifest and files are untouched until the new manifest takes the name in one rename; only then are the
old files removed.
"""

import errno
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from structkd.errors import DataError, UsageError
from structkd.files import atomic_path, sha256_file, sync_file, sync_folder
from structkd.ids import Ids, fingerprint_fields
from structkd.index.folder.manifest import ENGINES, MANIFEST, IndexManifest, StoredFile, write_manifest
from structkd.index.folder.names import check_ids, id_arrays, row_number_arrays
from structkd.index.folder.storage import Stored
from structkd.runs import versions

_HEADER_BYTES = (
    256  # header of the vector file, padded with spaces: data starts on a cache line, length known at the end
)


class Draft:
    """An index being written: new files under one tag, then the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = uuid.uuid4().hex[:12]
        self._names: list[str] = []
        self._engine_folders: list[str] = []
        self._committed = False

    @contextmanager
    def file(self, stem: str, suffix: str) -> Iterator[Path]:
        """A path to write one file to; it is renamed into place, complete, at the end of the block."""
        name = f"{stem}-{self.tag}{suffix}"
        with naming(self.folder / name), atomic_path(self.folder / name) as temporary:
            yield temporary
        self._names.append(name)

    @contextmanager
    def directory(self, stem: str) -> Iterator[Path]:
        """A folder to write what an engine keeps in many files; complete in its place at the end of the block."""
        place = self.folder / f"{stem}-{self.tag}"
        temporary = self.folder / f".tmp-{place.name}"
        temporary.mkdir()
        try:
            yield temporary
            written = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in written:
                sync_file(path)
            temporary.rename(place)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._names += [f"{place.name}/{path.relative_to(temporary)}" for path in written]

    def engine_folder(self, stem: str) -> Path:
        """A folder for an engine that names its files itself; they belong to the index as they are at the commit."""
        self._engine_folders.append(f"{stem}-{self.tag}")
        return self.folder / self._engine_folders[-1]

    def drop(self, stem: str) -> None:
        """Remove a file that was only needed while building."""
        for name in [name for name in self._names if name.startswith(f"{stem}-")]:
            (self.folder / name).unlink()
            self._names.remove(name)

    def stored(self, manifest: IndexManifest) -> "Stored":
        """What is already written, to read while the rest is built."""
        return Stored(
            self.folder, replace(manifest, files=tuple(StoredFile(name, 0, "") for name in self._names)), True
        )

    def arrays(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as one safetensors file."""
        with self.file(stem, ".safetensors") as path, naming(path, SafetensorError):
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
        paths = {name: self.folder / name for name in self._names}
        for folder in self._engine_folders:
            written = sorted(path for path in (self.folder / folder).rglob("*") if path.is_file())
            paths |= {str(path.relative_to(self.folder)): path for path in written if path.stat().st_size}  # no locks
        files = tuple(StoredFile(name, path.stat().st_size, sha256_file(path)) for name, path in paths.items())
        complete = replace(manifest, files=files, built=versions(ENGINES))
        write_manifest(self.folder, complete)
        self._committed = True
        kept = {name.split("/")[0] for name in paths}
        _remove_others(self.folder, keep={MANIFEST} | kept)
        return complete

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        if self._committed:
            return
        for path in self.folder.glob(f"*-{self.tag}*"):
            _remove(path)


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


@contextmanager
def naming(path: Path, *refusals: type[Exception]) -> Iterator[None]:
    """What stops a file from being written (a full disk, say) as an OSError that names the file.

    Args:
        path: the file.
        refusals: what the library that writes raises in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except refusals as error:
        raise OSError(errno.EIO, f"cannot be written ({' '.join(str(error).split())[-200:]})", str(path)) from None


def draft(folder: str | Path) -> Draft:
    """Start writing an index in `folder` (created with its parents; an old index there stays until the commit)."""
    path = _folder_of(folder)
    path.mkdir(parents=True, exist_ok=True)
    strangers = sorted(p.name for p in path.iterdir() if not _ours(p.name))
    if strangers and not (path / MANIFEST).exists():
        raise DataError(
            f"{path}: holds other files ({', '.join(strangers[:3])}), expected an empty folder or an index. "
            "Choose another --out."
        )
    return Draft(path)


def _folder_of(path: str | Path) -> Path:
    """A folder to write into; UsageError when the name belongs to a file."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder for the index.")
    return folder


def _ours(name: str) -> bool:
    """Whether a file name is one that builds write (manifest, tagged files, temporary files)."""
    stem = name.split(".")[0]
    tag = stem.rpartition("-")[2]
    return name == MANIFEST or name.startswith(".tmp-") or (len(tag) == 12 and set(tag) <= set("0123456789abcdef"))


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Remove files of earlier builds, complete or killed."""
    for path in folder.iterdir():
        if path.name in keep or not _ours(path.name):
            continue
        _remove(path)
    sync_folder(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
