"""Teachers by name: any model, a run, an order, BM25, or several of them, each as a Scorer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from structkd.errors import DataError, MissingScoreError, UsageError, did_you_mean
from structkd.files import sha256_file
from structkd.ids import Pairs, Texts, fingerprint_fields
from structkd.index.kinds import build_text
from structkd.index.text.bm25 import Bm25Index
from structkd.objectives import ensembles, targets
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer, Dtype
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.students import load_student
from structkd.scores.cache import Scorer
from structkd.scores.formats.base import joined
from structkd.scores.formats.runs import read_rank_permutations
from structkd.scores.manifest import TeacherSpec
from structkd.trec import Run, read_run

Combine = Literal["z-mean", "mean", "median", "reciprocal-rank", "confidence"]

_MINUS_RANK = "minus rank"


class RunScorer:
    """The scores, or only the order, of a run file; of the permutations that a language model wrote.

    An order may come as a run whose ranks count, as `query document rank` columns, or as one JSON list
    `[query, document, ...]` or object {"query_id", "document_ids"} a line (`scores.formats.runs`).

    Attributes:
        run: what the file lists.
        by_rank: whether a document's score is minus its rank, whatever score the file gives.
    """

    def __init__(self, path: str | Path, *, by_rank: bool = False) -> None:
        self.path, self.by_rank = Path(path), by_rank
        self.run = _read_order(self.path) if by_rank else read_run(path)
        self._scores: dict[tuple[str, str], float] = {}
        for query, (documents, scores) in self.run.lists.items():
            values = -np.arange(1.0, len(documents) + 1) if by_rank else scores
            self._scores.update(zip(((query, document) for document in documents), values.tolist(), strict=True))
        kind = "order" if by_rank else "run"
        self.spec = TeacherSpec(
            model=f"{kind}:{self.path.name}", weights_sha256=sha256_file(path), head=_MINUS_RANK if by_rank else "score"
        )

    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores of the file.

        Raises:
            MissingScoreError: pairs that the run does not list.
        """
        keys = list(zip(pairs.query_ids, pairs.document_ids, strict=True))
        missing = [key for key in keys if key not in self._scores]
        if missing:
            todo = "Train on the run's own lists (--candidates names the same run), or give a teacher that can score."
            raise MissingScoreError(len(missing), missing, str(self.path), todo)
        return torch.tensor([self._scores[key] for key in keys], dtype=torch.float32)


def _read_order(path: Path) -> Run:
    """The lists of a file in the order it gives.

    Raises:
        DataError: a malformed line, or a document that a list names twice: then its order is not known.
    """
    table = joined(read_rank_permutations(path))
    lists: dict[str, dict[str, float]] = {}
    for query, document, score in zip(
        table.query_ids.to_pylist(), table.document_ids.to_pylist(), table.scores.tolist(), strict=True
    ):
        own = lists.setdefault(query, {})
        if document in own:
            raise DataError(f"{path}: the order of query {query!r} names document {document!r} twice; remove one.")
        own[document] = score
    ranked = {query: sorted(own, key=lambda document: -own[document]) for query, own in lists.items()}
    return Run({query: (own, -np.arange(1.0, len(own) + 1)) for query, own in ranked.items()})


class Bm25Scorer:
    """BM25 over one collection's documents; a document that shares no word with the query scores 0."""

    def __init__(self, documents: Texts, *, k1: float = 0.9, b: float = 0.4) -> None:
        self._index = cast(Bm25Index, build_text(documents, k1=k1, b=b))
        self._documents = documents
        identity = {
            "k1": k1,
            "b": b,
            "documents": documents.ids.fingerprint(),
            "texts": fingerprint_fields(documents.texts),
        }
        self.spec = TeacherSpec(model="bm25", extra=identity)

    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Scores of the pairs; each distinct query is searched once.

        Raises:
            UsageError: the pairs are over other documents than the index.
        """
        if pairs.documents.ids != self._documents.ids:
            raise UsageError("bm25 scores only documents of the collection it was built on. Build it on this one.")
        scores = np.empty(len(pairs), dtype=np.float32)
        for query in np.unique(pairs.query_rows):
            places = np.flatnonzero(pairs.query_rows == query)
            scores[places] = self._index.scores(pairs.queries.texts[query])[pairs.document_rows[places]]
        return torch.from_numpy(scores)


class EnsembleScorer:
    """Several teachers as one: the paper's T2 is "mean" (raw scores of one kind of model).

    "z-mean" standardises each teacher within each query's list first, since scales differ; "median" and "confidence"
    (list by list, the surer teacher counts more: `ensembles.confidence_weights` by entropy) start from these z-scores
    too; "reciprocal-rank" uses ranks alone. All of them depend on the list a pair stands in, so the members are cached,
    never the ensemble.
    """

    def __init__(self, members: Sequence[Scorer], combine: Combine = "z-mean") -> None:
        if not members:
            raise UsageError("an ensemble needs one teacher or more.")
        self.members, self.combine = list(members), combine

    @property
    def spec(self) -> TeacherSpec:
        """Identity: the members' and how they are combined."""
        fingerprints = [member.spec.fingerprint for member in self.members]
        return TeacherSpec(model="ensemble", extra={"members": fingerprints, "combine": self.combine})

    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Combined scores; the pairs of one query are taken as its list."""
        stack = torch.stack([member.score(pairs) for member in self.members])
        if self.combine == "mean":
            return stack.mean(0)
        combined = torch.empty(len(pairs))
        rule = _RULES[self.combine]
        for query in np.unique(pairs.query_rows):
            places = torch.from_numpy(np.flatnonzero(pairs.query_rows == query))
            combined[places] = rule(stack[:, None, places])[0]
        return combined


def _confident(stack: Float[Tensor, "teachers lists items"]) -> Float[Tensor, "lists items"]:
    scores = _standard(stack)
    return ensembles.weighted_mean(scores, ensembles.confidence_weights(scores))


def _standard(stack: Float[Tensor, "teachers lists items"]) -> Float[Tensor, "teachers lists items"]:
    return torch.stack([targets.standardise(teacher) for teacher in stack])


_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "z-mean": ensembles.standardised_mean,
    "median": lambda stack: ensembles.median(_standard(stack)),
    "reciprocal-rank": ensembles.reciprocal_rank,
    "confidence": _confident,
}


def only_orders(spec: TeacherSpec) -> bool:
    """Whether a teacher's scores are minus ranks: `order:FILE`, or a store imported from rank-permutations."""
    return spec.head == _MINUS_RANK or spec.extra.get("score_kind") == "rank"


def open_teacher(text: str, documents: Texts, dtype: Dtype = "float32") -> Scorer:
    """The teacher that a command line names as KIND:VALUE.

    Raises:
        UsageError: an unknown kind, a value missing, or a dtype for a teacher that is no cross-encoder.
    """
    kind, colon, value = text.partition(":")
    if kind not in TEACHERS or (kind != "bm25" and not value) or (kind == "bm25" and colon):
        forms = "cross-encoder:MODEL, bi-encoder:MODEL, multi-vector:MODEL, model:FOLDER, run:FILE, order:FILE, bm25"
        raise UsageError(f"teacher {text!r} is unknown; expected {forms}.{did_you_mean(kind, set(TEACHERS) - {kind})}")
    if dtype != "float32":
        if kind != "cross-encoder":
            raise UsageError(f"teacher {text!r} has no compute dtype; {dtype} is for cross-encoder:MODEL.")
        return CrossScorer(value, dtype=dtype)
    return TEACHERS[kind](value, documents)


def _multi_vector(value: str) -> Scorer:
    """A trained multi-vector model; anything else would get a random projection as a teacher."""
    scorer = load_student(value)
    if not isinstance(scorer, MultiVectorScorer):
        raise UsageError(f"teacher multi-vector:{value} is a {scorer.kind} model; name it as model:{value}.")
    return scorer


TEACHERS: dict[str, Callable[[str, Texts], Scorer]] = {
    "cross-encoder": lambda value, documents: CrossScorer(value),
    "bi-encoder": lambda value, documents: BiScorer(value),
    "multi-vector": lambda value, documents: _multi_vector(value),
    "model": lambda value, documents: load_student(value),
    "run": lambda value, documents: RunScorer(value),
    "order": lambda value, documents: RunScorer(value, by_rank=True),
    "bm25": lambda value, documents: Bm25Scorer(documents),
}
"Kind on the command line -> opener."
