"""Files of node logits from any framework: npz, safetensors, parquet."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.scores.formats_base import NodeTable
from structkd.scores.formats_lists import LOGIT_NAMES, read_node_npz
from structkd.scores.formats_runs import open_parquet

FINGERPRINT = "graph_fingerprint"


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
