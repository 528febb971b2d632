"""Losses on the scores of every query of a batch against every document of it, with a teacher that scores them live."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from structkd.ids import Pairs
from structkd.objectives.listwise import kl
from structkd.ranking.data.collection import Collection, normalise


def in_batch_margin_mse(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "queries documents"],
    own: Int[Tensor, " queries"],
    mask: Bool[Tensor, "queries documents"],
    column: Int[Tensor, " columns"],
) -> Float[Tensor, ""]:
    """Mean over i and the columns j of ((S_i,own - S_ij) - (T_i,own - T_ij))^2, where mask allows j for i.

    One of the two in-batch terms of TAS-Balanced (Hofstatter et al. 2021, arXiv 2104.06967, section 3.3): `column`
    names the other queries' positives, or their negatives. 0 with zero gradient when nothing is allowed.
    """
    error = student - teacher
    margins = (error.gather(1, own[:, None]) - error)[:, column]
    counted = mask[:, column]
    return torch.where(counted, margins, 0).square().sum() / counted.sum().clamp(min=1)


def tas_balanced(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "queries documents"],
    targets: Float[Tensor, "queries 2"],
    own: Int[Tensor, " queries"],
    negative: Int[Tensor, " queries"],
    mask: Bool[Tensor, "queries documents"],
    *,
    weight: float = 0.75,
) -> Float[Tensor, ""]:
    """Margin-MSE of each query's own pair + weight * (IB_pos + IB_neg) / 2 (TAS-Balanced, equations 5 to 8).

    Args:
        student: scores of every query with every document of the batch.
        teacher: the live teacher's, of the same pairs.
        targets: stored teacher scores of each query's positive and negative.
        own: column of each query's positive.
        negative: column of each query's negative.
        mask: what may stand against a query's positive: False at its own pair and at false negatives.
        weight: of the in-batch terms.
    """
    rows = torch.arange(len(own), device=student.device)
    pair = ((student[rows, own] - student[rows, negative]) - (targets[:, 0] - targets[:, 1])).square().mean()
    positives = in_batch_margin_mse(student, teacher, own, mask, torch.unique(own))
    negatives = in_batch_margin_mse(student, teacher, own, mask, torch.unique(negative))
    return pair + weight * (positives + negatives) / 2


def tct(
    student: Float[Tensor, "queries documents"],
    teacher: Float[Tensor, "queries documents"],
    own: Int[Tensor, " queries"],
    mask: Bool[Tensor, "queries documents"],
    *,
    hard_share: float = 0.1,
    temperature: float = 0.25,
) -> Float[Tensor, ""]:
    """g CE(own positive) + (1 - g) KL(Q || P), Q = softmax(teacher / temperature), P = softmax(student).

    Tightly coupled teacher (Lin et al. 2020, arXiv 2010.11386, equation 3), over all documents of the batch that `mask`
    allows; a query's own positive always counts. The defaults are recalled from the paper.
    """
    counted = mask.clone()
    counted[torch.arange(len(own), device=mask.device), own] = True
    soft = kl(student, teacher, mask=counted, temperature=temperature, student_temperature=1.0)
    filled = student.masked_fill(~counted, torch.finfo(student.dtype).min)
    return hard_share * torch.nn.functional.cross_entropy(filled, own) + (1 - hard_share) * soft


def allowed(
    collection: Collection,
    pairs: Pairs,
    query_rows: NDArray[np.int64],
    document_rows: NDArray[np.int64],
    own: Sequence[tuple[int, ...]],
) -> NDArray[np.bool_]:
    """[queries, documents]: True where a document may count against a query.

    False at the query's own columns, at a judged positive of the query, at a copy (same id or same normalised text) of
    its own documents or of a judged positive, and at a copy of an earlier column.

    Args:
        collection: judgements and texts.
        pairs: the batch's tables.
        query_rows: row of each query.
        document_rows: row of each column's document, repeats allowed.
        own: columns of each query's own pair.
    """
    keys = [normalise(pairs.documents.texts[row]) for row in document_rows]
    first = {key: column for column, key in reversed(list(enumerate(keys)))}
    fresh = np.asarray([first[key] == column for column, key in enumerate(keys)], dtype=bool)
    out = np.repeat(fresh[None], len(query_rows), axis=0)
    for row, query in enumerate(query_rows):
        positives = collection.positives(pairs.queries.ids[int(query)])
        texts = [collection.documents.texts[place] for place in collection.documents.ids.rows(positives)]
        banned = {normalise(text) for text in texts} | {keys[column] for column in own[row]}
        out[row] &= np.asarray([key not in banned for key in keys], dtype=bool)
    return out
