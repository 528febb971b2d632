"""Raw dataset files as published -> arrays. Nothing is ever written beside them, and no pickle runs code.

Every reader returns a `RawGraph`; the layouts are those of torch_geometric's raw folders.
"""

import pickle
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from structkd.errors import CorruptFileError, DataError
from structkd.files import atomic_path
from structkd.graph.data.splits import Split
from structkd.graph.data.task import UNKNOWN

IntArray = NDArray[np.int64]

_MASKS = ("train_masks", "val_masks", "test_masks")


@dataclass(frozen=True)
class RawGraph:
    """Arrays of one dataset before cleaning: x sparse or dense, edges [2, n] in any direction, y with UNKNOWN."""

    x: Any
    edges: IntArray
    y: IntArray
    public: Split | None = None
    masks: tuple[Any, Any, Any] | None = None


class _SparseState:
    """Stands in for a pickled scipy matrix: keeps its arrays, runs nothing."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _no_code(*_: Any) -> Any:
    """copyreg's rebuild of an old-style object: an empty stand-in, filled by __setstate__."""
    return _SparseState()


class _Restricted(pickle.Unpickler):
    """Knows numpy arrays, scipy's row matrices and built-in containers; refuses every other name."""

    _array = np.empty(0).__reduce__()[0]
    _known = {
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "defaultdict"): defaultdict,
        ("scipy.sparse.csr", "csr_matrix"): _SparseState,
        ("scipy.sparse._csr", "csr_matrix"): _SparseState,
        ("copy_reg", "_reconstructor"): _no_code,
        ("copyreg", "_reconstructor"): _no_code,
    } | {
        (module, name): kind
        for module in ("builtins", "__builtin__")
        for name, kind in {"list": list, "dict": dict, "tuple": tuple, "int": int, "object": object}.items()
    }

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = open(path, "rb")  # noqa: SIM115 (closed by read)
        super().__init__(self._handle, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise DataError(
                f"{self._path}: the pickle asks for {module}.{name}; expected only numpy arrays, scipy row matrices "
                "and lists. It may be hostile: fetch the file again from its publisher."
            )
        return self._known[module, name]

    def read(self) -> Any:
        try:
            with self._handle:
                return self.load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise CorruptFileError(f"{self._path}: not a whole pickle ({error}). Fetch the file again.") from None


def planetoid(folder: Path, name: str) -> RawGraph:
    """Cora, CiteSeer or PubMed with the public split; rows of x divided by their sums.

    Test rows are put in place by `test.index`; indices that the file skips (15 in CiteSeer) are nodes without
    features and without a label, and stay UNKNOWN.
    """
    parts: dict[str, Any] = {key: _planetoid_part(folder, name, key) for key in ("x", "tx", "allx", "y", "ty", "ally")}
    neighbours = _Restricted(_existing(folder / f"ind.{name}.graph")).read()
    index_path = _existing(folder / f"ind.{name}.test.index")
    try:
        test = np.loadtxt(index_path, dtype=np.int64)
    except ValueError as error:
        raise CorruptFileError(f"{index_path}: not a list of node numbers ({error}). Fetch it again.") from None
    nodes = max(int(test.max()) + 1, len(neighbours))
    first = parts["allx"].shape[0]
    if len(test) != parts["tx"].shape[0]:
        raise CorruptFileError(f"{index_path}: {len(test)} test rows, but tx has {parts['tx'].shape[0]}.")
    y = np.full(nodes, UNKNOWN, dtype=np.int64)
    y[:first] = parts["ally"].argmax(1)
    y[test] = parts["ty"].argmax(1)
    place = sp.coo_array(
        (np.ones(first + len(test)), (np.r_[np.arange(first), test], np.arange(first + len(test)))),
        shape=(nodes, first + len(test)),
    )
    x = sp.csr_array(place.tocsr() @ sp.vstack([parts["allx"], parts["tx"]]))
    edges = [(node, other) for node, others in neighbours.items() for other in others]
    train = np.arange(len(parts["y"]))
    public = Split(train, np.arange(len(train), len(train) + 500), np.sort(test))
    return RawGraph(row_normalised(x), np.asarray(edges, dtype=np.int64).T, y, public=public)


def row_normalised(x: Any) -> sp.csr_array:
    """Rows divided by their sums; empty rows stay empty."""
    csr = sp.csr_array(x, dtype=np.float64)
    sums = np.asarray(csr.sum(axis=1)).ravel()
    return sp.csr_array(sp.diags_array(1.0 / np.where(sums == 0, 1.0, sums)) @ csr)


def csr_npz(path: Path) -> RawGraph:
    """An npz with adj_{data,indices,indptr,shape}, attr_* (or a dense `attr_matrix`) and labels; masks are optional."""
    arrays = _npz(path, ("adj_indices", "adj_indptr", "labels"))
    y = _whole(arrays, "labels", path)
    nodes = len(y)
    indptr, columns = _whole(arrays, "adj_indptr", path), _whole(arrays, "adj_indices", path)
    if len(indptr) != nodes + 1 or indptr[-1] != len(columns):
        raise CorruptFileError(
            f"{path}: adj_indptr has {len(indptr)} entries up to {int(indptr[-1])}, but there are {nodes} labels and "
            f"{len(columns)} indices. Was the file cut?"
        )
    falls = np.flatnonzero(np.diff(indptr) < 0)
    if len(falls) or indptr[0] != 0:
        raise CorruptFileError(
            f"{path}: adj_indptr falls after row {int(falls[0]) if len(falls) else 0}; row starts must rise from 0. "
            "Were more than 2^31 edges written with 32-bit numbers?"
        )
    weights = arrays.get("adj_data", np.ones(len(columns)))
    if len(weights) != len(columns):
        raise CorruptFileError(f"{path}: {len(weights)} adj_data for {len(columns)} adj_indices. Was the file cut?")
    edges = np.stack([np.repeat(np.arange(nodes), np.diff(indptr)), columns])[:, np.asarray(weights) != 0]
    masks = _masks(arrays, nodes, path) if any(key in arrays for key in _MASKS) else None
    return RawGraph(_attributes(arrays, nodes, path), edges, y, masks=masks)


def heterophilous_npz(path: Path) -> RawGraph:
    """node_features, node_labels, edges (each once) and ten fixed masks."""
    arrays = _npz(path, ("node_features", "node_labels", "edges", *_MASKS))
    y, edges = _whole(arrays, "node_labels", path), _whole(arrays, "edges", path, dimensions=2)
    return RawGraph(_real(arrays, "node_features", path), edges.T, y, masks=_masks(arrays, len(y), path))


def ogb_csv(folder: Path) -> RawGraph:
    """The gzipped CSV layout of the ogbn node datasets, with their official split."""
    raw = folder / "raw"
    x = np.loadtxt(_existing(raw / "node-feat.csv.gz"), delimiter=",", dtype=np.float32)
    edges = np.loadtxt(_existing(raw / "edge.csv.gz"), delimiter=",", dtype=np.int64)
    y = np.loadtxt(_existing(raw / "node-label.csv.gz"), delimiter=",", dtype=np.float64)
    labels = np.where(np.isnan(y), UNKNOWN, y).astype(np.int64)
    splits = sorted((folder / "split").glob("*/train.csv.gz"))
    if not splits:
        raise DataError(f"{folder}/split: no */train.csv.gz there; expected the official split of the dataset.")
    parts = (splits[0].with_name(f"{part}.csv.gz") for part in ("train", "valid", "test"))
    public = Split(*(np.loadtxt(_existing(part), dtype=np.int64) for part in parts))
    return RawGraph(x, edges.T, labels, public=public)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such file. Name a dataset's own file; copy a raw folder in full.")
    return path


def _planetoid_part(folder: Path, name: str, key: str) -> Any:
    value = _Restricted(_existing(folder / f"ind.{name}.{key}")).read()
    if isinstance(value, _SparseState):
        state = value.__dict__
        shape = state.get("_shape", state.get("shape"))
        return sp.csr_array((state["data"], state["indices"], state["indptr"]), shape=shape)
    return np.asarray(value)


def _npz(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    _existing(path)
    try:
        with open(path, "rb") as handle:
            archive = np.load(handle, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: one bare array (npy); expected an npz with {', '.join(needed)}.")
            missing = [key for key in needed if key not in archive.files]
            if missing:
                raise DataError(f"{path}: no array {missing[0]!r}; found {', '.join(archive.files)}.")
            wanted = [key for key in archive.files if not key.startswith(("node_names", "attr_names", "class_names"))]
            return {key: archive[key] for key in wanted}
    except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        raise CorruptFileError(f"{path}: not a whole npz file ({error}). Was it cut? Fetch it again.") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: an array is a pickled object ({error}); save plain numeric arrays.") from None


def _whole(arrays: Mapping[str, Any], key: str, path: Path, dimensions: int = 1) -> IntArray:
    """An array of whole numbers as int64; DataError names the first entry that is none."""
    given = np.asarray(arrays[key])
    if given.ndim != dimensions:
        raise DataError(f"{path}: {key} has shape {given.shape}; expected {dimensions} dimension(s).")
    if not np.issubdtype(given.dtype, np.integer):
        broken = np.flatnonzero(~(np.isfinite(given) & (given == np.rint(given)))) if given.dtype.kind == "f" else [0]
        if len(broken):
            raise DataError(f"{path}: {key} holds {given.ravel()[broken[0]]!s} at {broken[0]}; expected whole numbers.")
    return given.astype(np.int64)


def _real(arrays: Mapping[str, Any], key: str, path: Path) -> NDArray[np.float32]:
    """An array of real numbers as float32; DataError on text and complex numbers."""
    given = np.asarray(arrays[key])
    if given.dtype.kind not in "biuf":
        raise DataError(f"{path}: {key} is of type {given.dtype}; expected real numbers.")
    return given.astype(np.float32)


def _masks(arrays: Mapping[str, Any], nodes: int, path: Path) -> tuple[Any, Any, Any]:
    """Fixed masks [splits, nodes], one array for each part; a single split may come as [nodes]."""
    missing = [key for key in _MASKS if key not in arrays]
    if missing:
        raise DataError(f"{path}: no array {missing[0]!r}; fixed masks are {', '.join(_MASKS)}, all three.")
    train, valid, test = (np.atleast_2d(np.asarray(arrays[key])) for key in _MASKS)
    for key, mask in zip(_MASKS, (train, valid, test), strict=True):
        if mask.shape != (len(train), nodes):
            raise DataError(
                f"{path}: {key} has shape {mask.shape}; expected ({len(train)}, {nodes}), as many splits as "
                "train_masks has, and all nodes."
            )
    return train, valid, test


def _attributes(arrays: dict[str, Any], nodes: int, path: Path) -> Any:
    if "attr_matrix" in arrays:
        return _real(arrays, "attr_matrix", path)
    missing = [key for key in ("attr_data", "attr_indices", "attr_indptr", "attr_shape") if key not in arrays]
    if missing:
        raise DataError(f"{path}: no array {missing[0]!r}; expected features as attr_data/indices/indptr/shape.")
    parts = (_real(arrays, "attr_data", path), arrays["attr_indices"], arrays["attr_indptr"])
    try:
        rows, columns = (int(size) for size in arrays["attr_shape"])
        x = sp.csr_array(parts, shape=(rows, columns))
        x.check_format()
    except ValueError as error:
        raise CorruptFileError(f"{path}: the attr_* arrays do not fit together ({error}). Was the file cut?") from None
    if x.shape[0] != nodes:
        raise DataError(f"{path}: {x.shape[0]} feature rows but {nodes} labels.")
    return x


def write_csr_npz(path: Path, x: Any, edges: IntArray, y: IntArray, masks: Mapping[str, Any]) -> None:
    """Write what `csr_npz` reads: dense features, the adjacency in rows, labels, and fixed masks [splits, nodes]."""
    adjacency = sp.csr_array((np.ones(edges.shape[1], dtype=np.float32), (edges[0], edges[1])), shape=(len(y),) * 2)
    adjacency.sort_indices()
    parts = {f"adj_{key}": getattr(adjacency, key) for key in ("data", "indices", "indptr", "shape")}
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, attr_matrix=np.asarray(x, dtype=np.float32), labels=y, **parts, **masks)
