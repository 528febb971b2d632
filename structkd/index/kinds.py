"""Kinds of index by name: build, open, and the choice when the kind is "auto"."""

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from weakref import finalize

from torch import Tensor

from structkd.errors import DataError, MissingExtraError, UsageError, did_you_mean
from structkd.ids import Ids, Texts
from structkd.index.base import LexicalIndex, VectorIndex
from structkd.index.choice import FAISS_KINDS, IndexOptions, check_options, check_recall, choose
from structkd.index.flat import FlatIndex
from structkd.index.folder.blocks import blocks, cut, write_vectors
from structkd.index.folder.draft import Draft, draft
from structkd.index.folder.manifest import IndexManifest, earlier
from structkd.index.folder.storage import Stored, open_stored
from structkd.index.multi_vector import late_interaction
from structkd.index.multi_vector.candidates import CODES
from structkd.index.multi_vector.late_interaction import MultiVectorIndex
from structkd.index.vectors import Metric, Vectors, as_tensor, prepare_queries, resolve_device
from structkd.progress import note

DEFAULT_RECALL = 0.95
FAST_FROM = 20_000  # document vectors; below, scoring everything is fast enough
TEXT_KINDS = ("bm25", "lucene")


def build(
    vectors: Vectors | Iterable[Vectors] | str | Path,
    ids: Sequence[str] | Ids | None = None,
    *,
    kind: str = "auto",
    metric: Metric = "cosine",
    out: str | Path | None = None,
    device: str = "auto",
    recall: float | None = None,
    memory: float | None = None,
    encoder: str | None = None,
    seed: int = 0,
    address: str | None = None,
    milvus_index: str = "FLAT",
    queries: Vectors | None = None,
) -> VectorIndex:
    """Build an index of vectors and open it.

    Args:
        vectors: [count, dim] as array, tensor or .npy file (opened memory-mapped), or an iterable of such blocks, so
            that what does not fit in memory can be indexed.
        ids: one distinct document id per vector; row numbers when None.
        kind: a key of INDEXES, or "auto": exact up to two million vectors or when a GPU holds them, ivf-sq8 above;
            with a `recall` below 1, ivf-pq from 50,000 vectors on.
        metric: cosine, ip or l2.
        out: folder; an index that stands there is replaced when the new one is complete. None: a temporary folder that
            goes with the index.
        device: auto, cpu, cuda or cuda:N, for searching and training.
        recall: recall@10 that an approximate kind should reach (None: 0.95); what it reaches is in `manifest.recall`.
        memory: gigabytes for searching, looked at by "auto".
        encoder: fingerprint of the encoder, compared by `open(expect_encoder=...)`.
        seed: of the training sample and of the queries that recall is measured with.
        address: for "milvus", of a server (http://host:19530; a token comes from the environment variable
            STRUCTKD_MILVUS_TOKEN); None: Milvus Lite in the index folder.
        milvus_index: for "milvus", which index Milvus builds: FLAT (exact), IVF_FLAT, IVF_SQ8, HNSW, DISKANN or
            AUTOINDEX.
        queries: [queries, dim] like those that will be asked, to measure recall with; None: a sample of `vectors`,
            which flatters when real queries lie elsewhere.

    Raises:
        DataError: no vectors, wrong shape, a value that is not finite, a zero vector under cosine (named by id), ids
            that repeat or do not fit the count.
        UsageError: an unknown kind or metric.
        MissingExtraError: the kind's engine is not installed.
        DeviceError: the device is not there.
    """
    options = IndexOptions(kind, metric, recall, memory, seed)
    check_options(options)
    target_device = resolve_device(device)
    with _draft(out) as (target, owner):
        began = time.perf_counter()
        names = None if ids is None else ids if isinstance(ids, Ids) else Ids(ids, "document id")
        count, dim, largest = write_vectors(target, blocks(vectors), metric, names)
        corpus = target.ids(names, count)
        chosen, reason = choose(options, count, dim, target_device) if kind == "auto" else (kind, None)
        asked = None if queries is None else _asked([queries], metric, dim)[0]
        manifest = IndexManifest(
            kind=chosen,
            metric=metric,
            count=count,
            dim=dim,
            normalized=metric == "cosine",
            encoder=encoder,
            corpus=corpus,
            reason=reason,
            parameters={"largest_norm": largest, "seed": seed},
        )
        if chosen in FAISS_KINDS:
            ann = _opener(chosen)
            trained = ann.train(target, manifest, recall or DEFAULT_RECALL, target_device, asked)
            manifest = replace(manifest, parameters=manifest.parameters | trained.parameters, recall=trained.recall)
        folder, before = target.folder, earlier(target.folder)
        if chosen == "milvus":
            manifest = _opener(chosen).write(target, manifest, address, milvus_index, recall or DEFAULT_RECALL, asked)
        target.commit(replace(manifest, build_seconds=round(time.perf_counter() - began, 3)))
        if reason:
            note(f"index: {chosen} chosen: {reason}")
        if before is not None and before.kind == "milvus":
            _opener("milvus").forget(folder, before)
        index = open_vectors(folder, device)
        if owner is not None:
            finalize(index, owner.cleanup)
        return index


def build_multi(
    documents: Iterable[Vectors],
    ids: Sequence[str] | Ids | None = None,
    *,
    metric: Metric = "cosine",
    out: str | Path | None = None,
    device: str = "auto",
    encoder: str | None = None,
    recall: float | None = None,
    seed: int = 0,
    queries: Sequence[Vectors] | None = None,
) -> MultiVectorIndex:
    """Build an index of documents of many vectors each (late interaction) and open it; MaxSim search.

    Args:
        documents: one [vectors, dim] array per document, each with at least one vector.
        ids: one distinct document id per document; row numbers when None.
        metric: cosine or ip.
        out: folder; None: a temporary folder that goes with the index.
        device: auto, cpu, cuda or cuda:N.
        encoder: fingerprint of the encoder, compared by `open(expect_encoder=...)`.
        recall: recall@10 that is enough; below 1, and from 20,000 vectors on, codes of the vectors choose what is
            scored. None: every document is scored.
        seed: of the training sample and of the queries that recall is measured with.
        queries: each [vectors, dim], like those that will be asked, to measure recall with; None: made from documents.

    Raises:
        DataError: no documents, one without vectors, values that are not finite, ids that repeat or do not fit.
        UsageError: another metric, or a recall out of range.
        MissingExtraError: a recall below 1 was given and faiss is not installed.
    """
    if metric not in ("cosine", "ip"):
        raise UsageError(f"metric {metric!r} has no MaxSim; expected cosine or ip.")
    check_recall(recall)
    resolve_device(device)
    lengths: list[int] = []

    def stream() -> Iterator[Tensor]:
        for document in documents:
            tensor = as_tensor(document)
            lengths.append(len(tensor))
            yield from cut(tensor)

    with _draft(out) as (target, owner):
        began = time.perf_counter()
        rows, dim, largest = write_vectors(target, stream(), metric, None)
        late_interaction.write(target, lengths)
        corpus = target.ids(ids, len(lengths))
        manifest = IndexManifest(
            kind="multi-vector",
            metric=metric,
            count=len(lengths),
            dim=dim,
            normalized=metric == "cosine",
            encoder=encoder,
            corpus=corpus,
            parameters={"largest_norm": largest, "vectors": rows, "seed": seed},
        )
        if recall is not None and recall < 1 and rows >= FAST_FROM:
            asked = None if queries is None else _asked(queries, metric, dim)
            manifest = _with_codes(target, manifest, recall, asked)
        target.commit(replace(manifest, build_seconds=round(time.perf_counter() - began, 3)))
        index = cast(MultiVectorIndex, open(target.folder, device))
        if owner is not None:
            finalize(index, owner.cleanup)
        return index


def _asked(queries: Sequence[Vectors], metric: Metric, dim: int) -> list[Tensor]:
    """Queries that recall is measured with, checked and prepared; DataError when there are none."""
    prepared = [prepare_queries(query, metric, dim) for query in queries]
    if not sum(map(len, prepared)):
        raise DataError("queries: found none to measure recall with. Give at least one, or leave them out.")
    return prepared


def _with_codes(
    target: Draft, manifest: IndexManifest, recall: float, queries: Sequence[Tensor] | None
) -> IndexManifest:
    """The manifest after all vectors were coded and the fast search was chosen."""
    codebooks = _opener("multi-vector")
    books, codes = codebooks.two_codebooks(target.stored(manifest).vectors, int(manifest.parameters["seed"]))
    target.arrays(CODES, {"codebooks": books, "codes": codes})
    return late_interaction.tune(target, manifest, recall, queries)


def build_text(
    documents: Texts, *, kind: str = "bm25", k1: float = 0.9, b: float = 0.4, out: str | Path | None = None
) -> LexicalIndex:
    """Build an index of texts and open it.

    Args:
        documents: texts under their ids, usually "title text".
        kind: "bm25" (bm25s, no Java) or "lucene" (Lucene through pyserini).
        k1: saturation of the word count.
        b: how much the document's length counts, 0 to 1.
        out: folder; None: a temporary folder that goes with the index.

    Raises:
        DataError: no documents, or k1 or b out of range.
        UsageError: an unknown kind.
        MissingExtraError: "lucene" without its extra, or without Java.
    """
    if kind not in TEXT_KINDS:
        raise UsageError(
            f"kind {kind!r} is no text index; expected one of {', '.join(TEXT_KINDS)}.{did_you_mean(kind, TEXT_KINDS)}"
        )
    if not len(documents):
        raise DataError("found no documents; an index needs at least one.")
    with _draft(out) as (target, owner):
        began = time.perf_counter()
        engine = _opener(kind)
        engine.write(target, documents, k1, b)
        corpus = target.ids(documents.ids, len(documents))
        target.commit(
            IndexManifest(
                kind=kind,
                metric=kind,
                count=len(documents),
                corpus=corpus,
                parameters={"k1": k1, "b": b} | engine.ANALYSIS,
                build_seconds=round(time.perf_counter() - began, 3),
            )
        )
        index = open_text(target.folder)
        if owner is not None:
            finalize(index, owner.cleanup)
        return index


def open(
    folder: str | Path, device: str = "auto", *, expect_encoder: str | None = None
) -> VectorIndex | LexicalIndex | MultiVectorIndex:
    """Open an index folder of either sort; vectors stay on disk, memory-mapped.

    Raises:
        DataError: no index there, written by another format version, or another encoder than `expect_encoder`.
        CorruptFileError: a file is missing or cut.
        MissingExtraError: the kind's engine is not installed.
    """
    stored = open_stored(folder, expect_encoder)
    if stored.manifest.kind not in INDEXES:
        raise DataError(f"{folder}: found kind {stored.manifest.kind!r}, expected one of {', '.join(INDEXES)}.")
    return INDEXES[stored.manifest.kind](stored, device)


def open_vectors(folder: str | Path, device: str = "auto", *, expect_encoder: str | None = None) -> VectorIndex:
    """`open` for an index of vectors; DataError when it holds texts."""
    index = open(folder, device, expect_encoder=expect_encoder)
    if index.kind in (*TEXT_KINDS, "multi-vector"):
        holds = "texts" if index.kind in TEXT_KINDS else "many vectors per document"
        raise DataError(f"{folder}: found a {index.kind} index, which holds {holds}; expected an index of vectors.")
    return cast(VectorIndex, index)


def open_text(folder: str | Path) -> LexicalIndex:
    """`open` for an index of texts; DataError when it holds vectors."""
    index = open(folder)
    if index.kind not in TEXT_KINDS:
        raise DataError(f"{folder}: found a {index.kind} index, which holds vectors; expected an index of texts.")
    return cast(LexicalIndex, index)


def _open_ann(stored: Stored, device: str) -> VectorIndex:
    index: VectorIndex = _opener(stored.manifest.kind).FaissIndex(stored, device)
    return index


def _open_bm25(stored: Stored, device: str) -> LexicalIndex:
    index: LexicalIndex = _opener("bm25").Bm25Index(stored)
    return index


def _open_lucene(stored: Stored, device: str) -> LexicalIndex:
    index: LexicalIndex = _opener("lucene").LuceneIndex(stored)
    return index


def _open_milvus(stored: Stored, device: str) -> VectorIndex:
    index: VectorIndex = _opener("milvus").MilvusIndex(stored)
    return index


INDEXES: Mapping[str, Callable[[Stored, str], VectorIndex | LexicalIndex | MultiVectorIndex]] = {
    "flat": FlatIndex,
    "faiss-flat": _open_ann,
    "ivf-sq8": _open_ann,
    "ivf-pq": _open_ann,
    "hnsw": _open_ann,
    "multi-vector": MultiVectorIndex,
    "bm25": _open_bm25,
    "lucene": _open_lucene,
    "milvus": _open_milvus,
}

_ENGINES = {  # kind: module, package that it imports, extra that brings it
    "bm25": ("text.bm25", "bm25s", "test"),
    "lucene": ("text.lucene", "jnius_config", "lucene"),
    "milvus": ("approximate.milvus", "pymilvus", "milvus"),
    "multi-vector": ("multi_vector.codebooks", "faiss", "cpu"),
} | dict.fromkeys(FAISS_KINDS, ("approximate.faiss_index", "faiss", "cpu"))


def _opener(kind: str) -> Any:
    """The module of an optional engine, imported only when asked for.

    Raises:
        MissingExtraError: with the install line.
    """
    module, package, extra = _ENGINES[kind]
    if importlib.util.find_spec(package) is None:
        shown = {"jnius_config": "pyserini"}.get(package, package)
        raise MissingExtraError(shown, extra, f"the index kind {kind!r}")
    return importlib.import_module(f"structkd.index.{module}")


@contextmanager
def _draft(out: str | Path | None) -> Iterator[tuple[Draft, TemporaryDirectory[str] | None]]:
    """The index being written, in a temporary folder (with its owner) when `out` is None; a build that fails leaves
    nothing behind."""
    if out is None:
        owner = TemporaryDirectory(prefix="structkd-index-", ignore_cleanup_errors=True)
        try:
            yield draft(owner.name), owner
        except BaseException:
            owner.cleanup()
            raise
        return
    target = draft(out)
    try:
        yield target, None
    except BaseException:
        target.discard()
        raise
