"""FaissIndex: approximate search with faiss (inverted lists with 8-bit or 4-bit codes, HNSW), its recall measured.

faiss proposes candidates; their scores are then computed exactly from the stored vectors (`exact_scores`), so scores
and order of what was found are those of FlatIndex, whatever the codes. faiss says -1 where it found nothing: such
places are invalid and never mapped to an id.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.index.approximate.faiss_gpu import LARGEST_K, GpuCopy, copy_for
from structkd.index.approximate.tuning import Tuned, tune
from structkd.index.flat import FlatIndex
from structkd.index.folder.draft import Draft, naming
from structkd.index.folder.manifest import IndexManifest
from structkd.index.folder.storage import Stored
from structkd.index.opened import OpenedVectors
from structkd.index.recall import recall_test
from structkd.index.topk import TopK, ranked
from structkd.index.vectors import drawn_rows, exact_scores
from structkd.progress import track
from structkd.runs import versions

_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cu13")
_FACTOR = {"faiss-flat": 1, "ivf-sq8": 1, "ivf-pq": 4, "hnsw": 1}  # candidates scored exactly, per document asked for
_LINKS, _CONSTRUCTION = 32, 100  # HNSW: neighbours per node, list length while building
_BLAS_FROM_QUERIES = 4  # below, faiss's own loop is faster than a matrix product
_BLAS_THRESHOLD = 800  # queries x dimensions per thread from which the product pays (faiss waits until 128000)
_BLOCK_BYTES = 1 << 25  # of vectors that are added at a time
_QUERIES = 1024


class FaissIndex(OpenedVectors):
    """Approximate nearest neighbours: ivf-sq8, ivf-pq, hnsw; "faiss-flat" is exact."""

    def __init__(self, stored: Stored, device: str | torch.device = "auto") -> None:
        check_one_faiss()
        super().__init__(stored)
        self._engine = _read(stored)
        self._on_gpu: GpuCopy | None = None
        self.apply(stored.manifest.parameters)
        self._on_gpu = copy_for(self.kind, self._engine, device)

    @property
    def vectors(self) -> Tensor:
        """float32 [count, dim], memory-mapped."""
        return self._stored.vectors

    def _search(self, queries: Tensor, k: int) -> TopK:
        starts = range(0, max(len(queries), 1), _QUERIES)
        parts = [self._search_block(queries[at : at + _QUERIES], k) for at in track(starts, "searching", late=True)]
        rows, scores, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
        return TopK(rows, scores, valid, self.ids)

    def _search_block(self, queries: Tensor, k: int) -> tuple[NDArray, NDArray, NDArray]:
        fetch = min(len(self), k * self._factor)
        rows, scores = self.candidates(queries, fetch)
        return ranked(rows, scores, self.ties, k)

    def candidates(self, queries: Tensor, fetch: int) -> tuple[Tensor, Tensor]:
        """Rows [queries, fetch] that faiss proposes, best first by its codes (-1 where it has none); exact scores."""
        rows = torch.from_numpy(self._proposals(queries.numpy(), fetch))
        return rows, exact_scores(queries, self._stored.pick, rows, self.metric)

    def _proposals(self, queries: NDArray[np.float32], fetch: int) -> NDArray[np.int64]:
        if not len(queries):
            return np.empty((0, fetch), dtype=np.int64)
        engine: Any = self._engine if self._on_gpu is None or fetch > LARGEST_K else self._on_gpu
        with blas_from_small_batches(len(queries)):
            return np.asarray(engine.search(queries, fetch)[1], dtype=np.int64)

    def search_prepared(self, queries: Tensor, k: int) -> TopK:
        """`search` for vectors as they are stored: float32, finite, normalised under cosine."""
        return self._search(queries, k)

    def apply(self, parameters: dict[str, Any]) -> None:
        """Set how much of the index a search looks at."""
        self._factor = int(parameters.get("factor", 1))
        if "nprobe" in parameters:
            faiss.extract_index_ivf(self._engine).nprobe = int(parameters["nprobe"])
            if self._on_gpu is not None:
                self._on_gpu.set_nprobe(int(parameters["nprobe"]))
        if "ef_search" in parameters:
            self._engine.hnsw.efSearch = int(parameters["ef_search"])


def train(
    target: Draft, manifest: IndexManifest, recall: float, device: torch.device, queries: Tensor | None = None
) -> Tuned:
    """Build the engine over stored vectors, write it, and choose the cheapest search that reaches the recall.

    Args:
        target: where to write; its vectors and ids are already there.
        manifest: kind, metric, dimension, count.
        recall: recall@10 to reach, measured against exact search.
        device: for the exact search.
        queries: prepared queries to measure recall with; None: a sample of the indexed vectors.

    Raises:
        DataError: too few vectors for the kind.
    """
    start = manifest.parameters | make(target, manifest) | {"factor": _FACTOR[manifest.kind]}
    stored = target.stored(replace(manifest, parameters=start))
    test = recall_test(FlatIndex(stored, device), int(manifest.parameters["seed"]), queries)
    return tune(FaissIndex(stored, "cpu"), test, start, recall, _lists(manifest.count))


def make(target: Draft, manifest: IndexManifest) -> dict[str, Any]:
    """Build the engine over stored vectors and write it; what it was built with."""
    check_one_faiss()
    engine, parameters = _build(target.stored(manifest), manifest)
    with target.file("faiss", ".faiss") as path, naming(path, RuntimeError):
        faiss.write_index(engine, str(path))
    return parameters


def check_one_faiss() -> None:
    """UsageError when two distributions that install the module `faiss` are there: they overwrite each other."""
    found = versions(_DISTRIBUTIONS)
    if len(found) > 1:
        named = " and ".join(f"{name} {version}" for name, version in found.items())
        raise UsageError(
            f"found {named}, which install the same module and overwrite each other; expected one. "
            f"Run: pip uninstall {' '.join(found)}, then install one of them."
        )


class _Setting:
    """The process-wide faiss setting and who is using it."""

    lock = threading.Lock()
    users = 0
    before = 0


@contextmanager
def blas_from_small_batches(queries: int) -> Iterator[None]:
    """Let faiss use matrix products for batches that it would loop over (7x at 256 queries).

    faiss keeps the threshold in one global variable: the first caller sets it, the last one restores it, also after an
    error; searches of several threads run side by side. Below four queries nothing is touched.
    """
    if queries < _BLAS_FROM_QUERIES:
        yield
        return
    with _Setting.lock:
        if _Setting.users == 0:
            _Setting.before = faiss.cvar.distance_compute_blas_threshold
            faiss.cvar.distance_compute_blas_threshold = _BLAS_THRESHOLD * faiss.omp_get_max_threads()
        _Setting.users += 1
    try:
        yield
    finally:
        with _Setting.lock:
            _Setting.users -= 1
            if _Setting.users == 0:
                faiss.cvar.distance_compute_blas_threshold = _Setting.before


def _read(stored: Stored) -> Any:
    path = stored.path("faiss")
    flags = faiss.IO_FLAG_MMAP_IFC if stored.manifest.kind == "faiss-flat" else 0
    try:
        engine = faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise CorruptFileError(f"{path}: faiss cannot read it ({str(error)[:200]}). Build the index again.") from None
    if engine.ntotal != stored.manifest.count:
        raise CorruptFileError(f"{path}: found {engine.ntotal} vectors, expected {stored.manifest.count}.")
    return engine


def _build(stored: Stored, manifest: IndexManifest) -> tuple[Any, dict[str, Any]]:
    """The filled engine and what it was built with."""
    metric = faiss.METRIC_L2 if manifest.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    vectors = stored.vectors
    count, dim, kind = len(vectors), vectors.shape[1], manifest.kind
    engine: Any
    if kind == "hnsw":
        engine = faiss.IndexHNSWFlat(dim, _LINKS, metric)
        engine.hnsw.efConstruction = _CONSTRUCTION
        parameters: dict[str, Any] = {
            "factory": f"HNSW{_LINKS},Flat",
            "ef_construction": _CONSTRUCTION,
            "ef_search": 16,
        }
    elif kind == "faiss-flat":
        engine = faiss.IndexFlat(dim, metric)
        parameters = {"factory": "Flat"}
    else:
        lists = _lists(count)
        factory = f"IVF{lists},SQ8" if kind == "ivf-sq8" else _product_codes(dim, lists)
        engine = faiss.index_factory(dim, factory, metric)
        parameters = {"factory": factory, "nprobe": 1}
        _train_lists(engine, stored, lists, manifest)
    step = max(1, _BLOCK_BYTES // (4 * dim))
    for start in track(range(0, count, step), "adding vectors"):
        block = vectors[start : start + step].numpy()
        with blas_from_small_batches(len(block)):
            engine.add(block)
        stored.forget(len(block))
    return engine, parameters


def _train_lists(engine: Any, stored: Stored, lists: int, manifest: IndexManifest) -> None:
    """Train the coarse centroids and the codes on a seeded sample, read in storage order."""
    count, seed = len(stored.vectors), int(manifest.parameters.get("seed", 0))
    smallest = 16 if manifest.kind == "ivf-pq" else 1
    if count < smallest:
        raise DataError(f"{manifest.kind} needs at least {smallest} vectors, found {count}. Use the kind 'flat'.")
    chosen = drawn_rows(count, max(64 * lists, 20_000), seed)
    ivf: Any = faiss.downcast_index(faiss.extract_index_ivf(engine))
    for clustering in (ivf.cp, *([ivf.pq.cp] if manifest.kind == "ivf-pq" else [])):
        clustering.seed = seed + 1
        clustering.min_points_per_centroid = 1  # small collections are allowed; faiss would print a warning
    with blas_from_small_batches(len(chosen)):
        engine.train(stored.pick(torch.from_numpy(chosen)).numpy())


def _lists(count: int) -> int:
    """Inverted lists: the power of two near 2 sqrt(count), with at least 39 vectors a list to learn from."""
    wanted = max(1, min(2 * count**0.5, count / 39))
    return int(2 ** np.floor(np.log2(wanted)))


def _product_codes(dim: int, lists: int) -> str:
    """Factory of 4-bit codes: one per eight dimensions, at least 16 (or one per dimension), padded to whole groups."""
    groups = max(min(16, dim), -(-dim // 8))
    padded = -(-dim // groups) * groups
    return f"{'' if padded == dim else f'Pad{padded},'}IVF{lists},PQ{groups}x4fs"
