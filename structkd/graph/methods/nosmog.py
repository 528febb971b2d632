"""NOSMOG: positions beside the features, likenesses between nodes kept, and noise that the student must withstand.

Tian et al., "Learning MLPs on Graphs: A Unified View of Effectiveness, Robustness, and Efficiency", ICLR 2023.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, rows_of
from structkd.graph.losses import node_divergence
from structkd.graph.methods.lesson import Lesson, Teaching, in_turn
from structkd.graph.methods.positions import Positioned, deep_walk
from structkd.graph.models.networks import Linear, relu_dropout
from structkd.graph.models.stages import hidden_layer
from structkd.graph.models.students import activations
from structkd.graph.published import given

BATCH = 512
"Nodes per optimiser step, the published batch."

NOISED = 128
"Nodes of a batch that noise is searched for: five passes over dense features are most of the cost of a step."

STEPS = 5
"Steps of the search for the worst noise, each a quarter of its bound."


def positioned_nodes(lesson: Lesson) -> Teaching:
    """lambda CE, and (1 - lambda) (mean KL(t_i || s_i) + likeness mean (G_t G_t^T - G_s G_s^T)^2 + .1 KL under worst
    noise), in turn, on features with positions.

    An epoch is a step on the labels and one on each batch of nodes, in another order each time, as released: the
    likenesses start a thousand times larger than the rest, and one step an epoch ends before they have come down
    (two of five seeds at .45 on CiteSeer).
    """
    seen, option, config = lesson.seen, lesson.config.option, lesson.config
    inputs = Positioned(deep_walk(
        seen, walks=int(option("walks")), length=int(option("length")), window=int(option("window")),
        epochs=int(option("passes")), width=int(option("width")), seed=lesson.seed,
    ))  # fmt: skip
    x, soft = inputs.seen(seen), given(lesson.logits).softmax(dim=1)
    student, hidden = lesson.student(x.shape[1]), hidden_layer(given(lesson.teacher), seen)
    encoder = _encoder(lesson)
    rows, generator, label_weight = lesson.train_rows, lesson.generator(6), given(config.label_weight)
    labelled, labels = rows_of(x, rows), seen.y[rows]
    bound, noise_weight, likeness_weight = option("bound"), option("noise"), option("likeness")
    batches = max(1, seen.num_nodes // BATCH)

    def turns() -> list[Callable[[], Tensor]]:
        order = torch.randperm(seen.num_nodes, generator=generator)
        parts = order[: batches * BATCH].tensor_split(batches)
        labels_turn = [lambda: label_weight * cross_entropy(student(labelled), labels)] if label_weight else []
        return [*labels_turn, *(partial(taught, part) for part in reversed(parts))]

    def taught(batch: Tensor) -> Tensor:
        outputs, _ = activations(student, rows_of(x, batch))
        mine = relu_dropout(encoder(outputs[-2]), student.dropout, student.training)
        loss = node_divergence(outputs[-1], soft[batch]) + likeness_weight * likeness_gap(mine, hidden[batch])
        few = batch[:NOISED]
        here, wanted = _dense(rows_of(x, few)), soft[few]
        noise = worst_noise(lambda part: node_divergence(student(part), wanted), here, bound, generator)
        return (1 - label_weight) * (loss + noise_weight * node_divergence(student(here + noise), wanted))

    return Teaching(student, in_turn(turns), inputs, also=encoder, steps=batches + bool(label_weight))


def likeness_gap(student: Float[Tensor, "rows width"], teacher: Float[Tensor, "rows other"]) -> Float[Tensor, ""]:
    """Mean over pairs of nodes of (<g_i, g_j> of the teacher - that of the student)^2."""
    return (teacher @ teacher.T - student @ student.T).square().mean()


def worst_noise(
    loss: Callable[[Tensor], Tensor], x: Float[Tensor, "rows width"], bound: float, generator: torch.Generator
) -> Float[Tensor, "rows width"]:
    """Noise within +-bound that raises the loss: from a uniform start, steps of bound/4 along the gradient's sign."""
    noise = (torch.rand(x.shape, generator=generator) * 2 - 1) * bound
    for _ in range(STEPS):
        noise.requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(x + noise), [noise])
        noise = (noise.detach() + bound / 4 * slope.sign()).clamp(-bound, bound)
    return noise


def _encoder(lesson: Lesson) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed + 7)
        return Linear(given(lesson.config.hidden), given(lesson.config.hidden))


def _dense(x: Features) -> Tensor:
    return x.dense() if isinstance(x, SparseMatrix) else x
