"""Measures of a run or a model: structkd's tie rule first, then ir-measures; named protocols; a paired test.

What is averaged. The mean runs over the queries of the collection that have at least one document judged above 0
(a query without one can only score 0 and says nothing; `without_positive` counts them). A query that the run does not
answer counts 0, for every measure; `missing` counts those. trec_eval averages over the answered queries unless told
otherwise, so a run that skips hard queries looks better there. Gains are linear, as in trec_eval; grades below 0
count as 0. A judged document outside the documents counts in the ideal ranking (full judgements, pooled collection).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import ir_measures
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import ttest_1samp
from torch import Tensor

from structkd.errors import DataError, UsageError
from structkd.ids import Pairs
from structkd.index.kinds import build, build_multi
from structkd.ordering import rank_as_scores
from structkd.ranking.data.collection import Collection
from structkd.trec import Run, run_of

PROTOCOLS: Mapping[str, str] = {
    "beir": "nDCG@10 R@100",
    "ms-marco-dev-49k": "nDCG@10 RR@10 AP@1000 R@1000",
    "ms-marco-dev-small": "nDCG@10 RR@10 AP@1000 R@1000",
    "msmarco-dev": "RR@10 R@1000",
    "trec-dl": "nDCG@10 RR(rel=2) RR(rel=2)@10 AP(rel=2)@1000 R(rel=2)@1000",
}
"Named sets of measures. TREC-DL binarises at grade 2 for all but nDCG; its RR has no cut-off of its own."

_QUERIES: Mapping[str, tuple[int, int]] = {
    "ms-marco-dev-49k": (45_000, 56_000),
    "ms-marco-dev-small": (6_980, 6_980),
    "trec-dl": (43, 54),  # 2019 and 2020
}
"How many judged queries a protocol's published figures run over, from and to."

Mode = Literal["rerank", "retrieve"]

Protocols = Literal["beir", "ms-marco-dev-49k", "ms-marco-dev-small", "msmarco-dev", "trec-dl"]


@runtime_checkable
class PairScorer(Protocol):
    """What re-ranking needs."""

    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """One score per pair."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """What retrieval needs: vectors whose inner product is the score."""

    def encode(self, texts: Sequence[str], side: Literal["query", "document"]) -> NDArray[np.float32]:
        """[texts, dimension], normalised when the similarity is cosine."""
        ...


@runtime_checkable
class MultiEncoder(Protocol):
    """What late interaction needs: several vectors per text, whose MaxSim is the score."""

    def encode_multi(self, texts: Sequence[str], side: Literal["query", "document"]) -> list[NDArray[np.float32]]:
        """[vectors, dimension] of each text."""
        ...


@dataclass(frozen=True)
class EvaluationResult:
    """What a run is worth.

    Attributes:
        collection: name of the collection.
        measures: measure -> mean over `queries` queries.
        per_query: measure -> query id -> value.
        queries: how many queries the means run over.
        missing: of them, how many the run does not answer (they count 0).
        without_positive: judged queries left out since no document is judged above 0.
        unjudged: share of the run's first ten documents that nobody judged, over the queries it answers.
    """

    collection: str
    measures: dict[str, float]
    per_query: dict[str, dict[str, float]]
    queries: int
    missing: int
    without_positive: int
    unjudged: float


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same queries.

    Attributes:
        measure: what was compared.
        difference: mean of second minus first.
        low: lower end of the 95 % bootstrap interval of the difference.
        high: upper end of it.
        p_value: two-sided, paired randomisation test.
        t_test: two-sided p-value of the paired t-test; 1 when no query differs.
        wins: queries on which the second is better.
        losses: queries on which it is worse.
        queries: how many queries.
    """

    measure: str
    difference: float
    low: float
    high: float
    p_value: float
    t_test: float
    wins: int
    losses: int
    queries: int


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and how the lists come about."""

    measures: str = "nDCG@10 RR@10"
    "Measures of ir-measures, separated by spaces, or the name of a protocol."

    protocol: Protocols | None = None
    "A named protocol instead of --measures; its name is printed, and another number of queries than it has is said."

    mode: Mode = "rerank"
    "rerank orders given candidates; retrieve searches all documents (bi-encoders and multi-vector models)."

    depth: int = 1000
    "Documents per query: retrieved, or taken from the head of the candidates."

    drop_same_id: bool = False
    "Leave out a document whose id is the query's own id, as BEIR does on Quora and ArguAna."

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UsageError(f"depth {self.depth}: expected 1 document or more per query.")


def parse_measures(text: str) -> list[Any]:
    """The measures that a text or the name of a protocol stands for.

    Raises:
        UsageError: none, or one that ir-measures does not know or cannot compute here.
    """
    words = PROTOCOLS.get(text, text).split()
    parsed = []
    for word in words:
        try:
            measure = ir_measures.parse_measure(word)
        except (NameError, ValueError, SyntaxError, KeyError, TypeError) as error:
            raise UsageError(
                f"measure {word!r} is unknown ({error}); expected for example nDCG@10, RR@10, R@100, AP, or a "
                f"protocol: {', '.join(PROTOCOLS)}."
            ) from None
        if not ir_measures.DefaultPipeline.supports(measure):
            raise UsageError(f"measure {word!r} cannot be computed by the installed ir-measures providers.")
        parsed.append(measure)
    if not parsed:
        raise UsageError("no measure is named; expected for example 'nDCG@10 RR@10'.")
    return parsed


def binarised(measures: str, grade: int = 2) -> str:
    """The measures with relevance from `grade` on, where that exists: nDCG uses all grades and stays as it is.

    Raises:
        UsageError: an unknown measure.
    """
    out = []
    for measure in parse_measures(measures):
        graded = "rel" not in measure.SUPPORTED_PARAMS
        out.append(repr(measure if graded else measure(rel=grade)))
    return " ".join(out)


def evaluate_run(
    collection: Collection, run: Run, measures: str = "nDCG@10 RR@10", *, drop_same_id: bool = False
) -> EvaluationResult:
    """Measures of a ranked list per query, in the order of the run (`trec.read_run` applied the tie rule).

    ir-measures is handed n, n-1, ..., 1 and never raw scores: its providers break ties in two ways and compare in
    float32. What the mean runs over stands in the docstring of this module.

    Raises:
        DataError: no judged query has a relevant document, or the run answers none of the judged queries.
        UsageError: an unknown measure.
    """
    wanted = parse_measures(measures)
    qrels = _positive_qrels(collection)
    answered = [query for query in qrels if query in run.lists]
    if not answered:
        shown = ", ".join(list(run.lists)[:3]) or "no query"
        raise DataError(
            f"{collection.name}: the run answers none of the {len(qrels)} judged queries (it has {shown}). "
            "Is it a run of another collection?"
        )
    lists = {query: _documents(run, query, drop_same_id) for query in answered}
    ranked = {
        query: dict(zip(documents, map(float, rank_as_scores(len(documents))), strict=True))
        for query, documents in lists.items()
    }
    per_query = {repr(measure): dict.fromkeys(qrels, 0.0) for measure in wanted}
    judged = {query: {document: max(0, grade) for document, grade in qrels[query].items()} for query in qrels}
    for metric in ir_measures.iter_calc(wanted, judged, ranked):
        if metric.query_id in qrels:
            per_query[repr(metric.measure)][metric.query_id] = float(metric.value)
    heads = [(query, document) for query, documents in lists.items() for document in documents[:10]]
    return EvaluationResult(
        collection=collection.name,
        measures={name: float(np.mean(list(values.values()))) for name, values in per_query.items()},
        per_query=per_query,
        queries=len(qrels),
        missing=len(qrels) - len(answered),
        without_positive=sum(bool(judged) for judged in collection.qrels.values()) - len(qrels),
        unjudged=float(np.mean([document not in qrels[query] for query, document in heads])) if heads else 0.0,
    )


def evaluate_model(
    collection: Collection,
    scorer: PairScorer,
    *,
    mode: Mode = "rerank",
    candidates: Run | None = None,
    measures: str = "nDCG@10 RR@10",
    depth: int = 1000,
    drop_same_id: bool = False,
) -> EvaluationResult:
    """Measures of a model: `rerank` or `retrieve`, then `evaluate_run`.

    Raises:
        UsageError: re-ranking without candidates, an unknown mode, retrieval with a model that has no vectors.
        DataError: as in `evaluate_run`, or candidates outside the collection.
    """
    parse_measures(measures)  # before hours of scoring
    run = rank(collection, scorer, mode=mode, candidates=candidates, depth=depth)
    return evaluate_run(collection, run, measures, drop_same_id=drop_same_id)


def rank(
    collection: Collection,
    scorer: PairScorer,
    *,
    mode: Mode = "rerank",
    candidates: Run | None = None,
    depth: int = 1000,
) -> Run:
    """The model's lists: `rerank` or `retrieve`; raises what they raise, and UsageError as `evaluate_model`."""
    if mode == "rerank":
        if candidates is None:
            raise UsageError("mode 'rerank' needs candidates: a run whose documents the model orders.")
        return rerank(collection, scorer, candidates, depth=depth)
    if mode == "retrieve":
        return retrieve(collection, scorer, depth=depth)
    raise UsageError(f"mode {mode!r} is unknown; expected 'rerank' or 'retrieve'.")


def rerank(collection: Collection, scorer: PairScorer, candidates: Run, *, depth: int = 1000) -> Run:
    """The first `depth` candidates of each query of the collection, in the model's order.

    Raises:
        DataError: no candidate list belongs to a query of the collection, or a document is not in it.
    """
    known = {query: lists for query, lists in candidates.cut(depth).lists.items() if query in collection.queries.ids}
    if not known:
        raise DataError(
            f"{collection.name}: none of the {len(candidates.lists)} candidate lists belongs to a query of the "
            f"collection ({len(collection.queries)} queries). Is it a run of another collection?"
        )
    pairs = collection.pairs_of(Run(known))
    scores = scorer.score(pairs).detach().cpu().double().numpy()
    return run_of(pairs.query_ids, pairs.document_ids, scores)


def retrieve(collection: Collection, scorer: object, *, depth: int = 1000) -> Run:
    """Exact search of every document by inner product of the model's vectors.

    Raises:
        UsageError: the model has no vectors to search with.
    """
    texts, depth = collection.documents.texts, min(depth, len(collection.documents))
    if isinstance(scorer, MultiEncoder):
        parts = (scorer.encode_multi(texts[low : low + 512], "document") for low in range(0, len(texts), 512))
        many = build_multi((one for part in parts for one in part), collection.documents.ids, metric="ip")
        found = many.search(scorer.encode_multi(list(collection.queries.texts), "query"), depth)
        return found.run(list(collection.queries.ids))
    if not isinstance(scorer, Encoder):
        raise UsageError(f"{type(scorer).__name__} scores pairs and has no vectors; use mode 'rerank' with candidates.")
    # vectors of a cosine model are normalised already; "ip" also takes the zero vector of an empty document
    index = build(scorer.encode(list(texts), "document"), collection.documents.ids, kind="flat", metric="ip")
    queries = scorer.encode(list(collection.queries.texts), "query")
    return index.search(queries, depth).run(list(collection.queries.ids))


def compare(
    first: EvaluationResult, second: EvaluationResult, measure: str, *, samples: int = 10_000, seed: int = 0
) -> Comparison:
    """Whether `second` beats `first`: paired randomisation test (signs of the per-query differences are flipped at
    random; Smucker et al. 2007) and a percentile bootstrap interval over queries.

    Raises:
        UsageError: a result lacks the measure, or the two were measured on different queries.
    """
    name = repr(parse_measures(measure)[0])
    for result in (first, second):
        if name not in result.per_query:
            raise UsageError(f"{name} was not measured; the result has {', '.join(result.per_query)}.")
    return paired(first.per_query[name], second.per_query[name], measure=name, samples=samples, seed=seed)


def paired(
    first: Mapping[str, float], second: Mapping[str, float], *, measure: str = "", samples: int = 10_000, seed: int = 0
) -> Comparison:
    """`compare` of two values per query.

    Raises:
        UsageError: the two cover different queries.
    """
    if first.keys() != second.keys():
        raise UsageError(
            f"the results cover different queries ({len(first)} and {len(second)}); compare like with like."
        )
    change = np.asarray([second[query] - first[query] for query in sorted(first)])
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, size=(samples, len(change)), dtype=np.int8) * 2 - 1
    extreme = np.abs(signs @ change) >= abs(change.sum()) * (1 - 1e-12)
    draws = change[generator.integers(0, len(change), size=(samples, len(change)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    varied = len(change) > 1 and float(np.ptp(change)) > 0
    return Comparison(
        measure=measure,
        difference=float(change.mean()),
        low=float(low),
        high=float(high),
        # the observed signs are one of the samples, so p is never 0
        p_value=float((extreme.sum() + 1) / (samples + 1)),
        t_test=float(ttest_1samp(change, 0.0).pvalue) if varied else float(not change.any()),
        wins=int((change > 0).sum()),
        losses=int((change < 0).sum()),
        queries=len(change),
    )


def check_protocol(name: str, result: EvaluationResult) -> str | None:
    """What is unlike the protocol's published figures: another number of queries; None when nothing is."""
    if name not in _QUERIES:
        return None
    low, high = _QUERIES[name]
    if low <= result.queries <= high:
        return None
    expected = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"{result.collection}: {result.queries} judged queries, while the published figures of {name} run over "
        f"{expected}; do not put them side by side"
    )


def _positive_qrels(collection: Collection) -> dict[str, Mapping[str, int]]:
    """Judgements of the queries that have a relevant document."""
    kept = {query: judged for query, judged in collection.qrels.items() if any(grade > 0 for grade in judged.values())}
    if not kept:
        raise DataError(f"{collection.name}: no query has a document judged above 0; nothing can be measured.")
    return kept


def _documents(run: Run, query: str, drop_same_id: bool) -> list[str]:
    documents = run.lists[query][0]
    return [document for document in documents if document != query] if drop_same_id else list(documents)
