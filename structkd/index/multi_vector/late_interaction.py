"""MultiVectorIndex: late interaction (MaxSim) over documents of many vectors each.

Exact by blocked matrix products over everything; or, for larger collections, fast: codes of the document vectors say
which documents are scored exactly. Scores and order of what is found are the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError
from structkd.index.folder.draft import Draft
from structkd.index.folder.manifest import IndexManifest
from structkd.index.folder.storage import Stored
from structkd.index.multi_vector.candidates import CODES, OFFSETS, Coded, document_ranges, mean_errors
from structkd.index.opened import OpenedIndex
from structkd.index.recall import asked, asking_rows, no_rows
from structkd.index.topk import TopK, excluded_rows, ranked, search_without
from structkd.index.vectors import Metric, Vectors, check_k, prepare_queries, resolve_device
from structkd.progress import note, track

_TOKENS = {"cpu": 16384, "cuda": 1 << 20}  # document vectors per product
_QUERIES = 32
_UNIT = 2.0**-24
_SAMPLE, _CALIBRATING = 150, 3  # queries drawn at build; every third calibrates the estimates, the others measure
_FEWEST_TO_CALIBRATE = 10
_QUERY_VECTORS, _QUERY_NOISE = 8, 1.0  # of a query made from a document: vectors, length of what is added to each
_PADDED, _PADDED_NOISE = 24, 0.5  # of every second one: near copies of one more vector, which expanded queries end in
_LADDER = tuple(32 << step for step in range(8))  # documents scored exactly, per query
_WORTH = 2  # scoring more than one in so many documents is no faster than scoring all


class MultiVectorIndex(OpenedIndex):
    """MaxSim: score(q, d) = sum over query vectors of the largest inner product with a vector of d.

    Khattab and Zaharia 2020 (ColBERT), eq. 3. Under cosine every vector is normalised inside.

    Attributes:
        metric: cosine or ip.
        dim: dimensions of each vector.
    """

    def __init__(self, stored: Stored, device: str | torch.device = "auto") -> None:
        super().__init__(stored)
        self.metric: Metric = stored.manifest.metric
        self.dim: int = stored.manifest.dim or 0
        self.device = resolve_device(device)
        self._scored: int | None = stored.manifest.parameters.get("scored")

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """First vector of each document, and the number of vectors."""
        starts: NDArray[np.int64] = self._stored.arrays("documents")["starts"].numpy()
        return starts

    def search(
        self, queries: Sequence[Vectors], k: int = 10, *, exclude: Sequence[Sequence[str]] | None = None
    ) -> TopK:
        """The k documents with the largest MaxSim.

        Args:
            queries: one [vectors, dim] array per query; a query without vectors scores 0 everywhere.
            k: list length; places beyond the number of documents are invalid.
            exclude: per query, ids of documents that must not come; their places are filled with the next best.

        Raises:
            DataError: another dimension than the index, a value that is not finite, a zero vector under cosine.
            UsageError: k below 1.
        """
        check_k(k)
        prepared = [prepare_queries(query, self.metric, self.dim) for query in queries]
        if exclude is None:
            return self._search(prepared, k)
        banned = excluded_rows(exclude, self.ids, len(prepared))
        return search_without(lambda fetch: self._search(prepared, fetch), banned, k, len(self))

    def document(self, row: int) -> Tensor:
        """The stored vectors of one document (normalised under cosine)."""
        return self._stored.vectors[self._starts[row] : self._starts[row + 1]]

    def _search(self, queries: list[Tensor], k: int) -> TopK:
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        everything = torch.arange(len(self))
        for start in track(range(0, len(queries), _QUERIES), "searching", late=True):
            group = queries[start : start + _QUERIES]
            if self._scored is None:
                found = [(everything, products) for products in self._products(group)]
            else:
                count = max(self._scored, 2 * k)
                chosen = [self._coded.best(query, count, self.device) if len(query) else everything for query in group]
                found = [(some, self._some(query, some)) for query, some in zip(group, chosen, strict=True)]
            for place, (query, (some, products)) in enumerate(zip(group, found, strict=True), start=start):
                rows[place], scores[place] = self._best(query, some, products, k)
        return TopK(rows, scores, rows >= 0, self.ids)

    @cached_property
    def _coded(self) -> Coded:
        """What says which documents are worth scoring."""
        files = self._stored.arrays(CODES) | self._stored.arrays(OFFSETS)
        return Coded(starts=torch.from_numpy(self._starts), **files)

    def _some(self, query: Tensor, documents: Tensor) -> Tensor:
        """Float32 MaxSim of chosen documents for one query."""
        if not len(documents) or not len(query):
            return torch.zeros(len(documents))
        first = torch.from_numpy(self._starts)[documents]
        lengths = torch.from_numpy(self._starts)[documents + 1] - first
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        vectors = torch.index_select(self._stored.vectors, 0, first.repeat_interleave(lengths) + within)
        products = torch.mm(vectors.to(self.device), query.to(self.device).T)
        return torch.segment_reduce(products, "max", lengths=lengths.to(self.device)).sum(dim=1).cpu()

    def _products(self, group: list[Tensor]) -> Tensor:
        """Float32 MaxSim of every document for a group of queries, [queries, documents] on the host."""
        stacked = torch.cat([query.to(self.device) for query in group])
        owner = torch.repeat_interleave(torch.tensor([len(query) for query in group])).to(self.device)
        out = torch.zeros(len(group), len(self))
        for first, last in document_ranges(self._starts, _TOKENS[self.device.type]):
            block = self._stored.vectors[self._starts[first] : self._starts[last]].to(self.device)
            lengths = torch.from_numpy(np.diff(self._starts[first : last + 1])).to(self.device)
            largest = torch.segment_reduce(torch.mm(block, stacked.T), "max", lengths=lengths)
            sums = torch.zeros(len(group), last - first, device=self.device).index_add_(
                0, owner, largest.T.contiguous()
            )
            out[:, first:last] = sums.cpu()
        return out

    def _best(
        self, query: Tensor, documents: Tensor, found: Tensor, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best of some documents by exact scores, among all that float32 rounding could have misplaced."""
        if not len(documents):
            return np.full(k, -1, dtype=np.int64), np.full(k, -np.inf, dtype=np.float32)
        norms = float(query.double().norm(dim=1).sum())
        margin = 2 * (self.dim + len(query) + 2) * _UNIT * norms * float(self.manifest.parameters["largest_norm"])
        least = torch.topk(found, min(k, len(found))).values[-1] - margin
        candidates = documents[found >= least]
        exact = torch.tensor([self._exact(query, int(row)) for row in candidates], dtype=torch.float32)
        rows, scores, _ = ranked(candidates[None], exact[None], self.ties, k)
        return rows[0], scores[0]

    def _exact(self, query: Tensor, row: int) -> float:
        """MaxSim of one pair in float64."""
        document = self.document(row).double()
        products = (query.double().unsqueeze(1) * document.unsqueeze(0)).sum(dim=-1)
        return float(products.amax(dim=1).sum())


def write(target: Draft, lengths: Sequence[int]) -> None:
    """Write where each document's vectors start.

    Raises:
        DataError: a document has no vector.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    empty = np.flatnonzero(sizes < 1)
    if len(empty):
        raise DataError(f"document at row {empty[0]}: it has no vectors ({len(empty)} such). Remove it or give it one.")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    target.arrays("documents", {"starts": torch.from_numpy(starts)})


def tune(target: Draft, manifest: IndexManifest, aim: float, given: Sequence[Tensor] | None = None) -> IndexManifest:
    """Calibrate the codes and choose how many documents are scored: the fewest that reach the recall, or the most.

    150 of the given queries are drawn, or made from documents (`_like_query`), these themselves not counted. Every
    third calibrates (`mean_errors`; none of fewer than ten), recall@10 against exact MaxSim is measured with the
    others; a document that ties with the tenth counts. Where half of all documents would be scored the codes are left
    out: scoring all is as fast.

    Args:
        target: holds vectors, documents and codes; the offsets are written to it.
        manifest: of what it holds.
        aim: recall@10 that is enough.
        given: prepared queries, each [vectors, dim].

    Returns:
        The manifest with the choice and its recall.
    """
    stored, seed = target.stored(manifest), int(manifest.parameters["seed"])
    exact = MultiVectorIndex(stored, "cpu")
    rows, drawn = _stand_ins(exact, seed) if given is None else _draw_of(given, seed)
    calibrates = np.arange(len(drawn)) % _CALIBRATING == 0
    if calibrates.sum() < _FEWEST_TO_CALIBRATE:
        calibrates[:] = False
    coded = Coded(starts=torch.from_numpy(exact._starts), offsets=torch.zeros(len(exact)), **stored.arrays(CODES))
    some = [query for query, chosen in zip(drawn, calibrates, strict=True) if chosen and len(query)]
    target.arrays(OFFSETS, {"offsets": mean_errors(coded, some, exact._products)})
    others = [query for query, chosen in zip(drawn, calibrates, strict=True) if not chosen]
    source = "made from documents" if given is None else "given"
    if given is None:
        note("index: recall is measured with stand-ins made from documents; real queries (--queries) say what it is")
    test = asked(exact._search, others, rows[~calibrates], source, len(exact))
    fast = MultiVectorIndex(target.stored(manifest), "cpu")
    for scored in _LADDER:
        fast._scored = scored
        value, error = test.of(fast._search(test.queries, test.places))
        if value - error >= aim:
            break
    if _WORTH * scored > len(exact):
        note(f"index: recall {aim} takes {scored} of {len(exact)} documents a query; all are scored, which is as fast")
        target.drop(CODES)
        target.drop(OFFSETS)
        return manifest
    return replace(manifest, recall=test.says(value, aim), parameters=manifest.parameters | {"scored": scored})


def _draw_of(given: Sequence[Tensor], seed: int) -> tuple[NDArray[np.int64], list[Tensor]]:
    """Some of the given queries; they were made from no document."""
    places = asking_rows(len(given), _SAMPLE, seed)
    return no_rows(places), [given[place] for place in places]


def _stand_ins(exact: MultiVectorIndex, seed: int) -> tuple[NDArray[np.int64], list[Tensor]]:
    """Queries made from drawn documents, and their rows; every second one, in no order, is filled up."""
    rows, generator = asking_rows(len(exact), _SAMPLE, seed), np.random.default_rng(seed)
    padding = _PADDED * (generator.permutation(len(rows)) % 2)
    made = [
        _like_query(exact.document(int(row)), exact.metric, generator, int(more))
        for row, more in zip(rows, padding, strict=True)
    ]
    return rows, made


def _like_query(document: Tensor, metric: Metric, generator: np.random.Generator, padding: int = 0) -> Tensor:
    """A stand-in for a query: eight vectors of a document, each moved by its length in a random direction, and
    `padding` near copies of the first.

    A document itself as query flatters: it has more vectors than a query, and they lie closer to others'. So do eight
    vectors alone: short queries are filled up to 32 by vectors that are much alike, where one error of a code counts
    many times (figures stand in benchmarks/README.md).
    """
    rows = np.sort(generator.permutation(len(document))[:_QUERY_VECTORS])
    moved = _moved(document[torch.from_numpy(rows)], _QUERY_NOISE, generator)
    made: Tensor = torch.cat([moved, _moved(moved[:1].expand(padding, -1), _PADDED_NOISE, generator)])
    if metric == "cosine":
        made = torch.nn.functional.normalize(made, dim=1)
    return made


def _moved(vectors: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Each vector moved by a share of its length in a random direction."""
    noise = torch.from_numpy(generator.standard_normal(vectors.shape)).float()
    moved: Tensor = vectors + share * vectors.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(noise, dim=1)
    return moved
