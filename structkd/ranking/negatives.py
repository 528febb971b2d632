"""Negatives from a first stage: sampled or taken from the top, without judged positives, their copies, or padding."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import UsageError
from structkd.ids import Texts
from structkd.index.kinds import build_text
from structkd.progress import note
from structkd.ranking.data import Collection, normalise
from structkd.trec import Run


@dataclass(frozen=True)
class MineConfig:
    """Which of a first stage's candidates become negatives."""

    per_query: int = 16
    "Negatives of each query, or fewer when the first stage offers no more: lists are never padded."

    skip: int = 0
    "Candidates at the top that are left out: the likeliest unjudged positives."

    depth: int = 100
    "Candidates looked at, from the top."

    choice: Literal["sample", "top"] = "sample"
    "Draw among the candidates, or take the first."

    seed: int = 0
    "Seed of the draw."


def bm25_candidates(collection: Collection, depth: int = 100) -> Run:
    """The first `depth` documents of each query by BM25 over the collection's texts."""
    index = build_text(collection.documents)
    return index.search(list(collection.queries.texts), depth).run(list(collection.queries.ids))


def mine(collection: Collection, candidates: Run, config: MineConfig = MineConfig()) -> dict[str, list[str]]:
    """Negatives per query id, in candidate order ("top") or in drawn order ("sample").

    Left out: documents judged 1 or higher, documents whose text is a positive's under another id, second copies of
    one text, empty documents, and a document that has the query's own id. Queries without candidates get [].

    Raises:
        UsageError: counts out of range.
    """
    if config.per_query < 1 or config.skip < 0 or config.depth <= config.skip:
        raise UsageError(
            f"expected per_query >= 1 and 0 <= skip < depth; found {config.per_query}, {config.skip}, {config.depth}."
        )
    generator = np.random.default_rng(config.seed)
    mined, short = {}, 0
    for query in collection.queries.ids:
        listed = candidates.lists.get(query, ([], None))[0][config.skip : config.depth]
        allowed = _allowed(collection, query, listed)
        if config.choice == "sample":
            allowed = [allowed[i] for i in generator.permutation(len(allowed))]
        mined[query] = allowed[: config.per_query]
        short += len(mined[query]) < config.per_query
    if short:
        note(f"{collection.name}: {short} of {len(mined)} queries have fewer than {config.per_query} negatives")
    return mined


def labelled_lists(
    collection: Collection, negatives: dict[str, list[str]], per_list: int
) -> tuple[list[tuple[int, NDArray[np.int64]]], NDArray[np.float32]]:
    """One list per (query, positive): the positive first with its grade, then `per_list` of the query's negatives.

    The lists of one query take different negatives, in turn. Queries without a positive or without negatives give
    none. The labels are flat in the order of the lists.
    """
    lists, labels = [], []
    for query, own in negatives.items():
        for turn, positive in enumerate(collection.positives(query)):
            if not own:
                continue
            start = turn * per_list % len(own)
            chosen = (own[start:] + own[:start])[:per_list]
            rows = collection.documents.ids.rows([positive, *chosen], f"{collection.name}: documents")
            lists.append((int(collection.queries.ids.rows([query])[0]), rows))
            labels.append(np.asarray([collection.qrels[query][positive], *[0] * len(chosen)], dtype=np.float32))
    return lists, np.concatenate(labels) if labels else np.empty(0, dtype=np.float32)


def _allowed(collection: Collection, query: str, candidates: list[str]) -> list[str]:
    """Candidates that may serve as negatives, in order."""
    positives = set(collection.positives(query))
    seen = {normalise(text_of(collection.documents, document)) for document in positives} | {""}
    allowed = []
    for document in candidates:
        text = normalise(text_of(collection.documents, document))
        if document in positives or document == query or text in seen:
            continue
        seen.add(text)
        allowed.append(document)
    return allowed


def text_of(texts: Texts, identifier: str) -> str:
    """The text under an id."""
    return texts.texts[int(texts.ids.rows([identifier])[0])]
