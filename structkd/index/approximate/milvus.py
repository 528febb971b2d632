"""MilvusIndex: vectors in Milvus, embedded (Milvus Lite, in the index folder) or on a server if one node is too small.

Milvus proposes candidates and sends their vectors along; scores are then computed from those vectors as every kind does
(`exact_scores`), and more candidates are asked for while a tie at the last place might hide a better id. So ids, scores
and order are those of FlatIndex when the Milvus index is FLAT; other Milvus indexes have their recall measured.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from torch import Tensor

from structkd.errors import DataError, UsageError
from structkd.index.flat import FlatIndex
from structkd.index.folder.draft import Draft
from structkd.index.folder.manifest import IndexManifest
from structkd.index.folder.storage import Stored
from structkd.index.opened import OpenedVectors
from structkd.index.recall import RecallTest, recall_test
from structkd.index.topk import NO_ROW, TopK, ranked
from structkd.index.vectors import exact_scores, picker, rounding_margin
from structkd.progress import note, track

TOKEN = "STRUCTKD_MILVUS_TOKEN"  # name of the environment variable; never stored
MILVUS_INDEXES = {  # Milvus's name: what it is built with, and which value makes its search more thorough, from, to
    "FLAT": ({}, None, 0, 0),
    "IVF_FLAT": ({"nlist": 1024}, "nprobe", 8, 1024),
    "IVF_SQ8": ({"nlist": 1024}, "nprobe", 8, 1024),
    "HNSW": ({"M": 32, "efConstruction": 200}, "ef", 32, 1024),
    "DISKANN": ({}, "search_list", 32, 1024),
    "AUTOINDEX": ({}, None, 0, 0),
}
_LARGEST_LIST = 16_384  # more than that Milvus does not return
_SPARE = 8  # candidates beyond k, so that a tie at the last place is usually seen at once
_QUERIES = 128
_INSERT_BYTES = 8 << 20
_CONSISTENT = "Strong"


class MilvusIndex(OpenedVectors):
    """Vectors in a Milvus collection; ids, tie ranks and manifest in the folder."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        parameters = stored.manifest.parameters
        self._collection = str(parameters["collection"])
        self._thorough: dict[str, int] = dict(parameters["search"])
        self._client = _connect(_uri(stored.folder, parameters))
        finalize(self, self._client.close)
        with _errors(stored.folder, parameters):
            there = self._client.has_collection(self._collection)
            found = int(self._client.get_collection_stats(self._collection)["row_count"]) if there else 0
            if there and found == len(self):
                self._client.load_collection(self._collection)
        if found != len(self):
            raise DataError(
                f"{_uri(stored.folder, parameters)}: collection {self._collection} holds {found} vectors, expected "
                f"{len(self)} as in {stored.folder}. Was it dropped, or is this another server? Build the index again."
            )

    def _search(self, queries: Float[Tensor, "queries dim"], k: int) -> TopK:
        starts = range(0, max(len(queries), 1), _QUERIES)
        parts = [self._search_block(queries[at : at + _QUERIES], k) for at in starts]
        rows, scores, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
        return TopK(rows, scores, valid, self.ids)

    def _search_block(self, queries: Tensor, k: int) -> tuple[NDArray, NDArray, NDArray]:
        if not len(queries):
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32), np.empty((0, k), np.bool_)
        most = min(len(self), _LARGEST_LIST)
        if min(k, len(self)) > most:
            raise UsageError(f"k is {k}; Milvus gives at most {_LARGEST_LIST:,} documents per query. Ask for fewer.")
        fetch = min(most, k + _SPARE)
        while True:
            candidates, scores = self._candidates(queries, fetch)
            if fetch == most or self._settled(queries, scores, k):
                return ranked(candidates, scores, self.ties, k)
            fetch = min(most, fetch * 2)

    def _candidates(
        self, queries: Float[Tensor, "queries dim"], fetch: int
    ) -> tuple[Int[Tensor, "queries list"], Float[Tensor, "queries list"]]:
        """Rows that Milvus proposes (-1 where it has fewer) and their exact scores."""
        parameters = {name: max(value, fetch) if name != "nprobe" else value for name, value in self._thorough.items()}
        with _errors(self._stored.folder, self.manifest.parameters):
            hits = self._client.search(
                self._collection,
                data=list(queries.numpy()),
                limit=fetch,
                search_params={"params": parameters},
                output_fields=["row", "vector"],  # a server before 2.4 does not say which field its ids are
                consistency_level=_CONSISTENT,
            )
        rows = torch.full((len(queries), fetch), NO_ROW)
        places = torch.full((len(queries), fetch), NO_ROW)
        vectors: list[Any] = []
        for query, found in enumerate(hits):
            rows[query, : len(found)] = torch.tensor([hit["row"] for hit in found], dtype=torch.int64)
            places[query, : len(found)] = torch.arange(len(vectors), len(vectors) + len(found))
            vectors += [hit["entity"]["vector"] for hit in found]
        received = torch.tensor(np.asarray(vectors, dtype=np.float32).reshape(-1, self.dim))
        return rows, exact_scores(queries, picker(received), places, self.metric)

    def _settled(self, queries: Tensor, scores: Tensor, k: int) -> bool:
        """Whether in every list the last candidate lies so far below the k-th that none beyond it can tie with it."""
        ordered = scores.sort(dim=1, descending=True).values
        factor = 2 if self.metric == "l2" else 1  # the margin is that of half the squared distance
        margin = factor * rounding_margin(queries, self.metric, float(self.manifest.parameters["largest_norm"]))
        return bool((ordered[:, -1:] < ordered[:, k - 1 : k] - margin).all())

    def block(self, start: int, stop: int) -> Float[Tensor, "rows dim"]:
        """The stored vectors of rows start to stop (normalised under cosine), fetched from Milvus."""
        out = torch.empty(stop - start, self.dim)
        for first in range(start, stop, 4096):
            last = min(stop, first + 4096)
            with _errors(self._stored.folder, self.manifest.parameters):
                found = self._client.query(
                    self._collection, filter=f"row >= {first} and row < {last}", output_fields=["row", "vector"]
                )
            rows = torch.tensor([item["row"] for item in found], dtype=torch.int64)
            out[rows - start] = torch.tensor(np.asarray([item["vector"] for item in found], dtype=np.float32))
        return out

    def search_with(self, thorough: dict[str, int], test: RecallTest) -> tuple[float, float]:
        """Recall and its standard error when Milvus searches with these values."""
        self._thorough = thorough
        return test.of(self._search(test.queries, test.places))


def write(
    target: Draft,
    manifest: IndexManifest,
    address: str | None,
    milvus_index: str,
    recall: float,
    queries: Tensor | None = None,
) -> IndexManifest:
    """Move the stored vectors into a new collection, choose how thoroughly to search; the manifest with both.

    Args:
        target: its vectors and ids are written; the vectors leave the folder at the end.
        manifest: kind, metric, dimension, count.
        address: of a server, such as http://host:19530; None: Milvus Lite in the folder.
        milvus_index: a key of MILVUS_INDEXES.
        recall: recall@10 to reach where the Milvus index is approximate.
        queries: prepared queries to measure recall with; None: a sample of the indexed vectors.

    Raises:
        DataError: no server answers, or it refuses.
        UsageError: an unknown Milvus index.
    """
    if milvus_index not in MILVUS_INDEXES:
        raise UsageError(f"Milvus index {milvus_index!r} is unknown; expected one of {', '.join(MILVUS_INDEXES)}.")
    built_with, _, _, _ = MILVUS_INDEXES[milvus_index]
    place = {"address": address} if address else {"folder": target.engine_folder("milvus").name}
    parameters = {**manifest.parameters, **place, "collection": f"structkd_{target.tag}"}
    parameters |= {"milvus_index": milvus_index, "built_with": built_with, "search": {}}
    complete = replace(manifest, parameters=parameters)
    stored = target.stored(complete)
    client = _connect(_uri(target.folder, parameters))
    try:
        with _errors(target.folder, parameters):
            _fill(client, stored, built_with)
        if milvus_index != "FLAT":
            complete = _tuned(stored, recall, queries)
    finally:
        client.close()
        if address is None:
            _settle(_uri(target.folder, parameters))
    target.drop("vectors")
    return complete


def forget(folder: Path, manifest: IndexManifest) -> None:
    """Drop the collection of an index that was replaced, on a server (an embedded one goes with the folder's files)."""
    if manifest.kind != "milvus" or "address" not in manifest.parameters:
        return
    try:
        client = _connect(_uri(folder, manifest.parameters))
        client.drop_collection(manifest.parameters["collection"])
        client.close()
    except (DataError, MilvusException) as error:
        note(f"index: the replaced collection {manifest.parameters['collection']} could not be dropped ({error})")


def _fill(client: MilvusClient, stored: Stored, built_with: dict[str, int]) -> None:
    """Make the collection and insert every vector under its row."""
    manifest = stored.manifest
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=manifest.dim)
    engine = MilvusClient.prepare_index_params()
    engine.add_index(
        "vector",
        index_type=manifest.parameters["milvus_index"],
        metric_type="L2" if manifest.metric == "l2" else "IP",  # under cosine the vectors have length one
        params=built_with,
    )
    name = manifest.parameters["collection"]
    client.create_collection(name, schema=schema, index_params=engine, consistency_level=_CONSISTENT)
    vectors = stored.vectors.numpy()
    step = max(1, _INSERT_BYTES // (4 * vectors.shape[1]))
    for start in track(range(0, len(vectors), step), "adding vectors", late=True):
        block = vectors[start : start + step]
        client.insert(name, [{"row": row, "vector": vector} for row, vector in enumerate(block, start)])
        stored.forget(len(block))
    client.flush(name)


def _tuned(stored: Stored, target: float, queries: Tensor | None) -> IndexManifest:
    """The least thorough search that reaches the recall, or the most thorough one."""
    manifest = stored.manifest
    _, name, start, end = MILVUS_INDEXES[manifest.parameters["milvus_index"]]
    index = MilvusIndex(stored)
    test = recall_test(FlatIndex(stored, "cpu"), int(manifest.parameters["seed"]), queries)
    trial: dict[str, int] = {} if name is None else {name: start}
    while True:
        value, error = index.search_with(trial, test) if test.k else (1.0, 0.0)
        if value - error >= target or name is None or trial[name] >= end:
            found = test.says(value, target)
            return replace(manifest, recall=found, parameters=manifest.parameters | {"search": trial})
        trial = {name: trial[name] * 2}


def _uri(folder: Path, parameters: dict[str, Any]) -> str:
    """The server's address, or the file of Milvus Lite in the folder."""
    if "address" in parameters:
        return str(parameters["address"])
    place = folder / str(parameters["folder"])
    place.mkdir(exist_ok=True)
    return str(place / "milvus.db")


def _settle(database: str) -> None:
    """Stop Milvus Lite's server of this file, which waits for what it still writes in the background after a flush.

    Closing the client leaves the server running: an index file that was half-written when the manifest took its size
    was complete, and so "corrupt", a moment later. The next client starts the server again.
    """
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(database)


def _connect(uri: str) -> MilvusClient:
    """A client; the token of a server comes from the environment.

    Raises:
        DataError: nobody answers.
    """
    try:
        return MilvusClient(uri, token=os.environ.get(TOKEN, ""))
    except MilvusException as error:
        raise DataError(
            f"{uri}: no Milvus answers ({error.message}). Is it running, and is the address like http://host:19530?"
        ) from None


@contextmanager
def _errors(folder: Path, parameters: dict[str, Any]) -> Iterator[None]:
    """What Milvus refuses, in one line with its place."""
    try:
        yield
    except MilvusException as error:
        raise DataError(
            f"{_uri(folder, parameters)}: Milvus refuses ({error.message}). See the server's log, or build again."
        ) from None
