"""An index folder opened for reading: arrays in safetensors files, memory-mapped.

<index>/index.json              manifest: kind, metric, dim, count, recall, versions; path, bytes, sha256 of each file
<index>/vectors-<tag>.safetensors   "vectors" float32 [count, dim] (normalised under cosine)
<index>/ids-<tag>.safetensors       "bytes" uint8, "offsets" int64 [count + 1], "ties" int64 [count]
<index>/<engine>-<tag>.*            what the kind itself needs
"""

import json
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from structkd.errors import CorruptFileError, DataError
from structkd.files import inside
from structkd.index.folder.manifest import MANIFEST, IndexManifest, read_manifest
from structkd.index.folder.names import StoredIds
from structkd.index.vectors import picker

_FORGET_BYTES = 1 << 28


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

    def pick(self, rows: Int[Tensor, " list"]) -> Float[Tensor, "list dim"]:
        """Copies of some vectors.

        While an index is built they are read, not mapped: the system maps up to two megabytes around a page that is
        asked for, so that ten thousand rows here and there would count as twenty gigabytes.
        """
        if not self.frugal:
            return picker(self.vectors)(rows)
        _, (_, dim), first = self._mapped
        out, width = torch.empty(len(rows), dim), dim * 4
        buffer = out.numpy().data.cast("B")
        with self.path("vectors").open("rb", buffering=0) as handle:
            for place, row in enumerate(rows.tolist()):
                os.preadv(handle.fileno(), [buffer[place * width : (place + 1) * width]], first + row * width)
        return out

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
        """While an index is built: give mapped pages back after every 256 megabytes read, to bound memory."""
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
    def ids(self) -> StoredIds:
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


def open_stored(folder: str | Path, expect_encoder: str | None = None) -> Stored:
    """Read the manifest and check the sizes of the files (cheap; `verify` reads every byte).

    Raises:
        DataError: no index there, another format version, or the vectors come from another encoder.
        CorruptFileError: a file is missing or has another size.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    for file in manifest.files:
        found = inside(path, file.path)
        if not found.is_file():
            raise CorruptFileError(f"{found}: the file is missing; {MANIFEST} names it. Copy the index again.")
        if found.stat().st_size != file.bytes:
            raise CorruptFileError(
                f"{found}: found {found.stat().st_size} bytes, expected {file.bytes}. Copy the index again."
            )
    stored = Stored(path, manifest)
    if any(file.path.startswith("vectors-") for file in manifest.files):
        stored.check_shape()
    if expect_encoder is not None and manifest.encoder != expect_encoder:
        raise DataError(
            f"{path}: the vectors come from encoder {manifest.encoder}, expected {expect_encoder}. "
            "Encode queries and documents with one encoder."
        )
    return stored
