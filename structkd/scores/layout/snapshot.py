"""Snapshots: numbered manifests and the data files that they name, which readers map into memory.

    <root>/snapshots/00000007.json               manifest; the largest number counts
    <root>/snapshots/00000007-<sha16>.parts      which parts went in (see `part_list`)
    <root>/data/csr-00000-<sha16>.arrow          pairs: one uncompressed record batch {q, doc: list, score: list}, and
                                                 doc_high: list where documents are packed (see `PackedRows`)
    <root>/data/rows-00000-<sha16>.safetensors   rows: `logits` of a block of nodes, data aligned to 64 bytes

The file format stays uncompressed, else its columns would be copied instead of mapped.
"""

import json
import mmap
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from structkd.errors import CorruptFileError
from structkd.files import create_exclusive, inside, sha256_file, sync_folder
from structkd.scores.layout.document_rows import DocumentRows, PackedRows
from structkd.scores.layout.part_list import PartList, names_digest
from structkd.scores.layout.parts import part_names
from structkd.scores.layout.sealed import as_array, as_numpy, temporary
from structkd.scores.manifest import ScoreManifest


def latest(folder: Path) -> ScoreManifest | None:
    """The newest snapshot's manifest, None when there is none."""
    number = latest_number(folder)
    return None if number is None else ScoreManifest.read(manifest_path(folder, number))


def latest_number(folder: Path) -> int | None:
    """The largest snapshot number."""
    return max(snapshot_numbers(folder), default=None)


def snapshot_numbers(folder: Path) -> list[int]:
    """Numbers of all snapshots, ascending."""
    with suppress(FileNotFoundError):
        stems = [name.removesuffix(".json") for name in os.listdir(folder / "snapshots") if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdigit())
    return []


def manifest_path(folder: Path, number: int) -> Path:
    """Where snapshot `number`'s manifest lies."""
    return folder / "snapshots" / f"{number:08d}.json"


def newer_parts(folder: Path, manifest: ScoreManifest | None) -> list[str]:
    """Names of the committed parts that a snapshot does not hold."""
    names = part_names(folder)
    if manifest is None or "path" not in manifest.parts or manifest.parts["names"] == names_digest(names):
        return names if manifest is None else []
    done = PartList.read(folder, manifest.parts).units
    return [name for name in names if name not in done]


# data files


def place(draft: Path, folder: Path, name: str, suffix: str) -> Path:
    """Name a data file after its content; a damaged file that already has the name is replaced."""
    digest = sha256_file(draft)
    target = folder / f"{name}-{digest[:16]}{suffix}"
    if target.exists() and sha256_file(target) != digest:
        os.replace(draft, target)
        sync_folder(folder)
    else:
        create_exclusive(draft, target)
    return target


def file_entry(root: Path, path: Path, **more: int) -> dict[str, Any]:
    """A file's line in a manifest."""
    relative = path.relative_to(root).as_posix()
    return {"path": relative, "bytes": path.stat().st_size, "sha256": sha256_file(path), **more}


def checked_path(root: Path, entry: dict[str, Any], verify: str) -> Path:
    """Path of a manifest's file after the check asked for: "off", "size" or "sha256"."""
    path = inside(root, entry["path"])
    if not path.is_file():
        raise FileNotFoundError(2, "named in the manifest, but absent", str(path))
    if verify != "off" and (size := path.stat().st_size) != entry["bytes"]:
        raise CorruptFileError(f"{path}: {size} bytes, the manifest says {entry['bytes']}. Restore it from a copy.")
    if verify == "sha256" and sha256_file(path) != entry["sha256"]:
        raise CorruptFileError(f"{path}: its bytes differ from the manifest's checksum. Restore it from a copy.")
    return path


# lists of pairs


@dataclass(frozen=True)
class Csr:
    """Lists of scores by query row, documents ascending within a list.

    Attributes:
        query_rows: [lists] ascending.
        offsets: [lists + 1].
        documents: [values], packed in a file where they fit.
        scores: [values] float16 or float32.
    """

    query_rows: NDArray[np.uint32]
    offsets: NDArray[np.int32]
    documents: DocumentRows
    scores: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.documents)


def write_csr(folder: Path, name: str, csr: Csr) -> Path:
    """Write `<name>-<sha16>.arrow`: one uncompressed record batch."""
    rows = PackedRows.of(csr.documents[:])
    lists: dict[str, NDArray[Any]]
    lists = {"doc": rows.low, "doc_high": rows.high} if isinstance(rows, PackedRows) else {"doc": rows}
    lists["score"] = csr.scores
    offsets = as_array(csr.offsets)
    columns = {name: pa.ListArray.from_arrays(offsets, as_array(values)) for name, values in lists.items()}
    batch = pa.record_batch({"q": as_array(csr.query_rows)} | columns)
    path = temporary(folder)
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return place(path, folder, name, ".arrow")
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def map_csr(path: Path) -> Csr:
    """Map a CSR file; its arrays are views of the file, clean pages that all processes share."""
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = file.get_batch(0)
        offsets = as_numpy(batch["doc"].offsets)
        lists = {name: as_numpy(batch[name].values) for name in batch.schema.names if name != "q"}
        documents = PackedRows(lists["doc"], lists["doc_high"]) if "doc_high" in lists else lists["doc"]
        return Csr(as_numpy(batch["q"]), offsets, documents, lists["score"])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a readable Arrow file ({error}). Restore it from a copy.") from None


# rows of nodes


def write_rows(folder: Path, name: str, logits: NDArray[np.floating]) -> Path:
    """Write `<name>-<sha16>.safetensors` with one tensor `logits`; its data starts on a multiple of 64 bytes."""
    names = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    meta = {"logits": {"dtype": names[logits.dtype], "shape": list(logits.shape), "data_offsets": [0, logits.nbytes]}}
    text = json.dumps(meta, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path = temporary(folder)
    try:
        with open(path, "wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.write(np.ascontiguousarray(logits).data)
        return place(path, folder, name, ".safetensors")
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def map_rows(path: Path) -> NDArray[np.floating]:
    """Map the tensor `logits` of a safetensors file: a plain read-only view."""
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            entry = json.loads(handle.read(length))["logits"]
            shape, dtype = tuple(entry["shape"]), np.dtype({"F16": np.float16, "F32": np.float32}[entry["dtype"]])
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > size or end - start != int(np.prod(shape)) * dtype.itemsize:
                raise ValueError(f"{size} bytes do not hold a tensor of shape {shape}")
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise CorruptFileError(f"{path}: not a readable safetensors file ({error}). Restore it.") from None
        if start == end:
            return np.empty(shape, dtype=dtype)
        view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(view, dtype=dtype, count=int(np.prod(shape)), offset=start).reshape(shape)
