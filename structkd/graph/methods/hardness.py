"""HGMD: hard nodes learn from more of their neighbourhood, by draws of edges and by mixing or weighing targets.

Wu et al., "Teach Harder, Learn Poorer: Rethinking Hard Sample Distillation for GNN-to-MLP Knowledge Distillation",
CIKM 2024. Both forms are the weighted edge divergence: mixing (1 - w) t_i + w t_j has the gradient of weights 1 - w on
the node itself and w on its neighbour, and only the constant differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from structkd.graph.data.sparse import SparseMatrix, row_starts
from structkd.graph.losses import SoftTargets, soft_targets
from structkd.graph.methods.lesson import Lesson, Teaching, answers, taught_by, towards
from structkd.graph.methods.reliability import entropy
from structkd.graph.published import given

EPOCHS = 500
"The span over which the sharpness falls to a hundredth, whatever --epochs is."


@dataclass(frozen=True, eq=False)
class Draw:
    """The edges of one epoch, student end first, self-loops last, with their probabilities."""

    edges: Int[Tensor, "2 drawn"]
    probability: Float[Tensor, " drawn"]


def mixed_neighbours(lesson: Lesson) -> Teaching:
    """Mean over drawn edges and self-loops of KL_tau((1 - w) t_i + w t_j || s_i), w = p_ij Beta(beta, beta)."""
    random = np.random.default_rng([lesson.seed, 3])
    beta, temperature = lesson.config.option("beta"), given(lesson.config.temperature)

    def targets(drawn: Draw) -> SoftTargets:
        share = drawn.probability * torch.from_numpy(random.beta(beta, beta, len(drawn.probability))).to(torch.float32)
        return mixture_targets(given(lesson.logits), drawn.edges, share, temperature)

    return _teach(lesson, targets)


def weighted_neighbours(lesson: Lesson) -> Teaching:
    """Mean over drawn edges and self-loops of w_ij KL_tau(t_j || s_i), w_ij = d_i c_ij / sum_j c_ij, c = p cos."""
    logits, temperature = given(lesson.logits), given(lesson.config.temperature)

    def targets(drawn: Draw) -> SoftTargets:
        weights = similarity_weights(logits, drawn) / len(drawn.probability)
        return soft_targets(logits, matrix_of(drawn.edges, weights, len(logits)), temperature)

    return _teach(lesson, targets)


def _teach(lesson: Lesson, targets: Callable[[Draw], SoftTargets]) -> Teaching:
    student, x = lesson.student(), lesson.seen.x
    draws = edge_draws(lesson, lambda: answers(student, x))
    term = towards(lambda epoch: targets(draws(epoch)))
    return Teaching(student, taught_by(lesson, student, x, [term]))


def edge_probability(
    teacher: Float[Tensor, "nodes classes"],
    student: Float[Tensor, "nodes classes"],
    edges: Int[Tensor, "2 edges"],
    sharpness: float,
) -> Float[Tensor, " edges"]:
    """1 - exp(-a cos(t_i, t_j) sqrt(H(t_i) H(s_i)) / H(t_j)), entropies over their maxima (eq. 5, 6)."""
    soft = teacher.softmax(dim=1)
    certain, mine = (_scaled_entropy(logits) for logits in (teacher, student))
    likeness = cosine_similarity(soft[edges[0]], soft[edges[1]], dim=1)
    exponent = likeness * torch.sqrt(certain[edges[0]] * mine[edges[0]]) / certain[edges[1]]
    return 1 - torch.exp(-sharpness * exponent)


def edge_draws(lesson: Lesson, answer: Callable[[], Tensor]) -> Callable[[int], Draw]:
    """epoch -> its edges: all of them first, then draws by `edge_probability` with a sharpness falling 100-fold."""
    seen, logits = lesson.seen, given(lesson.logits)
    loops = torch.arange(seen.num_nodes).expand(2, -1)
    start, generator = lesson.config.option("sharpness"), lesson.generator(4)

    def draw(epoch: int) -> Draw:
        if epoch == 1:
            edges = torch.cat([seen.edge_index, loops], dim=1)
            return Draw(edges, torch.ones(edges.shape[1]))
        sharpness = start / 100 ** ((epoch - 1) / (EPOCHS - 1))
        probability = edge_probability(logits, answer(), seen.edge_index, sharpness)
        kept = torch.bernoulli(probability.clamp(0, 1), generator=generator) > 0
        edges = torch.cat([seen.edge_index[:, kept], loops], dim=1)
        return Draw(edges, torch.cat([probability[kept], torch.ones(seen.num_nodes)]))

    return draw


def mixture_targets(
    teacher: Float[Tensor, "nodes classes"],
    edges: Int[Tensor, "2 edges"],
    share: Float[Tensor, " edges"],
    temperature: float,
) -> SoftTargets:
    """Mean over edges of KL((1 - w) t_i + w t_j || s_i) in its node form."""
    both = torch.cat([edges, edges[:1].expand(2, -1)], dim=1)
    weights = torch.cat([share, 1 - share]) / len(share)
    targets = soft_targets(teacher, matrix_of(both, weights, len(teacher)), temperature)
    soft = (teacher / temperature).softmax(dim=1)
    mixture = (1 - share)[:, None] * soft[edges[0]] + share[:, None] * soft[edges[1]]
    return replace(targets, constant=float(torch.special.xlogy(mixture, mixture).sum()) / len(share))


def similarity_weights(teacher: Float[Tensor, "nodes classes"], drawn: Draw) -> Float[Tensor, " drawn"]:
    """d_i c_ij / sum_j c_ij over the drawn edges of node i, c_ij = p_ij cos(t_i, t_j), d_i their number."""
    soft, rows = teacher.softmax(dim=1), drawn.edges[0]
    likeness = cosine_similarity(soft[rows], soft[drawn.edges[1]], dim=1) * drawn.probability
    sums = torch.zeros(len(teacher), dtype=likeness.dtype).index_add_(0, rows, likeness)
    return torch.bincount(rows, minlength=len(teacher))[rows] * likeness / sums[rows]


def matrix_of(edges: Int[Tensor, "2 entries"], weights: Float[Tensor, " entries"], nodes: int) -> SparseMatrix:
    """[nodes, nodes] with those entries; repeated ones are added."""
    keys, places = torch.unique(edges[0] * nodes + edges[1], return_inverse=True)
    values = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, places, weights.to(torch.float64))
    starts = row_starts(torch.bincount(keys // nodes, minlength=nodes))
    return SparseMatrix(starts, keys % nodes, values, nodes)


def _scaled_entropy(logits: Float[Tensor, "nodes classes"]) -> Float[Tensor, " nodes"]:
    found = entropy(logits)
    found = found / found.max()
    return torch.where(found == 0, torch.full_like(found, 1e-8), found)
