"""Models that read the two sides of a pair apart and then join them: each distinct text is read once."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from structkd.ids import Pairs, Texts
from structkd.ranking.models.maxsim import IntArray, Ragged

Read = Callable[[list[str]], Ragged]
Join = Callable[[Ragged, Ragged, IntArray, IntArray], Tensor]


def joined(pairs: Pairs, left: Read, right: Read, join: Join) -> Float[Tensor, " pairs"]:
    """Scores of the pairs, with gradient.

    Args:
        pairs: queries and documents.
        left: reads queries.
        right: reads documents.
        join: (queries, documents, which query, which document) -> a score a pair.
    """
    queries, query_of = _distinct(pairs.queries, pairs.query_rows)
    documents, document_of = _distinct(pairs.documents, pairs.document_rows)
    return join(left(queries), right(documents), query_of, document_of)


def joined_in_blocks(pairs: Pairs, at_once: int, left: Read, right: Read, join: Join) -> Float[Tensor, " pairs"]:
    """The same on the CPU in float32, with what `at_once` documents were read to in memory."""
    queries, query_of = _distinct(pairs.queries, pairs.query_rows)
    documents, document_of = _distinct(pairs.documents, pairs.document_rows)
    order = np.argsort(document_of, kind="stable")
    read, ordered, out = left(queries), document_of[order], torch.empty(len(pairs))
    for first in range(0, len(documents), at_once):
        held = documents[first : first + at_once]
        low, high = np.searchsorted(ordered, [first, first + len(held)])
        places = order[low:high]
        scores = join(read, right(held), query_of[places], document_of[places] - first)
        out[torch.from_numpy(places)] = scores.float().cpu()
    return out


def _distinct(texts: Texts, rows: IntArray) -> tuple[list[str], IntArray]:
    """The texts of distinct rows, and which of them each row is."""
    distinct, which = np.unique(rows, return_inverse=True)
    return [texts.texts[row] for row in distinct], which
