"""EXPERIMENTAL. A learned share per row: how far to follow the teacher, how far the label (TGeo-KD).

TGeo-KD (arXiv 2312.15112): a small network reads how student S, teacher T, label G and the teacher's class mean Tb lie
to each other and gives the share a_i of

    L = mean_i [ a_i tau^2 KL_i + (1 - a_i) CE_i ]                                             (`fused_loss`)

It learns from held-out labels, through one step of the student: theta' = theta - eta grad L(theta), and

    dL_valid(theta') / da_i = -(eta / n) < grad L_valid(theta'), tau^2 grad KL_i - grad CE_i >   (`ratio_gradient`)

The authors' code computes a_i without gradients, so its network never learns, and feeds probabilities into the
cross-entropy; neither is repeated here. Two baselines to beat first: a constant share, and a_i = 1 where the teacher is
right. An update costs some 2.5 plain steps of the student on top (two-layer MLP, 1,800 rows). For node or row
classification; lists of varying length have no fixed features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from structkd.errors import UsageError
from structkd.objectives.listwise import kl

Scores = Float[Tensor, "rows classes"]
Labels = Int[Tensor, " rows"]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows with labels, and the teacher's scores where they are trained on."""

    x: Tensor
    labels: Labels
    teacher: Scores | None = None


def class_means(teacher: Scores, labels: Labels, num_classes: int) -> Float[Tensor, "classes classes"]:
    """Mean teacher probabilities of the training rows of each class (Tb); uniform for a class without rows.

    Raises:
        UsageError: not one label per row.
    """
    _check_labels(teacher, labels)
    p = teacher.detach().softmax(-1)
    member = one_hot(labels, num_classes).to(p.dtype)
    count = member.sum(0)[:, None]
    return torch.where(count > 0, member.T @ p / count.clamp(min=1), 1 / p.shape[1])


def geometry(
    student: Scores, teacher: Scores, labels: Labels, means: Float[Tensor, "classes classes"]
) -> Float[Tensor, "rows features"]:
    """[S, T, G, Tb, (Tb-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (Tb-G)^2], probabilities of 9 x classes numbers, detached.

    Raises:
        UsageError: student and teacher differ in shape, or not one label per row.
    """
    _check_labels(teacher, labels)
    if student.shape != teacher.shape:
        raise UsageError(f"student has shape {list(student.shape)}, teacher {list(teacher.shape)}; expected the same.")
    s, t = student.detach().softmax(-1), teacher.detach().softmax(-1)
    g, mean = one_hot(labels, s.shape[1]).to(s.dtype), means.to(s.dtype)[labels]
    edges = [(mean, s), (g, s), (t, s), (t, g), (mean, g)]
    return torch.cat([s, t, g, mean, *[(a - b).square() for a, b in edges]], dim=-1)


class FusionRatio(nn.Module):
    """The network of the paper: 9 x classes -> 32 -> 16 -> 1, LeakyReLU, sigmoid."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9 * num_classes, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        )

    def forward(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
        """The share of the teacher, in (0, 1), for rows of `geometry`."""
        return torch.sigmoid(self.layers(features)[:, 0])


def fused_loss(
    student: Scores, teacher: Scores, labels: Labels, ratios: Float[Tensor, " rows"], *, temperature: float = 1.5
) -> Float[Tensor, ""]:
    """mean_i [a_i tau^2 KL_i + (1 - a_i) CE_i]; gradients reach the student and, where they have some, the ratios.

    Raises:
        UsageError: not one label and one ratio per row.
    """
    _check_labels(student, labels)
    if ratios.shape != labels.shape:
        raise UsageError(f"{len(ratios)} ratios for {len(labels)} rows; expected one each.")
    soft = kl(student, teacher, temperature=temperature, rescale=True, reduction="none")
    return (ratios * soft + (1 - ratios) * cross_entropy(student, labels, reduction="none")).mean()


def ratio_gradient(
    student: nn.Module,
    train: Labelled,
    valid: Labelled,
    ratios: Float[Tensor, " rows"],
    *,
    learning_rate: float,
    temperature: float = 1.5,
) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
    """(L_valid after one plain gradient step of the student, its exact derivative by each ratio).

    The student itself is left as it is, buffers included. Continue into the network that made the ratios with
    `ratios.backward(gradient)`. Noise that the two passes draw (dropout) does not repeat: switch it off, or accept a
    noisy derivative.

    Raises:
        UsageError: the training rows come without teacher scores; as `fused_loss`.
    """
    if train.teacher is None:
        raise UsageError("ratio_gradient needs the teacher's scores of the training rows; train.teacher is None.")
    parameters = {name: value.detach().requires_grad_() for name, value in student.named_parameters()}
    free = ratios.detach().requires_grad_()
    loss = fused_loss(_call(student, parameters, train.x), train.teacher, train.labels, free, temperature=temperature)
    slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
    moved = {
        name: value.detach() - learning_rate * slope
        for (name, value), slope in zip(parameters.items(), slopes, strict=True)
    }
    valid_loss = cross_entropy(_call(student, moved, valid.x), valid.labels)
    (gradient,) = torch.autograd.grad(valid_loss, free)
    return valid_loss.detach(), gradient


def learn_ratios(
    network: FusionRatio,
    optimizer: torch.optim.Optimizer,
    student: nn.Module,
    train: Labelled,
    valid: Labelled,
    means: Float[Tensor, "classes classes"],
    *,
    learning_rate: float,
    temperature: float = 1.5,
) -> tuple[Float[Tensor, ""], Float[Tensor, " rows"]]:
    """One update of the network: (L_valid it was judged by, the new ratios of the training rows, detached).

    Train the student on `fused_loss` with them. The paper's optimizer: Adam, learning rate 0.1, weight decay 0.05.

    Raises:
        UsageError: as `ratio_gradient`.
    """
    if train.teacher is None:
        raise UsageError("learn_ratios needs the teacher's scores of the training rows; train.teacher is None.")
    with torch.no_grad():
        buffers = {name: value.clone() for name, value in student.named_buffers()}
        features = geometry(functional_call(student, buffers, (train.x,)), train.teacher, train.labels, means)
    ratios = network(features)
    value, gradient = ratio_gradient(
        student, train, valid, ratios, learning_rate=learning_rate, temperature=temperature
    )
    optimizer.zero_grad()
    ratios.backward(gradient)
    optimizer.step()
    return value, network(features).detach()


def _call(student: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """The student with other parameters, on copies of its buffers (batch norm would count the step otherwise)."""
    buffers = {name: value.clone() for name, value in student.named_buffers()}
    out: Tensor = functional_call(student, {**parameters, **buffers}, (x,))
    return out


def _check_labels(scores: Tensor, labels: Tensor) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise UsageError(f"{len(labels)} labels for scores {list(scores.shape)}; expected one per row.")
