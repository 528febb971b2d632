"""Vectors of any size into an index folder, block by block: from arrays, .npy files or an iterator."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from structkd.errors import DataError
from structkd.ids import Ids
from structkd.index.folder.draft import Draft, VectorWriter
from structkd.index.vectors import Metric, Vectors, as_tensor, check_dim, prepare
from structkd.progress import track

_BLOCK = 8192


def blocks(vectors: Vectors | Iterable[Vectors] | str | Path) -> Iterator[Tensor]:
    """The vectors in blocks of bounded size."""
    if isinstance(vectors, (str, Path)):
        vectors = read_npy(vectors)
    if isinstance(vectors, (np.ndarray, Tensor)):
        whole = as_tensor(vectors)
        yield from cut(whole)
        return
    for block in vectors:
        yield from cut(as_tensor(block))


def cut(whole: Tensor) -> Iterator[Tensor]:
    """A tensor in blocks of rows."""
    for start in range(0, len(whole), _BLOCK):
        yield whole[start : start + _BLOCK]


def read_npy(path: str | Path) -> np.ndarray:
    """A .npy file opened memory-mapped; DataError when it is none (pickled objects are refused)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a .npy array ({error}). Write it with numpy.save.") from None
    return array


def write_vectors(target: Draft, stream: Iterator[Tensor], metric: Metric, names: Ids | None) -> tuple[int, int, float]:
    """Check, normalise and store every block; count, dimension and the largest norm."""
    dim, largest = 0, 0.0
    with target.file("vectors", ".safetensors") as path, path.open("wb") as handle:
        writer: VectorWriter | None = None
        for block in track(stream, "blocks of vectors"):
            if writer is None and block.shape[1] == 0:
                break
            if writer is None:
                dim = block.shape[1]
                writer = VectorWriter(handle, dim)
            check_dim(block.shape[1], dim, f"vectors from row {writer.count}")
            base = writer.count
            ready = prepare(block, metric, lambda row, base=base: _name(names, base + row), "document")  # type: ignore[misc]
            if len(ready):
                largest = max(largest, float(ready.double().norm(dim=1).max()))
            writer.add(ready)
        if writer is None or writer.count == 0:
            raise DataError("found no vectors; an index needs at least one with at least one dimension.")
        writer.close()
        return writer.count, dim, largest


def _name(names: Ids | None, row: int) -> str:
    return repr(names[row]) if names is not None and row < len(names) else f"at row {row}"
