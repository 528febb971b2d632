"""What a method is given and what it hands back: the shapes between `distill` and the methods.

A method is a function Lesson -> Teaching. The lesson holds the observed view of the task and nothing else of it, so
no method can read a hidden node, a hidden edge or a test label; the task as a whole is met again only when the
finished student is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from structkd.graph.config import DistillConfig
from structkd.graph.data.inputs import RAW, Inputs
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.losses import SoftTargets, low_frequency, soft_targets
from structkd.graph.models.networks import Mlp
from structkd.graph.models.teacher import Teacher
from structkd.graph.published import given

Logits = Float[Tensor, "nodes classes"]
Term = Callable[[Tensor, int], Tensor]
"(student's logits of every observed node, epoch) -> one loss"

Weights = Callable[[int], SparseMatrix]
"epoch -> weights [student nodes, teacher nodes] of an edge divergence"

InputClass = Literal["graph_free", "precomputed", "graph_at_inference"]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a method may read: the observed task, the teacher's logits on it, the resolved configuration, a seed.

    Attributes:
        teacher: the trained model itself, for methods that look inside it; None when only its logits are known.
        built: a student to teach in place of a new one (policies that change its outputs make it themselves).
    """

    seen: GraphTask
    logits: Logits | None
    config: DistillConfig
    seed: int
    teacher: Teacher | None = None
    built: Mlp | None = None

    def student(self, inputs: int | None = None) -> Mlp:
        """A new MLP of the configured depth and width, drawn from the seed."""
        if self.built is not None:
            return self.built
        width, config = self.seen.num_features if inputs is None else inputs, self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Mlp(width, given(config.hidden), self.seen.classes, given(config.layers), given(config.dropout))

    def generator(self, purpose: int) -> torch.Generator:
        """A random stream of its own for each purpose of a method."""
        return torch.Generator().manual_seed(self.seed * 1009 + purpose)

    @property
    def train_rows(self) -> Int[Tensor, " train"]:
        """Rows of the observed task whose labels may teach."""
        return torch.nonzero(self.seen.train).flatten()


@dataclass(frozen=True, eq=False)
class Teaching:
    """A student and its loss.

    Attributes:
        student: a torch module, x -> logits.
        loss_of: epoch -> loss, called in train mode.
        inputs: what the student reads of a task; its features, unless the method says otherwise.
        also: modules that are trained with it and then dropped.
        groups: parameter groups for the optimiser, None for one group of everything.
        target: what teaches, in words, where that is chosen.
        steps: optimiser steps per epoch; loss_of is called once for each.
        finish: what remains to be done with the weights of best validation.
        answers: distributions of all observed nodes. Where given, the best epoch is the one of lowest cross-entropy
            towards them on the validation nodes; otherwise that of the best metric on validation labels.
        comparable: probabilities -> the same as a rival without this method's class shares would give them.
    """

    student: nn.Module
    loss_of: Callable[[int], Tensor]
    inputs: Inputs = RAW
    also: nn.Module | None = None
    groups: Sequence[Mapping[str, Any]] | None = None
    target: str = "teacher"
    steps: int = 1
    finish: Callable[[], None] | None = None
    answers: Tensor | None = None
    comparable: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    Attributes:
        teach: prepares the teacher's side and the student.
        needs: what of the teacher it reads: nothing, its logits, or the trained model itself.
        input_class: what its student reads at inference.
        chosen: its target is picked on validation.
        rivals: methods whose student takes the place of its own where validation clearly prefers that.
    """

    teach: Callable[[Lesson], Teaching]
    needs: Literal["nothing", "logits", "model"] = "logits"
    input_class: InputClass = "graph_free"
    chosen: bool = False
    rivals: tuple[str, ...] = ()


def taught_by(
    lesson: Lesson,
    student: nn.Module,
    x: Features,
    terms: Sequence[Term],
    label_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Callable[[int], Tensor]:
    """epoch -> lambda CE(labels) + (1 - lambda) sum of the teacher's terms, all from one pass over all nodes."""
    rows = lesson.train_rows
    labels, weight = lesson.seen.y[rows], given(lesson.config.label_weight)

    def loss_of(epoch: int) -> Tensor:
        out = student(x)
        loss = (1 - weight) * torch.stack([term(out, epoch) for term in terms]).sum()
        return loss + weight * label_loss(out[rows], labels) if weight else loss

    return loss_of


def in_turn(turns_of: Callable[[], Sequence[Callable[[], Tensor]]]) -> Callable[[int], Tensor]:
    """The loss of one turn after the other; when all have been, the next epoch's."""
    left: list[Callable[[], Tensor]] = []

    def loss_of(_: int) -> Tensor:
        if not left:
            left.extend(reversed(turns_of()))
        return left.pop()()

    return loss_of


def edge_divergence(logits: Logits, weights: Weights, temperature: float = 1.0) -> Term:
    """sum_ij w_ij KL(t_j || s_i) with the weights of each epoch; targets are made anew only when those change."""
    kept: list[Any] = [None, None]

    def targets(epoch: int) -> SoftTargets:
        matrix = weights(epoch)
        if kept[0] is not matrix:
            kept[:] = matrix, soft_targets(logits, matrix, temperature)
        found: SoftTargets = kept[1]
        return found

    return towards(targets)


def towards(targets: Callable[[int], SoftTargets]) -> Term:
    """Divergence to the pre-aggregated targets of each epoch."""
    return lambda out, epoch: low_frequency(out, targets(epoch))


@torch.no_grad()
def answers(student: nn.Module, x: Features) -> Logits:
    """The student's logits in eval mode; its mode is left as it was."""
    training = student.training
    student.eval()
    out: Tensor = student(x)
    student.train(training)
    return out
