"""`structkd index`: build, search, fuse, knn-graph, show, verify."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from cyclopts import App, Parameter

from structkd import index
from structkd.cli.output import Common, Output, Table
from structkd.errors import DataError, UsageError
from structkd.index import fusion
from structkd.index.base import LexicalIndex, VectorIndex
from structkd.index.folder.blocks import read_npy
from structkd.index.folder.manifest import IndexManifest
from structkd.index.folder.storage import open_stored
from structkd.index.kinds import TEXT_KINDS
from structkd.index.neighbours import write_graph, write_labelled_graph
from structkd.index.vectors import check_k
from structkd.progress import note
from structkd.ranking.data.datasets import load
from structkd.trec import Run, read_lines, read_run, write_run

app = App(name="index", help="Vector and text indexes: build, search, fuse runs, neighbour graphs, checks.")

# what several commands take, described once
Folder = Annotated[Path, Parameter(name="INDEX", help="Folder of the index.")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N.")]
Texts = Annotated[
    str | None, Parameter(help="A folder in BEIR layout, or another name that `structkd ranking` takes: texts.")
]


@app.command
def build(
    *,
    out: Path,
    collection: Texts = None,
    vectors: Path | None = None,
    ids: Path | None = None,
    kind: str = "auto",
    metric: str = "cosine",
    recall: float | None = None,
    memory: float | None = None,
    k1: float = 0.9,
    b: float = 0.4,
    encoder: str | None = None,
    address: str | None = None,
    milvus_index: str = "FLAT",
    queries: Path | None = None,
    query_ids: Path | None = None,
    device: Device = "auto",
    common: Common = Common(),
) -> Output:
    """Build an index of the texts of a collection, or of vectors.

    Parameters
    ----------
    out
        Folder of the index; one that stands there is replaced when the new one is complete.
    vectors
        Vectors: a .npy file, [count, dim].
    ids
        One document id per line, in the order of the vectors. When absent: the file with the ending .txt beside the
        vectors, as `structkd ranking encode` writes it, else row numbers. For multi-vector, vectors of one document
        stand together and repeat its id.
    kind
        auto, flat, faiss-flat, ivf-sq8, ivf-pq, hnsw, milvus, multi-vector for vectors; bm25, lucene for texts.
    metric
        cosine (normalises inside), ip or l2.
    recall
        Recall@10 that an approximate kind should reach (default 0.95); what it reaches is measured and stored. With it,
        `auto` may choose an approximate kind, and multi-vector gets the fast engine.
    memory
        Gigabytes that searching may take; only `auto` looks at it.
    k1
        BM25: saturation of the word count.
    b
        BM25: how much the document's length counts.
    encoder
        Fingerprint of the encoder that made the vectors.
    address
        milvus: a server, such as http://host:19530 (its token in STRUCTKD_MILVUS_TOKEN). Without: embedded in INDEX.
    milvus_index
        milvus: FLAT (exact), IVF_FLAT, IVF_SQ8, HNSW, DISKANN or AUTOINDEX.
    queries
        Query vectors like those that will be asked (a .npy file), to measure recall with. Without: indexed vectors,
        which flatter when real queries lie elsewhere.
    query_ids
        For multi-vector: one id per query vector, repeated for the vectors of one query. When absent: the .txt file
        beside the vectors.
    """
    if (collection is None) == (vectors is None):
        raise UsageError("give either --collection (texts) or --vectors (a .npy file).")
    began = time.perf_counter()
    if collection is not None:
        built: VectorIndex | LexicalIndex = _build_text(collection, "bm25" if kind == "auto" else kind, k1, b, out)
    else:
        numbers, names = _vectors(vectors or Path(), ids)
        shared: dict[str, Any] = {"metric": metric, "out": out, "device": device, "encoder": encoder, "recall": recall}
        if kind == "multi-vector":
            asked = None if queries is None else _grouped(*_vectors(queries, query_ids))[0]
            index.build_multi(*_grouped(numbers, names), seed=common.seed, queries=asked, **shared)
            return show(out, common=common)
        asked_for = None if queries is None else read_npy(queries)
        placed: dict[str, Any] = {"address": address, "milvus_index": milvus_index, "memory": memory}
        built = index.build(numbers, names, kind=kind, seed=common.seed, queries=asked_for, **placed, **shared)
    note(f"index: {built.kind}, {len(built):,} documents in {time.perf_counter() - began:.1f} s")
    return show(out, common=common)


@app.command
def search(
    folder: Folder,
    *,
    out: Path,
    collection: Texts = None,
    split: str | None = None,
    queries: Path | None = None,
    query_ids: Path | None = None,
    k: int = 100,
    encoder: str | None = None,
    device: Device = "auto",
    common: Common = Common(),
) -> Output:
    """Search and write a TREC run.

    Parameters
    ----------
    out
        The run file.
    split
        Split of the collection whose queries are searched, as train or test; by default as `structkd ranking` reads it.
    queries
        Query vectors for a vector index: a .npy file, [queries, dim].
    query_ids
        One query id per line, in the order of the query vectors. When absent: the file with the ending .txt beside
        the vectors, else row numbers. For multi-vector, vectors of one query stand together and repeat its id.
    k
        Length of each list.
    encoder
        Fingerprint of the encoder that made the query vectors; another one than the index's is refused.
    """
    if (collection is None) == (queries is None):
        raise UsageError("give either --collection (query texts, text index) or --queries (a .npy file, vector index).")
    began = time.perf_counter()
    if collection:
        run = _search_texts(folder, collection, split, k)
    else:
        run = _search_vectors(index.open(folder, device, expect_encoder=encoder), queries, query_ids, k)
    seconds = time.perf_counter() - began
    write_run(out, run)
    data = {"run": str(out), "queries": len(run.lists), "documents": len(run), "seconds": round(seconds, 3)}
    return Output(data, lines=[f"{out}: {len(run):,} documents for {len(run.lists):,} queries in {seconds:.2f} s"])


@app.command
def fuse(
    runs: Annotated[tuple[Path, ...], Parameter(name="RUN")],
    *,
    out: Path,
    by: Literal["rank", "score"] = "rank",
    weights: Annotated[tuple[float, ...] | None, Parameter(consume_multiple=True)] = None,
    normalise: Literal["min-max", "z-score", "none"] = "min-max",
    constant: float = fusion.RANK_CONSTANT,
    depth: int | None = None,
    k: int | None = None,
    common: Common = Common(),
) -> Output:
    """Hybrid search: make one run of several over the same documents.

    Parameters
    ----------
    runs
        Runs to fuse, for example of a text index and of a vector index.
    out
        The run file.
    by
        rank: reciprocal rank fusion, for scores that have nothing in common; score: the weighted sum of scores.
    weights
        One number per run; all 1 when absent.
    normalise
        score: what happens to each list's scores first.
    constant
        rank: the larger, the less the first ranks stand out.
    depth
        Documents of each list that count; all when absent.
    k
        Length of the fused lists; whatever the runs give when absent.
    """
    if k is not None:
        check_k(k)
    read = [read_run(path) for path in runs]
    if by == "rank":
        fused = fusion.reciprocal_rank(read, constant=constant, weights=weights, depth=depth)
    else:
        fused = fusion.weighted(read, weights, normalise=normalise, depth=depth)
    fused = fused if k is None else fused.cut(k)
    write_run(out, fused)
    data = {"run": str(out), "runs": len(read), "by": by, "queries": len(fused.lists), "documents": len(fused)}
    return Output(data, lines=[f"{out}: {len(fused):,} documents for {len(fused.lists):,} queries of {len(read)} runs"])


@app.command(name="knn-graph")
def knn_graph(
    folder: Folder,
    *,
    out: Path,
    k: int = 10,
    symmetric: str = "none",
    self_loops: Annotated[bool, Parameter(negative=())] = False,
    labels: Path | None = None,
    device: Device = "auto",
    common: Common = Common(),
) -> Output:
    """Write the nearest neighbours of every indexed vector as a scipy sparse matrix (.npz) of scores, or as a dataset.

    Parameters
    ----------
    out
        The .npz file; scipy.sparse.load_npz reads it.
    k
        Neighbours per vector, itself not counted.
    symmetric
        none, mutual (edges whose reverse is there too) or union (every reverse edge added).
    self_loops
        Add each vector's score with itself.
    labels
        One whole number per vector, in row order (a text file or .npy; -1 for unknown): then the file is a graph with
        features and labels, which `structkd graph --dataset npz:FILE` reads.
    """
    began = time.perf_counter()
    opened = index.open_vectors(folder, device)
    graph = opened.knn_graph(k, symmetric=symmetric, self_loops=self_loops)
    if labels is None:
        write_graph(out, graph)
    else:
        write_labelled_graph(out, graph, _features(opened), _labels(labels))
    degrees = np.diff(graph.indptr)
    data = {
        "graph": str(out),
        "nodes": graph.shape[0],
        "edges": graph.nnz,
        "k": k,
        "symmetric": symmetric,
        "degree_min": int(degrees.min()),
        "degree_max": int(degrees.max()),
        "seconds": round(time.perf_counter() - began, 3),
    }
    return Output(data, tables=[Table("Neighbour graph", [data])])


@app.command
def show(folder: Annotated[Path, Parameter(name="INDEX")], *, common: Common = Common()) -> Output:
    """Show what an index holds."""
    manifest = open_stored(folder).manifest
    data = _facts(manifest)
    row = {name: value for name, value in data.items() if not isinstance(value, dict) and value is not None}
    lines = [f"parameters: {', '.join(f'{name} {value}' for name, value in manifest.parameters.items())}"]
    return Output(data, tables=[Table(str(folder), [row])], lines=lines)


@app.command
def verify(folder: Annotated[Path, Parameter(name="INDEX")], *, common: Common = Common()) -> Output:
    """Check every byte of an index against the checksums in its manifest."""
    report = index.verify(folder)
    found = [{"path": path, "problem": problem} for path, problem in report.problems]
    lines = [f"{folder}: {report.files} files, {'all well' if report.ok else f'{len(found)} bad'}"]
    data = {"ok": report.ok, "files": report.files, "problems": found}
    return Output(data, tables=[Table("Problems", found)] if found else (), lines=lines, ok=report.ok)


def _facts(manifest: IndexManifest) -> dict[str, Any]:
    """The keys of `index build` and `index show`."""
    return {
        "kind": manifest.kind,
        "metric": manifest.metric,
        "dim": manifest.dim or 0,
        "count": manifest.count,
        "bytes": manifest.bytes,
        "recall": 1.0 if manifest.recall is None else manifest.recall["value"],  # no measure: every document is scored
        "build_seconds": manifest.build_seconds,
        "reason": manifest.reason,
        "encoder": manifest.encoder,
        "recall_measured": manifest.recall,
        "parameters": manifest.parameters,
    }


def _build_text(collection: str, kind: str, k1: float, b: float, out: Path) -> LexicalIndex:
    if kind not in TEXT_KINDS:
        raise UsageError(
            f"kind {kind!r} indexes vectors; --collection holds texts and takes {' or '.join(TEXT_KINDS)}. "
            "Make vectors with `structkd ranking encode`, then give --vectors."
        )
    return index.build_text(load(collection).documents, kind=kind, k1=k1, b=b, out=out)


def _search_texts(folder: Path, collection: str | None, split: str | None, k: int) -> Run:
    queries = load(collection or "", split).queries
    return index.open_text(folder).search(list(queries.texts), k).run(list(queries.ids))


def _search_vectors(
    opened: VectorIndex | LexicalIndex | index.MultiVectorIndex, queries: Path | None, query_ids: Path | None, k: int
) -> Run:
    vectors, names = _vectors(queries or Path(), query_ids)
    if isinstance(opened, index.MultiVectorIndex):
        items, item_ids = _grouped(vectors, names)
        return opened.search(items, k).run(item_ids)
    if opened.kind in TEXT_KINDS:
        raise UsageError(f"found a {opened.kind} index, which holds texts; give --collection instead of --queries.")
    found = cast(VectorIndex, opened).search(vectors, k)
    return found.run(names or [str(row) for row in range(len(vectors))])


def _vectors(path: Path, ids: Path | None) -> tuple[np.ndarray, list[str] | None]:
    """The vectors of a .npy file and their ids: from `ids`, else from the .txt file beside it, else None."""
    beside = path.with_suffix(".txt")
    if ids is None and beside.is_file():
        ids = beside
        note(f"index: ids from {beside}")
    return read_npy(path), None if ids is None else [line for _, line in read_lines(ids)]


def _features(opened: VectorIndex) -> np.ndarray:
    """Every stored vector, [count, dim]."""
    return opened.block(0, len(opened)).numpy()


def _labels(path: Path) -> np.ndarray:
    """One whole number per vector from a .npy or text file."""
    if path.suffix == ".npy":
        found = np.asarray(read_npy(path))
        if found.dtype.kind not in "iu" or found.ndim != 1:
            raise DataError(
                f"{path}: found {found.dtype} of shape {list(found.shape)}, expected one whole number a vector."
            )
        return found.astype(np.int64)
    values = []
    for number, line in read_lines(path):
        try:
            values.append(int(line))
        except ValueError:
            raise DataError(f"{path}:{number}: found {line!r}, expected a whole number (-1 for unknown).") from None
    return np.asarray(values, dtype=np.int64)


def _grouped(vectors: np.ndarray, names: list[str] | None) -> tuple[list[np.ndarray], list[str]]:
    """Vectors that stand together under one id, and the ids."""
    if names is None or len(names) != len(vectors):
        found = "no ids" if names is None else f"{len(names)} ids"
        raise UsageError(f"{found} for {len(vectors)} vectors; multi-vector needs one id per vector (repeated).")
    starts = [row for row in range(len(names)) if row == 0 or names[row] != names[row - 1]]
    ends = [*starts[1:], len(names)]
    return [vectors[a:b] for a, b in zip(starts, ends, strict=True)], [names[row] for row in starts]
