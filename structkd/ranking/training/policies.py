"""Objectives and policies on candidate lists, each switched on by one flag beside `--objective`.

What needs a fixed set of classes (pseudo-subclasses, mixed inputs, learned fusion ratios) is for graphs only: a list of
candidates has no fixed size, and a mixture of two texts has no meaning.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from structkd import acquisition
from structkd.errors import DataError, UsageError
from structkd.objectives import targets
from structkd.policies import (
    REPRESENTATION_FLAG,
    SAME_WIDTH,
    SOFTMAX_OBJECTIVES,
    Number,
    check_sample_weight,
    choice,
    list_weight,
    representation_loss,
)
from structkd.ranking.data.collection import Collection
from structkd.ranking.models.dual import DualBiScorer
from structkd.ranking.models.encoders import BiScorer, NeuralScorer
from structkd.ranking.training.losses import listwise_labels
from structkd.ranking.training.train import Batch, Lists, scored_grid
from structkd.scores.cache import CachedScorer, Scorer

Objective = Callable[..., Tensor]
"(student's scores, targets, mask=, weight=, balanced=) -> loss"

TARGETS = {"taid": Number(0.4, 0, 1), "truncate": Number(10, 2, whole=True)}
ACQUIRE = {"margin": None, "rad": Number(0.9, 0, 1), "random": None}
KEEP = {"agreement": Number(0.1, 0, 1), "own-score": Number(0), "own-top": Number(3, 1, whole=True)}
DOMAINS = {"length": Number(4, 2, whole=True)}

_EVERY = 50  # steps between two looks at the domains' gaps
_ROWS = 64  # documents of a step's representation term: mi-alpha's cost is cubic
_NEIGHBOURS = 5


@dataclass(frozen=True)
class Policies:
    """What is switched on beside the objective; nothing by default."""

    target: str = ""
    "Target of the objective: taid[:START], or truncate[:DOCUMENTS], the teacher's best of each list."

    sample_weight: str = ""
    "Weight of each list in the objective: certainty, confidence, margin, or bd-kd (with --objective kl)."

    representation: str = ""
    """Term on document vectors (bi-encoder teacher and student): mi-alpha[:ALPHA], infonce, similarity-preserving,
    affinity-kl, cosine, feature-mse."""

    representation_weight: float = 0.1
    "Weight of the term on vectors."

    head: Literal["single", "dual"] = "single"
    "dual: one head for the judgements, one for the teacher, mixed by a share chosen on held-out lists."

    acquire: str = ""
    "Which lists the teacher is asked about: random, margin or rad[:TEACHER ACCURACY]; see budget."

    budget: float = 1.0
    "Share of the lists that the teacher is asked about."

    keep: str = ""
    """Lists to keep: agreement[:CONFIDENCE] of teacher and student, own-top[:RANK] or own-score[:SCORE] of the
    document that a synthetic query was made from (its judged one)."""

    domains: str = ""
    "Kinds of queries weighed by how far the student lags behind (DDK): length[:PARTS] in words."

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return self != Policies(representation_weight=self.representation_weight)

    @property
    def reads_judgements(self) -> bool:
        """Whether training itself needs a collection's judgements."""
        return self.head == "dual" or self.keep.startswith("own")

    @property
    def read_scores(self) -> list[str]:
        """The flags that read how far apart a teacher's scores lie, which a teacher that only orders cannot say."""
        found = {
            "--target taid": self.target.startswith("taid"),
            f"--sample-weight {self.sample_weight}": bool(self.sample_weight),
            f"--keep {self.keep}": self.keep.startswith(("agreement", "own-score")),
            f"--domains {self.domains}": bool(self.domains),
        }
        return [flag for flag, given in found.items() if given]

    def check(self, parts: Mapping[str, float], student: NeuralScorer) -> None:
        """UsageError for an unknown name, or flags that do not fit the objectives or the student."""
        target, _ = choice("--target", self.target, TARGETS)
        choice("--acquire", self.acquire, ACQUIRE)
        choice("--keep", self.keep, KEEP)
        choice("--domains", self.domains, DOMAINS)
        choice("--representation", self.representation, REPRESENTATION_FLAG)
        check_sample_weight(self.sample_weight, parts, ("bd-kd",))
        if target == "taid" and not set(parts) <= SOFTMAX_OBJECTIVES:
            raise UsageError(
                f"--target taid needs soft-max objectives; {', '.join(parts)} is none. Try --objective kl."
            )
        if (self.representation or self.head == "dual") and not isinstance(student, BiScorer):
            raise UsageError("--representation and --head dual need a student with one vector per text: dot or static.")
        if not 0 < self.budget <= 1 or (self.budget < 1 and not self.acquire):
            raise UsageError(
                f"--budget {self.budget}: expected a share of the lists, above 0 and up to 1, with --acquire random, "
                "margin or rad."
            )


NO_POLICIES = Policies()
"Nothing switched on."


def asked(
    policies: Policies, student: NeuralScorer, lists: Lists, scale: float, seed: int
) -> Int[np.ndarray, " lists"]:
    """Positions of the lists that the teacher is asked about, by the student's own scores; all without `--acquire`."""
    name, accuracy = choice("--acquire", policies.acquire, ACQUIRE)
    if not name:
        return np.arange(len(lists))
    budget, generator = max(1, round(policies.budget * len(lists))), np.random.default_rng([seed, 20_250])
    scores, mask = grids(lists, student_scores(student, lists))
    scores = scale * scores
    if name == "random":
        return acquisition.random(scores, budget, generator=generator)
    if name == "margin":
        return acquisition.margin(scores, budget, mask=mask)
    return acquisition.rad(scores, budget, teacher_accuracy=accuracy, generator=generator, mask=mask)


def kept(
    policies: Policies, student: NeuralScorer, lists: Lists, collection: Collection, scale: float
) -> Int[np.ndarray, " kept"]:
    """Positions of the lists whose teacher scores are used; all without `--keep`.

    Raises:
        DataError: no list is left.
    """
    name, number = choice("--keep", policies.keep, KEEP)
    if not name:
        return np.arange(len(lists))
    teacher, mask = grids(lists, lists.targets)
    if name == "agreement":
        scores = scale * grids(lists, student_scores(student, lists))[0]
        keep = acquisition.agreement(scores, teacher, student_confidence=number, teacher_confidence=number, mask=mask)
    else:
        own, there = own_items(lists, collection, mask)
        top, least = (round(number), None) if name == "own-top" else (None, number)
        keep = there & acquisition.teacher_filter(teacher, own, mask=mask, top=top, threshold=least)
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise DataError(f"--keep {policies.keep}: none of {len(lists)} lists passes; lower the bound.")
    return rows


def own_items(
    lists: Lists, collection: Collection, mask: Bool[np.ndarray, "lists items"]
) -> tuple[Int[np.ndarray, " lists"], Bool[np.ndarray, " lists"]]:
    """(place of each list's own document, whether it has one): the first one judged relevant to its query."""
    pairs = lists.pairs()
    judged = zip(pairs.query_ids, pairs.document_ids, strict=True)
    relevant = np.asarray([collection.qrels.get(query, {}).get(document, 0) > 0 for query, document in judged])
    grid = np.zeros(mask.shape, dtype=bool)
    grid[mask] = relevant
    return grid.argmax(1), np.asarray(grid.any(1))


def student_scores(student: NeuralScorer, lists: Lists) -> NDArray[np.float32]:
    """The student's own scores of every pair, flat."""
    found: NDArray[np.float32] = student.score(lists.pairs()).numpy()
    return found


def grids(
    lists: Lists, flat: NDArray[np.float32]
) -> tuple[Float[np.ndarray, "lists items"], Bool[np.ndarray, "lists items"]]:
    """Flat scores as [lists, items] in float64, 0 where padded, and the mask."""
    lengths = np.diff(lists.offsets)
    mask: NDArray[np.bool_] = np.less(np.arange(int(lengths.max()))[None, :], lengths[:, None])
    out = np.zeros(mask.shape)
    out[mask] = flat
    return out, mask


class Lesson:
    """The loop's `loss_of` with policies: the objective, and what changes from step to step.

    Attributes:
        shares: share of each domain, empty without `--domains`.
    """

    def __init__(
        self,
        policies: Policies,
        objective: Objective,
        student: NeuralScorer,
        teacher: Scorer,
        collection: Collection,
        *,
        training: Lists,
        held: Lists,
        scale: float,
        steps: int,
        seed: int,
    ) -> None:
        self.policies, self.objective, self.scale = policies, objective, scale
        self.student, self.collection, self.held, self.seed = student, collection, held, seed
        self.target, self.number = choice("--target", policies.target, TARGETS)
        self.taid = targets.Taid(
            targets.TaidConfig(steps=steps, start=self.number if self.target == "taid" else 0.4, alpha=4 / steps)
        )
        self.step = 0
        self.domain_of, self.shares = self._domains(training)
        self._counts = np.bincount(self.domain_of[training.query_rows], minlength=len(self.shares))
        self.representation, self.alpha = choice("--representation", policies.representation, REPRESENTATION_FLAG)
        self.teacher = _vectors_of(teacher) if self.representation else None
        if self.teacher is not None and self.representation in SAME_WIDTH and isinstance(student, BiScorer):
            _add_projection(student, self.teacher, seed)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a step."""
        self._weigh_domains()
        label_loss: Tensor | float = 0.0
        if isinstance(self.student, DualBiScorer):
            label, taught = (batch.grid(part.float()) for part in self.student.both(batch.pairs))
            scores = self.scale * taught
            label_loss = listwise_labels(self.scale * label, self._labels(batch), batch.mask)
        else:
            scores = self.scale * scored_grid(model, batch)
        wanted, mask = batch.targets, batch.mask
        if self.target == "truncate":
            mask = targets.truncate(wanted, round(self.number), mask=mask)
        elif self.target == "taid":
            wanted = self.taid.target(scores, wanted, mask=mask)
        balanced = self.policies.sample_weight == "bd-kd"
        value = self.objective(scores, wanted, mask=mask, weight=self._weight(batch), balanced=balanced)
        if self.target == "taid":
            self.taid.update(value.detach(), self.step)
        self.step += 1
        loss = value if not isinstance(self.student, DualBiScorer) else 0.5 * value + 0.5 * label_loss
        if self.representation:
            loss = loss + self.policies.representation_weight * self._representation(batch)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        state = {"step": self.step, "taid": self.taid.state_dict(), "shares": self.shares.tolist()}
        return state | {"policies": dataclasses.asdict(self.policies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            UsageError: it was made under other policies.
        """
        if state.get("policies") != dataclasses.asdict(self.policies):
            raise UsageError("the checkpoint was made under other policies. Give another --out, or remove that folder.")
        self.step, self.shares = int(state["step"]), np.asarray(state["shares"], dtype=np.float64)
        self.taid.load_state_dict(state["taid"])

    def finish(self, measure: Callable[[], float] | None) -> None:
        """After training: choose the share of a dual head by the held-out measure, drop what only training needed."""
        if hasattr(self.student, "projection"):
            del self.student.projection
        if isinstance(self.student, DualBiScorer) and measure is not None:
            found = []
            for share in (0.05, *(step / 10 for step in range(1, 10)), 0.95):
                self.student.set_share(share)
                found.append((measure(), -abs(share - 0.5), share))
            self.student.set_share(max(found)[2])

    def _weight(self, batch: Batch) -> Tensor | None:
        """One number per list: by its teacher scores, and by its domain."""
        weight = list_weight(self.policies.sample_weight, batch.targets, batch.mask)
        if len(self.shares):
            domain = self.domain_of[_query_rows(batch)]
            wanted = self.shares * self._counts.sum() / np.maximum(self._counts, 1)
            own = torch.from_numpy(wanted[domain]).to(batch.targets)
            weight = own if weight is None else weight * own
        return weight

    def _labels(self, batch: Batch) -> Tensor:
        """Judgements of the batch's pairs, 0 where there is none."""
        judged = zip(batch.pairs.query_ids, batch.pairs.document_ids, strict=True)
        grades = [float(max(0, self.collection.qrels.get(query, {}).get(document, 0))) for query, document in judged]
        return batch.grid(torch.tensor(grades, device=batch.mask.device))

    def _representation(self, batch: Batch) -> Tensor:
        """The term on the vectors of some of the batch's documents, encoded once more."""
        assert self.teacher is not None
        assert isinstance(self.student, BiScorer)
        rows = np.unique(batch.pairs.document_rows)
        generator = np.random.default_rng([self.seed, self.step])
        if len(rows) > _ROWS:
            rows = np.sort(generator.choice(rows, _ROWS, replace=False))
        texts = [batch.pairs.documents.texts[row] for row in rows]
        theirs = torch.from_numpy(self.teacher.encode(texts, "document")).to(batch.targets.device)
        mine = self.student.encode_rows(batch.pairs.documents, rows, "document")
        if self.representation in SAME_WIDTH:
            mine = self.student.projection(mine)  # type: ignore[operator]
        near = None
        if self.representation == "affinity-kl":
            unit = nn.functional.normalize(theirs, dim=-1)
            closeness = (unit @ unit.T).fill_diagonal_(-2)
            near = closeness.topk(min(_NEIGHBOURS, len(rows) - 1), dim=1).indices
        return representation_loss(self.representation, mine, theirs, alpha=self.alpha, neighbours=near)

    def _domains(self, training: Lists) -> tuple[Int[np.ndarray, " queries"], Float[np.ndarray, " domains"]]:
        """Domain of each query, and equal first shares; nothing without `--domains`."""
        name, parts = choice("--domains", self.policies.domains, DOMAINS)
        lengths = np.asarray([len(text.split()) for text in training.queries.texts])
        if not name:
            return np.zeros(len(lengths), dtype=np.int64), np.empty(0)
        edges = np.unique(np.quantile(lengths[training.query_rows], np.linspace(0, 1, round(parts) + 1)[1:-1]))
        return np.searchsorted(edges, lengths, side="right"), np.full(len(edges) + 1, 1 / (len(edges) + 1))

    def _weigh_domains(self) -> None:
        """DDK's shares from held-out lists: cross-entropy to the teacher, whose own is its entropy."""
        if not len(self.shares) or self.step % _EVERY or not len(self.held):
            return
        scores, mask = (torch.from_numpy(part) for part in grids(self.held, student_scores(self.student, self.held)))
        scores, teacher = self.scale * scores, torch.from_numpy(grids(self.held, self.held.targets)[0])
        closed = ~mask
        log_p = teacher.masked_fill(closed, -1e30).log_softmax(-1)
        log_q = scores.masked_fill(closed, -1e30).log_softmax(-1)
        p = log_p.exp()
        losses = [-(p * log.masked_fill(closed, 0)).sum(-1).numpy() for log in (log_q, log_p)]
        domain = self.domain_of[self.held.query_rows]
        rows = [np.flatnonzero(domain == number) for number in range(len(self.shares))]
        # a domain without a held-out list shows no lag of its own: it takes the mean of all
        means = [np.asarray([(loss[own] if len(own) else loss).mean() for own in rows]) for loss in losses]
        self.shares = acquisition.domain_weights(means[0], means[1], previous=self.shares if self.step else None)


def _query_rows(batch: Batch) -> Int[np.ndarray, " lists"]:
    """The query of each list of a batch."""
    lengths = batch.mask.sum(-1).cpu().numpy()
    return np.asarray(batch.pairs.query_rows[np.cumsum(lengths) - lengths])


def _vectors_of(teacher: Scorer) -> BiScorer:
    """The bi-encoder behind a teacher."""
    found = teacher.scorer if isinstance(teacher, CachedScorer) else teacher
    if not isinstance(found, BiScorer):
        raise UsageError(
            "--representation compares vectors; the teacher must be one bi-encoder: --teacher bi-encoder:MODEL."
        )
    return found


def _add_projection(student: BiScorer, teacher: BiScorer, seed: int) -> None:
    """A linear map from the student's vectors to the teacher's width, trained with the student."""
    mine, theirs = (int(scorer.model.get_embedding_dimension() or 0) for scorer in (student, teacher))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student.add_module("projection", nn.Linear(mine, theirs))
