"""Negatives from a first stage: by rank range, filtered against unjudged positives, never padded, all counted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from structkd.errors import UsageError
from structkd.ids import Texts
from structkd.index.kinds import build_text
from structkd.progress import note
from structkd.ranking.data.collection import Collection, normalise
from structkd.scores.cache import Scorer
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

    max_score: float | None = None
    "Leave out candidates that the first stage scores above this."

    absolute_margin: float | None = None
    "Leave out candidates whose first-stage score lies above the lowest positive's minus this."

    relative_margin: float | None = None
    """Leave out candidates whose first-stage score lies above the lowest positive's less this share of its size: with
    0.05 a negative scores at most 95 % of the positive."""

    teacher_margin: float | None = None
    "Leave out candidates whose teacher score lies above the lowest positive's minus this; needs a teacher."

    choice: Literal["sample", "top"] = "sample"
    "Draw among the candidates, or take the first."

    seed: int = 0
    "Seed of the draw."


class Mined(dict[str, list[str]]):
    """Negatives of each query id.

    Attributes:
        counts: what became of the candidates: looked_at; how many each rule left out (own_id, positive, empty,
            copy_of_positive, repeated_text, max_score, absolute_margin, relative_margin, teacher_margin,
            no_reference: no positive of the query has a score to compare with); allowed; taken; queries, and how many
            of them are short (fewer than `per_query`) or without any.
    """

    def __init__(self, lists: Mapping[str, list[str]], counts: Mapping[str, int]) -> None:
        super().__init__(lists)
        self.counts = dict(counts)


def bm25_candidates(collection: Collection, depth: int = 100) -> Run:
    """The first `depth` documents of each query by BM25 over the collection's texts."""
    index = build_text(collection.documents)
    return index.search(list(collection.queries.texts), depth).run(list(collection.queries.ids))


def mine(
    collection: Collection, candidates: Run, config: MineConfig = MineConfig(), *, teacher: Scorer | None = None
) -> Mined:
    """Negatives per query id, in candidate order ("top") or in drawn order ("sample").

    Left out: documents judged 1 or higher, documents whose text is a positive's under another id, second copies of
    one text, empty documents, a document that has the query's own id, and what the filters of `config` name. A query
    whose positives have no score to compare with gives no negatives under a margin. Queries without candidates get [].

    Args:
        collection: texts and judgements.
        candidates: ranked lists of a first stage; their scores are what the filters without a teacher read.
        config: rank range, filters, how many.
        teacher: for `teacher_margin`; scores the positives and what the other rules left.

    Raises:
        UsageError: counts out of range, or a teacher margin without a teacher.
    """
    _check(config, teacher)
    generator = np.random.default_rng(config.seed)
    counts: Counter[str] = Counter()
    lists = {query: _allowed(collection, query, candidates, config, counts) for query in collection.queries.ids}
    if config.teacher_margin is not None and teacher is not None:
        lists = _below_teacher(collection, lists, teacher, config.teacher_margin, counts)
    mined = {}
    for query, allowed in lists.items():
        drawn = [allowed[i] for i in generator.permutation(len(allowed))] if config.choice == "sample" else allowed
        mined[query] = drawn[: config.per_query]
        counts["allowed"] += len(allowed)
        counts["taken"] += len(mined[query])
    counts["queries"] = len(mined)
    counts["queries_short"] = sum(len(own) < config.per_query for own in mined.values())
    counts["queries_without"] = sum(not own for own in mined.values())
    if counts["queries_short"]:
        note(
            f"{collection.name}: {counts['queries_short']} of {len(mined)} queries have fewer than "
            f"{config.per_query} negatives"
        )
    return Mined(mined, counts)


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


def _check(config: MineConfig, teacher: Scorer | None) -> None:
    if config.per_query < 1 or config.skip < 0 or config.depth <= config.skip:
        raise UsageError(
            f"expected per_query >= 1 and 0 <= skip < depth; found {config.per_query}, {config.skip}, {config.depth}."
        )
    if config.teacher_margin is not None and teacher is None:
        raise UsageError("teacher_margin needs a teacher: give --teacher or --scores.")


def _allowed(
    collection: Collection, query: str, candidates: Run, config: MineConfig, counts: Counter[str]
) -> list[str]:
    """Candidates of the rank range that may serve as negatives, in order; what is left out is counted by its rule."""
    documents, scores = candidates.lists.get(query, ([], np.empty(0)))
    positives = set(collection.positives(query))
    score_of = dict(zip(documents, np.asarray(scores, dtype=np.float64).tolist(), strict=True))
    limits = _limits(config, [score_of[document] for document in positives if document in score_of])
    copies = {normalise(text_of(collection.documents, document)) for document in positives}
    seen: set[str] = set()
    allowed = []
    for document in documents[config.skip : config.depth]:
        text = normalise(text_of(collection.documents, document))
        rule = _identity_rule(document, query, text, positives, copies, seen)
        if rule is None:
            seen.add(text)
            rule = next((name for name, limit in limits.items() if score_of[document] > limit), None)
        counts["looked_at"] += 1
        if rule is None:
            allowed.append(document)
        else:
            counts[rule] += 1
    return allowed


def _identity_rule(
    document: str, query: str, text: str, positives: set[str], copies: set[str], seen: set[str]
) -> str | None:
    """Why a document can be no negative whatever its score; None when it can."""
    if document in positives:
        return "positive"
    if document == query:
        return "own_id"
    if not text:
        return "empty"
    if text in copies:
        return "copy_of_positive"
    return "repeated_text" if text in seen else None


def _limits(config: MineConfig, positive_scores: list[float]) -> dict[str, float]:
    """Largest first-stage score that each filter lets pass."""
    limits = {} if config.max_score is None else {"max_score": config.max_score}
    margins = {"absolute_margin": config.absolute_margin, "relative_margin": config.relative_margin}
    if any(margin is not None for margin in margins.values()) and not positive_scores:
        return limits | {"no_reference": -np.inf}
    for name, margin in margins.items():
        if margin is not None:
            lowest = min(positive_scores)
            limits[name] = lowest - margin * (abs(lowest) if name == "relative_margin" else 1.0)
    return limits


def _below_teacher(
    collection: Collection, lists: Mapping[str, list[str]], teacher: Scorer, margin: float, counts: Counter[str]
) -> dict[str, list[str]]:
    """Candidates that the teacher scores at least `margin` below the query's lowest positive."""
    positives = {query: collection.positives(query) if own else [] for query, own in lists.items()}
    asked = [(query, document) for query, own in lists.items() for document in [*positives[query], *own]]
    if not asked:
        return dict(lists)
    pairs = collection.pairs([query for query, _ in asked], [document for _, document in asked])
    score_of = dict(zip(asked, teacher.score(pairs).double().tolist(), strict=True))
    kept: dict[str, list[str]] = {}
    for query, own in lists.items():
        lowest = min((score_of[query, document] for document in positives[query]), default=None)
        if lowest is None:
            counts["no_reference"] += len(own)
            kept[query] = []
            continue
        kept[query] = [document for document in own if score_of[query, document] <= lowest - margin]
        counts["teacher_margin"] += len(own) - len(kept[query])
    return kept


def text_of(texts: Texts, identifier: str) -> str:
    """The text under an id."""
    return texts.texts[int(texts.ids.rows([identifier])[0])]
