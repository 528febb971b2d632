"""AdaGMLP: several small MLPs, each told by the ones before which nodes they still get wrong.

Lu et al., "AdaGMLP: AdaBoosting GNN-to-MLP Knowledge Distillation", KDD 2024.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features, rows_of
from structkd.graph.losses import low_frequency, soft_targets
from structkd.graph.methods.lesson import Lesson, Teaching
from structkd.graph.models.networks import Mlp
from structkd.graph.models.students import Ensemble, activations
from structkd.graph.published import given


def boosted_members(lesson: Lesson) -> Teaching:
    """Each member: lambda CE on its share of the labels + (1 - lambda) sum_i w_i KL_tau(t_i || s_i) + alignment.

    After each member the weights of nodes that it gets wrong grow, and its own share in the vote is set; the mean
    over members is the loss. Alignment ties outputs and hidden activations to those of features with entries zeroed.
    """
    seen, option, config = lesson.seen, lesson.config.option, lesson.config
    student, logits = Ensemble(_members(lesson, int(option("members")))), given(lesson.logits)
    rows, generator = lesson.train_rows, lesson.generator(5)
    label_weight, temperature = given(config.label_weight), given(config.temperature)
    missing, outputs = option("missing"), option("align_outputs")
    weights = torch.full((seen.num_nodes,), 1.0 / seen.num_nodes)

    def loss_of(_: int) -> Tensor:
        nonlocal weights
        count = len(student.members)
        size, order = max(1, len(rows) // count), torch.randperm(len(rows), generator=generator)
        losses, votes = [], []
        for number, member in enumerate(student.members):
            assert isinstance(member, Mlp)
            mine = rows[order[number * size : (number + 1) * size]]
            found, read = activations(member, seen.x)
            taught = low_frequency(found[-1], soft_targets(logits, diagonal(weights), temperature))
            loss = (1 - label_weight) * taught + label_weight * cross_entropy(found[-1][mine], seen.y[mine])
            if missing > 0:
                masked = with_missing(rows_of(seen.x, mine), missing, generator)
                loss = loss + alignment(
                    member, found[-1][mine], [part[mine] for part in _dense(read[1:])], masked, outputs
                )
            losses.append(loss)
            weights, vote = reweighted(weights, found[-1].detach(), logits, option("beta"))
            votes.append(vote)
        student.shares.copy_(torch.stack(votes) / torch.stack(votes).sum())
        return torch.stack(losses).mean()

    return Teaching(student, loss_of)


def reweighted(
    weights: Float[Tensor, " nodes"],
    student: Float[Tensor, "nodes classes"],
    teacher: Float[Tensor, "nodes classes"],
    beta: float,
) -> tuple[Float[Tensor, " nodes"], Float[Tensor, ""]]:
    """(next node weights, this member's vote): e_i = 1 - exp(-beta KL_i), err = sum w_i e_i / sum w_i,
    vote = max(log((1 - err) / err), 1e-16), w_i <- w_i exp(vote e_i) over their sum (eq. 5 to 8)."""
    log_teacher = teacher.log_softmax(dim=1)
    divergence = (log_teacher.exp() * (log_teacher - student.log_softmax(dim=1))).sum(dim=1)
    errors = 1 - torch.exp(-beta * divergence)
    error = (weights * errors).sum() / weights.sum() + 1e-16
    vote = torch.log((1 - error) / error + 1e-16).clamp_min(1e-16)
    grown = weights * torch.exp(vote * errors)
    return grown / grown.sum(), vote


def alignment(
    member: Mlp, logits: Float[Tensor, "rows classes"], hidden: list[Tensor], masked: Features, outputs: float
) -> Float[Tensor, ""]:
    """outputs MSE(log s, log s') + (1 - outputs) mean over layers of MSE(h, h'), ' from features with gaps."""
    found, read = activations(member, masked)
    loss = outputs * mse_loss(logits.log_softmax(dim=1), found[-1].log_softmax(dim=1))
    for mine, theirs in zip(hidden, _dense(read[1:]), strict=True):
        loss = loss + (1 - outputs) / len(hidden) * mse_loss(mine, theirs)
    return loss


def with_missing(x: Features, share: float, generator: torch.Generator) -> Features:
    """The same with every entry zeroed by chance `share`."""
    if isinstance(x, SparseMatrix):
        return x.with_values(x.values * (torch.rand(x.values.shape, generator=generator) >= share))
    return x * (torch.rand(x.shape, generator=generator) >= share)


def diagonal(weights: Float[Tensor, " nodes"]) -> SparseMatrix:
    """Every student node looks at its own teacher row, with its weight."""
    nodes = len(weights)
    return SparseMatrix(torch.arange(nodes + 1), torch.arange(nodes), weights.to(torch.float64), nodes)


def _members(lesson: Lesson, count: int) -> list[Mlp]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lesson.seed)
        config, seen = lesson.config, lesson.seen
        return [
            Mlp(seen.num_features, given(config.hidden), seen.classes, given(config.layers), given(config.dropout))
            for _ in range(count)
        ]


def _dense(parts: list[Features]) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]
