"""FF-G2M and its parts in mini-batches of nodes and edges: unbiased steps whose memory does not grow with the graph.

A step reads the feature rows and target rows of its batch and nothing else. With T = W t computed once in blocks,

    low, batch B of nodes:   constant + N/|B| sum over B of -<T_i, log s_i>
    high, batch M of edges:  mean over M of KL(softmax|h_i - h_j|/tau || softmax|z_i - z_j|/tau)
    labels, batch R:         mean over R of -log s_i[y_i]

each has the full loss as its mean over draws: B and R are uniform without replacement, M is uniform with replacement.
Features, logits and targets may be memory-mapped.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from structkd.errors import UsageError
from structkd.graph.data.task import GraphTask, chunks, rows_of
from structkd.graph.losses import SoftTargets
from structkd.graph.methods.lesson import Lesson, Teaching
from structkd.graph.published import given
from structkd.graph.spectral import propagated

Logits = Float[Tensor, "nodes classes"]

BLOCK = 1 << 16
"Rows that are prepared or answered at once."


@dataclass(frozen=True)
class Parts:
    """Which terms of the loss a method has."""

    low: str = ""
    "own: the node's own teacher row; neighbours: those of its neighbours too; empty: none."

    high: bool = False


BATCHED: dict[str, Parts] = {
    "glnn": Parts("own"),
    "lfd": Parts("neighbours"),
    "hfd": Parts(high=True),
    "ff-g2m": Parts("neighbours", high=True),
}
"Methods that can be taught in mini-batches."


def teach_in_batches(lesson: Lesson) -> Teaching:
    """The method of a lesson with one optimiser step per batch of nodes.

    Raises:
        UsageError: a method that needs the whole graph in every step.
    """
    config = lesson.config
    if config.method not in BATCHED:
        raise UsageError(
            f"method {config.method} has no mini-batch form; expected one of {', '.join(BATCHED)} "
            "with batch_nodes, or batch_nodes 0."
        )
    parts, logits = BATCHED[config.method], given(lesson.logits)
    low = streamed_targets(lesson.seen, logits, neighbours=parts.low == "neighbours") if parts.low else None
    student = lesson.student()
    batches = Batches(lesson, student, low, logits if parts.high else None)
    return Teaching(student, batches, steps=batches.steps)


def streamed_targets(
    seen: GraphTask, teacher_logits: Logits, neighbours: bool = True, out: Logits | None = None
) -> SoftTargets:
    """`losses.soft_targets` with W = (A + I)/|E+| or I/N, in blocks and without the matrix.

    Args:
        out: where the targets go; a memory-mapped tensor keeps them out of memory.
    """
    nodes = seen.num_nodes
    entries = nodes + (seen.edge_index.shape[1] if neighbours else 0)
    probabilities = torch.empty(nodes, seen.classes, dtype=teacher_logits.dtype) if neighbours or out is None else out
    constant = 0.0
    for rows in chunks(nodes, BLOCK):
        log_teacher = log_softmax(teacher_logits[rows], dim=1)
        torch.exp(log_teacher, out=probabilities[rows])
        weights = seen.degrees[rows] + 1 if neighbours else torch.ones(len(log_teacher))
        constant += float((weights * (probabilities[rows] * log_teacher).sum(dim=1)).to(torch.float64).sum())
    summed = propagated(seen, probabilities, 1.0, "none", out) if neighbours else probabilities
    for rows in chunks(nodes, BLOCK):
        summed[rows] /= entries
    return SoftTargets(summed, constant / entries)


def low_of_batch(
    student_logits: Float[Tensor, "batch classes"], rows: Int[Tensor, " batch"], targets: SoftTargets
) -> Float[Tensor, ""]:
    """Unbiased estimate of `losses.low_frequency` from the logits of a uniform batch of nodes."""
    share = len(targets.aggregated) / len(rows)
    return targets.constant - share * (targets.aggregated[rows] * log_softmax(student_logits, dim=1)).sum()


def high_of_batch(
    student: tuple[Float[Tensor, "edges classes"], Float[Tensor, "edges classes"]],
    teacher: tuple[Float[Tensor, "edges classes"], Float[Tensor, "edges classes"]],
    temperature: float,
) -> Float[Tensor, ""]:
    """Unbiased estimate of `losses.high_frequency` from the logits at both ends of uniformly drawn edges."""
    log_teacher = log_softmax((teacher[0] - teacher[1]).abs() / temperature, dim=1)
    log_student = log_softmax((student[0] - student[1]).abs() / temperature, dim=1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean()


class Batches:
    """step -> loss: every node once per epoch, in a new order; each batch is a uniform draw.

    All draws come from (seed, epoch). Node batches differ by one in size at most, so none weighs more than another.
    """

    def __init__(self, lesson: Lesson, student: nn.Module, low: SoftTargets | None, high: Logits | None) -> None:
        config = lesson.config
        if config.batch_nodes < 1 or config.batch_edges < 0:
            raise UsageError(
                f"batch_nodes {config.batch_nodes}, batch_edges {config.batch_edges}: expected 1 or more nodes, and "
                "edges 0 or more."
            )
        self.seen, self.student, self.low, self.high = lesson.seen, student, low, high
        self.seed, self.size = lesson.seed, min(config.batch_nodes, lesson.seen.num_nodes)
        self.edges = config.batch_edges or self.size
        self.weight, self.temperature = given(config.label_weight), given(config.temperature)
        self.train = lesson.train_rows
        self.steps = -(-lesson.seen.num_nodes // self.size)
        self._epoch, self._parts, self._generator = 0, [np.empty(0, dtype=np.int64)], np.random.default_rng(0)

    def __call__(self, epoch: int) -> Tensor:
        """The loss of the next batch of this epoch."""
        if epoch != self._epoch or not self._parts:
            self._epoch, self._generator = epoch, np.random.default_rng([self.seed, epoch])
            order = self._generator.permutation(self.seen.num_nodes)
            self._parts = np.array_split(order, self.steps)[::-1]
        return self.loss(torch.from_numpy(self._parts.pop()), *self._drawn())

    def loss(self, nodes: Tensor, labelled: Tensor, edges: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of given rows: one forward pass over nodes, labelled nodes and ends of edges."""
        wanted = [nodes if self.low is not None else nodes[:0], labelled, *edges]
        rows, place = torch.unique(torch.cat(wanted), return_inverse=True)
        out = self.student(rows_of(self.seen.x, rows))
        mine, of_labels, left, right = (out[part] for part in place.split([len(part) for part in wanted]))
        terms = []
        if self.low is not None:
            terms.append(low_of_batch(mine, nodes, self.low))
        if self.high is not None and len(edges[0]):
            teacher = self.high[edges[0]], self.high[edges[1]]
            terms.append(high_of_batch((left, right), teacher, self.temperature))
        loss = (1 - self.weight) * torch.stack(terms).sum() if terms else out.sum() * 0
        return loss + self.weight * cross_entropy(of_labels, self.seen.y[labelled]) if self.weight else loss

    def _drawn(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Labelled rows and edges of one step."""
        count = min(self.size, len(self.train)) if self.weight else 0
        chosen = self._generator.permutation(len(self.train))[:count]
        empty = torch.empty(0, dtype=torch.int64)
        edges = (empty, empty)
        if self.high is not None and self.seen.edge_index.shape[1]:
            drawn = torch.from_numpy(self._generator.integers(self.seen.edge_index.shape[1], size=self.edges))
            edges = (self.seen.edge_index[0, drawn], self.seen.edge_index[1, drawn])
        return self.train[chosen], edges
