"""Files of node logits from any framework: npz, safetensors, parquet."""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.files import atomic_path
from structkd.ids import fingerprint_fields
from structkd.scores.formats.base import NodeTable
from structkd.scores.formats.tables import open_parquet

FINGERPRINT = "graph_fingerprint"
LOGIT_NAMES = ("logits", "out", "arr_0")


def read_node_file(path: str | Path) -> NodeTable:
    """Logits [nodes, classes] of a file; its graph fingerprint is empty when the file names none.

    npz: an array `logits`. safetensors: a tensor `logits`, the fingerprint in the metadata. parquet: a list column
    `logits`, or one numeric column per class; a column `node`, when there is one, must count 0, 1, 2, ...; the
    fingerprint in the schema's metadata.

    Raises:
        UsageError: another kind of file.
        DataError, CorruptFileError: no logits in it, rows of unequal length, nodes out of order, numbers that are not
            finite, a file that was cut.
    """
    path = Path(path)
    readers = {".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UsageError(f"{path}: expected a score cache folder, or a file ending in {', '.join(readers)}.")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    logits, fingerprint = readers[path.suffix](path)
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise DataError(f"{path}: logits of shape {logits.shape}, {logits.dtype}; expected floats [nodes, classes].")
    bad = int((~np.isfinite(logits)).sum())
    if bad:
        raise DataError(f"{path}: {bad} logits are not finite numbers. Was the teacher's training healthy?")
    notes = () if fingerprint else (f"{path}: names no graph; only its numbers of nodes and classes are checked.",)
    return NodeTable(np.ascontiguousarray(logits, dtype=np.float32), fingerprint, notes)


def _npz(path: Path) -> tuple[NDArray[np.floating], str]:
    table = read_node_npz(path)
    return table.logits, "" if table.notes else table.graph_fingerprint


def _safetensors(path: Path) -> tuple[NDArray[np.floating], str]:
    try:
        with safe_open(path, framework="np") as archive:
            names = list(archive.keys())
            name = next((name for name in LOGIT_NAMES if name in names), None)
            if name is None:
                raise DataError(f"{path}: tensors {names}; expected one of {LOGIT_NAMES}.")
            return archive.get_tensor(name), (archive.metadata() or {}).get(FINGERPRINT, "")
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path}: not a whole safetensors file ({error}). Was it cut?") from None


def _parquet(path: Path) -> tuple[NDArray[np.floating], str]:
    table = open_parquet(path)
    fingerprint = (table.schema.metadata or {}).get(FINGERPRINT.encode(), b"").decode()
    if "node" in table.column_names:
        order = table.column("node").to_numpy()
        if not np.array_equal(order, np.arange(len(order))):
            raise DataError(f"{path}: column node must count 0, 1, 2, ... in the graph's order; sort the file by it.")
        table = table.drop_columns(["node"])
    name = next((name for name in LOGIT_NAMES if name in table.column_names), None)
    if name is None:
        numeric = [field.name for field in table.schema if pa.types.is_floating(field.type)]
        if len(numeric) != table.num_columns:
            raise DataError(f"{path}: columns {table.column_names}; expected `logits`, or one float column per class.")
        return np.stack([table.column(column).to_numpy() for column in numeric], axis=1), fingerprint
    rows = table.column(name).to_pylist()
    widths = {len(row) for row in rows if row is not None}
    if len(widths) != 1 or None in rows:
        raise DataError(f"{path}: rows of {sorted(widths)} logits; expected one length for every node.")
    return np.asarray(rows, dtype=np.float32), fingerprint


# node-npz


def read_node_npz(path: Path) -> NodeTable:
    """A NumPy archive with `logits` [nodes, classes] (also named out or arr_0), optionally `graph_fingerprint`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
            name = next((name for name in LOGIT_NAMES if name in archive.files), None)
            if name is None:
                raise DataError(f"{path}: arrays {archive.files}; expected one of {LOGIT_NAMES}.")
            logits = archive[name]
            known = str(archive["graph_fingerprint"]) if "graph_fingerprint" in archive.files else None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable npz archive ({error}).") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: its arrays are Python objects, which are not read ({error}).") from None
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise DataError(f"{path}: {name} has shape {logits.shape} and dtype {logits.dtype}; expected floats in 2 axes.")
    notes = () if known else (f"{path}: names no graph_fingerprint; the rows are bound to this file's name alone.",)
    return NodeTable(logits.astype(np.float32), known or fingerprint_fields(["graph of", path.name]), notes)


def write_node_npz(path: Path, nodes: NodeTable) -> None:
    """`logits` and `graph_fingerprint`."""
    with atomic_path(path) as draft, open(draft, "wb") as handle:
        np.savez_compressed(handle, logits=nodes.logits, graph_fingerprint=np.asarray(nodes.graph_fingerprint))
