"""Late interaction: the sum over query vectors of the best inner product with a document vector, with gradient."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]

_BLOCK = 32_768  # document vectors per product: with 32 query vectors 4 MB


@dataclass(frozen=True)
class Ragged:
    """Texts of many vectors each, without padding; text i holds rows starts[i] : starts[i] + lengths[i].

    Attributes:
        vectors: [vectors, dimension] of all texts.
        starts: first row of each text.
        lengths: rows of each text; 0 for a text without a vector.
    """

    vectors: Float[Tensor, "vectors dimension"]
    starts: IntArray
    lengths: IntArray

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, texts: IntArray) -> IntArray:
        """Rows of these texts, one after another."""
        lengths = self.lengths[texts]
        ends = np.cumsum(lengths)
        return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(self.starts[texts] - ends + lengths, lengths)


def maxsim(queries: Ragged, documents: Ragged, query_of: IntArray, document_of: IntArray) -> Float[Tensor, " pairs"]:
    """s(q, d) = sum_i max_j q_i . d_j of each pair, in the vectors' precision (Khattab and Zaharia 2020, equation 3).

    One product per query with the vectors of its documents, block by block. Only the winner of each query vector is
    kept for the gradient, never a table of similarities. Padding does not exist, so it cannot win, however small the
    real similarities are. A query or document without a vector scores 0.
    """
    with torch.autocast(queries.vectors.device.type, enabled=False):
        scores: Tensor = _MaxSim.apply(  # type: ignore[no-untyped-call]
            queries.vectors, documents.vectors, queries, documents, query_of, document_of
        )
    return scores


class _MaxSim(torch.autograd.Function):
    """The sum of winners and its gradient: each query vector pulls at its winner alone."""

    @staticmethod
    def forward(
        ctx: Any,
        query_vectors: Tensor,
        document_vectors: Tensor,
        queries: Ragged,
        documents: Ragged,
        query_of: IntArray,
        document_of: IntArray,
    ) -> Tensor:
        scores = query_vectors.new_zeros(len(query_of))
        blocks: list[tuple[Tensor, Tensor, Tensor]] = []  # (pairs, rows of their query, winners [pairs, query rows])
        for pairs in _blocks(documents, query_of, document_of):
            query = int(query_of[pairs[0]])
            first, count = int(queries.starts[query]), int(queries.lengths[query])
            held = pairs[documents.lengths[document_of[pairs]] > 0]
            if not count or not len(held):
                continue
            own = query_vectors[first : first + count]
            largest, winners = _winners(own, document_vectors, documents, document_of[held])
            place = torch.from_numpy(held).to(scores.device)
            scores[place] = largest.sum(-1)
            blocks.append((place, torch.arange(first, first + count, device=scores.device), winners))
        ctx.blocks = blocks
        ctx.save_for_backward(query_vectors, document_vectors)
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query_vectors, document_vectors = ctx.saved_tensors
        of_queries, of_documents = torch.zeros_like(query_vectors), torch.zeros_like(document_vectors)
        for pairs, rows, winners in ctx.blocks:
            weights = gradient[pairs][:, None, None]
            of_queries[rows] += (document_vectors[winners] * weights).sum(0)
            pulls = query_vectors[rows] * weights
            of_documents.index_add_(0, winners.reshape(-1), pulls.reshape(-1, pulls.shape[-1]))
        return of_queries, of_documents, None, None, None, None


def _winners(own: Tensor, vectors: Tensor, documents: Ragged, wanted: IntArray) -> tuple[Tensor, Tensor]:
    """[documents, query vectors]: largest inner product, and the row of the document vector that gives it."""
    lengths = torch.from_numpy(documents.lengths[wanted]).to(vectors.device)
    products = vectors[torch.from_numpy(documents.rows(wanted)).to(vectors.device)] @ own.T
    open_places = torch.arange(int(lengths.max()), device=vectors.device) < lengths[:, None]
    table = products.new_full((*open_places.shape, len(own)), -torch.inf)
    table[open_places] = products
    largest, place = table.max(dim=1)
    return largest, place + torch.from_numpy(documents.starts[wanted]).to(vectors.device)[:, None]


def _blocks(documents: Ragged, query_of: IntArray, document_of: IntArray) -> list[IntArray]:
    """Positions of pairs: one query each, documents of similar length, a bounded number of padded vectors."""
    lengths = documents.lengths[document_of]
    order = np.lexsort((lengths, query_of))
    blocks, start = [], 0
    for stop in range(1, len(order) + 1):
        ended = stop == len(order) or query_of[order[stop]] != query_of[order[start]]
        if ended or (stop - start + 1) * int(lengths[order[stop]]) > _BLOCK:
            blocks.append(order[start:stop])
            start = stop
    return blocks
