"""What a model costs when it serves: queries per second and bytes kept per document."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.collection import Collection
from structkd.ranking.evaluation.measures import Encoder
from structkd.ranking.models.maxsim import maxsim
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.prett import PrettScorer
from structkd.ranking.models.scorer import NeuralScorer, evaluating
from structkd.trec import Run

QUERIES = 8
"Queries that are timed, one after another."


def cost_of(scorer: NeuralScorer, lists: Run, collection: Collection) -> dict[str, float]:
    """queries_per_second to order one query's candidates, and bytes_per_document that are kept for it.

    What the architecture can prepare of a document is prepared before the clock starts: the vector (dot, static), the
    vectors (colbert, float32), the lower layers (prett, float16). cat and tk keep the text (UTF-8 bytes) and read it
    again for each query. Seconds are the process's own, queries one at a time, the first one not counted.
    """
    known = [query for query in lists.lists if query in collection.queries.ids][: QUERIES + 1]
    pairs = collection.pairs_of(Run({query: lists.lists[query] for query in known}))
    documents = list(dict.fromkeys(collection.documents.texts[row] for row in np.unique(pairs.document_rows)))
    with tempfile.TemporaryDirectory() as folder:
        size, answer = _prepared(scorer, documents, folder)
        parts = [pairs.take(pairs.query_rows == row) for row in dict.fromkeys(pairs.query_rows.tolist())]
        seconds = [_seconds(answer, part) for part in parts][1:] or [_seconds(answer, parts[0])]
        if isinstance(scorer, PrettScorer):
            scorer.documents = None
    rate = len(seconds) / max(sum(seconds), 1e-9)
    return {"queries_per_second": round(rate, 2), "bytes_per_document": round(size, 1), "candidates": len(parts[-1])}


def _seconds(answer: Callable[[Pairs], Any], pairs: Pairs) -> float:
    started = time.process_time()
    answer(pairs)
    return time.process_time() - started


def _prepared(scorer: NeuralScorer, documents: list[str], folder: str) -> tuple[float, Callable[[Pairs], Any]]:
    """(bytes per document, what answers the pairs of one query)."""
    if isinstance(scorer, MultiVectorScorer):
        return _late(scorer, documents)
    if isinstance(scorer, PrettScorer):
        ids = Ids(f"{row}" for row in range(len(documents)))
        scorer.use(scorer.store(Texts(ids, documents), folder))
        return scorer.documents.bytes_per_document if scorer.documents else 0.0, scorer.score
    if isinstance(scorer, Encoder):
        return _dense(scorer, documents)
    return float(np.mean([len(text.encode()) for text in documents])), scorer.score


def _dense(scorer: Encoder, documents: list[str]) -> tuple[float, Callable[[Pairs], Any]]:
    matrix, place = scorer.encode(documents, "document"), {text: row for row, text in enumerate(documents)}

    def answer(pairs: Pairs) -> Any:
        query = scorer.encode([f"{pairs.query_texts[0]} "], "query")[0]  # vectors of texts met before are remembered
        return matrix[[place[text] for text in pairs.document_texts]] @ query

    return matrix.nbytes / len(documents), answer


def _late(scorer: MultiVectorScorer, documents: list[str]) -> tuple[float, Callable[[Pairs], Any]]:
    place = {text: row for row, text in enumerate(documents)}
    with torch.no_grad(), evaluating(scorer):
        held = scorer.vectors(documents, "document")

    def answer(pairs: Pairs) -> Any:
        with torch.no_grad(), evaluating(scorer):
            query = scorer.vectors(pairs.query_texts[:1], "query")
            rows = np.asarray([place[text] for text in pairs.document_texts])
            return maxsim(query, held, np.zeros(len(rows), dtype=np.int64), rows)

    return held.vectors.nbytes / len(documents), answer
