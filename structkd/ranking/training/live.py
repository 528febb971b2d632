"""In-batch distillation: a teacher scores every query of a batch against every document while the student trains.

What the teacher says goes into its score cache, so that a second epoch, or a second student, asks for what is new.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from structkd.errors import UsageError
from structkd.ids import Pairs
from structkd.progress import note
from structkd.ranking.data.collection import Collection
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.maxsim import Ragged, maxsim
from structkd.ranking.models.multi_vector import MultiVectorScorer
from structkd.ranking.models.scorer import NeuralScorer, Side, evaluating
from structkd.ranking.models.static import StaticScorer
from structkd.ranking.training.in_batch import allowed, tas_balanced, tct
from structkd.ranking.training.topics import TopicPlan, topics_of, with_pairs
from structkd.ranking.training.train import Batch, FitConfig, Lists
from structkd.scores.cache import CachedScorer, Scorer
from structkd.scores.manifest import TeacherSpec

_REMEMBERED = 10_000  # texts whose token vectors a live teacher keeps, some 1 GB at 200 x 128 numbers


@dataclass(frozen=True)
class LiveConfig:
    """In-batch terms beside the objective; none by default."""

    in_batch: Literal["none", "tas-balanced", "tct"] = "none"
    """Terms over every query and document of a batch, scored by a live teacher. They take the place of --objective:
    tas-balanced is Margin-MSE of topic-wise balanced pairs, tct cross-entropy and KL."""

    topics: int = 0
    "Clusters that the training queries are drawn from; 0: one for each ten batches' worth of queries."

    margin_bins: int = 10
    "tas-balanced: bins of teacher margins that pairs are drawn from."

    in_batch_weight: float = 0.75
    "tas-balanced: weight of the in-batch terms beside the pair's own."

    hard_share: float = 0.1
    "tct: weight of the cross-entropy on the positive; the rest is the teacher's."

    live_temperature: float = 0.25
    "tct: temperature of the live teacher."

    def __post_init__(self) -> None:
        if self.topics < 0 or self.margin_bins < 1 or self.in_batch_weight < 0 or self.live_temperature <= 0:
            raise UsageError(
                f"expected topics >= 0, margin_bins >= 1, in_batch_weight >= 0 and live_temperature > 0; found "
                f"{self.topics}, {self.margin_bins}, {self.in_batch_weight}, {self.live_temperature}."
            )
        if not 0 <= self.hard_share <= 1:
            raise UsageError(f"hard_share {self.hard_share}: expected a share between 0 and 1.")


NO_LIVE = LiveConfig()
"No in-batch terms."


class RememberingScorer:
    """A multi-vector teacher that encodes each text once, however many batches name it.

    Attributes:
        encoded: texts that went through the encoder.
    """

    def __init__(self, scorer: MultiVectorScorer, capacity: int = _REMEMBERED) -> None:
        self.scorer, self.capacity, self.encoded = scorer, capacity, 0
        self._kept: dict[tuple[str, str], Tensor] = {}

    @property
    def spec(self) -> TeacherSpec:
        """The model's."""
        return self.scorer.spec

    @torch.no_grad()
    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """MaxSim of kept token vectors, float32 on the CPU."""
        queries, query_of = np.unique(pairs.query_rows, return_inverse=True)
        documents, document_of = np.unique(pairs.document_rows, return_inverse=True)
        left = self._ragged([pairs.queries.texts[row] for row in queries], "query")
        right = self._ragged([pairs.documents.texts[row] for row in documents], "document")
        return maxsim(left, right, query_of, document_of).float().cpu()

    def _ragged(self, texts: list[str], side: Side) -> Ragged:
        new = list(dict.fromkeys(text for text in texts if (side, text) not in self._kept))
        if len(self._kept) + len(new) > self.capacity:
            self._kept.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self.encoded += len(new)
            with evaluating(self.scorer):
                fresh = self.scorer.vectors(new, side)
            for text, start, length in zip(new, fresh.starts, fresh.lengths, strict=True):
                self._kept[side, text] = fresh.vectors[start : start + length].clone()
        parts = [self._kept[side, text] for text in texts]
        lengths = np.asarray([len(part) for part in parts], dtype=np.int64)
        return Ragged(torch.cat(parts), np.cumsum(lengths) - lengths, lengths)


def cached_live(scorer: Scorer, folder: str | Path) -> CachedScorer:
    """The teacher behind a cache in `folder`: what is there is not asked, what is asked is committed there.

    Raises:
        TeacherMismatchError: the folder holds another teacher's scores.
    """
    return CachedScorer(RememberingScorer(scorer) if isinstance(scorer, MultiVectorScorer) else scorer, folder)


def topic_plan(
    lists: Lists, collection: Collection, student: NeuralScorer, live: LiveConfig, config: FitConfig
) -> TopicPlan:
    """Topic-wise batches of balanced pairs, over the lists that have a pair.

    Queries are clustered by the student's own starting vectors; a student without vectors borrows static ones.

    Raises:
        DataError: no list has a pair.
    """
    held, positive = with_pairs(lists, collection)
    texts = [held.queries.texts[row] for row in held.query_rows]
    encoder = student if isinstance(student, BiScorer) else StaticScorer.fresh(collection.documents, seed=config.seed)
    count = live.topics or max(1, round(len(held) / (10 * config.batch_lists)))
    topics = topics_of(encoder.encode(texts, "query"), count, config.seed)
    note(f"{collection.name}: {len(held)} queries in {len(np.unique(topics))} topics")
    return TopicPlan(held, config.batch_lists, config.list_size, config.seed, topics, positive, live.margin_bins)


class InBatchLoss:
    """(student, batch) -> loss over the batch's [queries, documents] scores; each batch row is [positive, negative].

    Attributes:
        teacher: scores every query with every document, and keeps what it said.
    """

    def __init__(self, teacher: Scorer, collection: Collection, live: LiveConfig, scale: float = 1.0) -> None:
        if live.in_batch == "none":
            raise UsageError("in_batch 'none' is no loss; expected tas-balanced or tct.")
        self.teacher, self.collection, self.live, self.scale = teacher, collection, live, scale

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Score the whole grid with student and teacher, then the configured loss."""
        if batch.mask.shape[1] != 2 or not bool(batch.mask.all()):
            raise UsageError("in-batch terms need rows of a positive and a negative; train with a TopicPlan.")
        size, live = len(batch.mask), self.live
        queries, documents = batch.pairs.query_rows[::2], batch.pairs.document_rows  # positive, negative, positive, ...
        own, negative = np.arange(0, 2 * size, 2), np.arange(1, 2 * size, 2)
        grid = Pairs(batch.pairs.queries, batch.pairs.documents, np.repeat(queries, 2 * size), np.tile(documents, size))
        student: Tensor = self.scale * model(grid).float().reshape(size, 2 * size)
        with torch.autocast(student.device.type, enabled=False):
            teacher = self.teacher.score(grid)
        teacher = teacher.reshape(size, 2 * size).to(student.device)
        both = live.in_batch == "tas-balanced"  # there the pair has a term of its own
        columns = [(int(p), int(n)) if both else (int(p),) for p, n in zip(own, negative, strict=True)]
        held = torch.from_numpy(allowed(self.collection, batch.pairs, queries, documents, columns)).to(student.device)
        at = torch.from_numpy(own).to(student.device)
        if not both:
            return tct(student, teacher, at, held, hard_share=live.hard_share, temperature=live.live_temperature)
        other = torch.from_numpy(negative).to(student.device)
        targets = batch.targets.to(student.device)
        return tas_balanced(student, teacher, targets, at, other, held, weight=live.in_batch_weight)


def in_batch_training(
    training: Lists,
    collection: Collection,
    student: NeuralScorer,
    teacher: Scorer,
    live: LiveConfig,
    config: FitConfig,
    scale: float,
) -> tuple[TopicPlan, InBatchLoss]:
    """The batches and the loss of a training with in-batch terms.

    Raises:
        DataError: no list has a pair of a positive and another document.
        UsageError: batches of one query have nothing in common to compare.
    """
    if config.batch_lists < 2:
        raise UsageError(f"--in-batch {live.in_batch} compares queries of a batch; --batch-lists must be 2 or more.")
    plan = topic_plan(training, collection, student, live, config)
    return plan, InBatchLoss(teacher, collection, live, scale)
