"""METHODS: every way to teach a student, one row each. A row is a small function from a lesson to a student's loss.

Weighted edge divergences sum_ij w_ij KL(t_j || s_i) all go through `edge_divergence`; they differ in their weights.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask, rows_of
from structkd.graph.losses import difference_targets, high_frequency, neighbour_weights, node_weights
from structkd.graph.methods.boosting import boosted_members
from structkd.graph.methods.dirichlet import injected_steps
from structkd.graph.methods.hardness import mixed_neighbours, weighted_neighbours
from structkd.graph.methods.influence import influential_nodes
from structkd.graph.methods.lesson import Lesson, Method, Teaching, Term, edge_divergence, taught_by
from structkd.graph.methods.moments import matched_neighbourhoods
from structkd.graph.methods.nosmog import positioned_nodes
from structkd.graph.methods.reliability import reliable_neighbours
from structkd.graph.models.networks import Mlp
from structkd.graph.published import given
from structkd.graph.targets.committee import clamped
from structkd.graph.targets.estimate import choose_target
from structkd.graph.targets.shares import with_even_shares
from structkd.graph.targets.views import shuffled, steps_of


def labels_alone(lesson: Lesson) -> Teaching:
    """Cross-entropy on training labels; no other row is touched."""
    student, rows = lesson.student(), lesson.train_rows
    x, labels = rows_of(lesson.seen.x, rows), lesson.seen.y[rows]
    return Teaching(student, lambda _: cross_entropy(student(x), labels))


def own_node(lesson: Lesson) -> Teaching:
    """Mean over nodes of KL(t_i || s_i) (GLNN; Zhang et al., ICLR 2022, eq. 1)."""
    return _taught(lesson, _low(lesson, node_weights))


def neighbours(lesson: Lesson) -> Teaching:
    """Mean over edges and nodes of KL(t_j || s_i) (LFD; Wu et al., AAAI 2023, eq. 8)."""
    return _taught(lesson, _low(lesson, neighbour_weights))


def differences(lesson: Lesson) -> Teaching:
    """Mean over edges of KL(softmax|h_i - h_j|/tau || softmax|z_i - z_j|/tau) (HFD; Wu et al., eq. 10)."""
    return _taught(lesson, _high(lesson))


def both_bands(lesson: Lesson) -> Teaching:
    """LFD + HFD (FF-G2M; Wu et al., AAAI 2023, eq. 11)."""
    return _taught(lesson, _low(lesson, neighbour_weights), _high(lesson))


def chosen_target(lesson: Lesson) -> Teaching:
    """GLNN's term towards the target that validation chose, training labels put in (see `targets`).

    The best epoch is the one that is closest to the target on validation nodes: the target has used their labels, and
    the student's own accuracy on a few hundred of them peaks by luck long before it has learnt what it is taught.
    With dense features a step takes a batch of nodes, since its cost is theirs.
    """
    best = choose_target(lesson.seen, given(lesson.logits), lesson.seed, high_band=lesson.config.option("high_band"))
    answers, student = clamped(lesson.seen, best.probabilities), lesson.student()
    if isinstance(lesson.seen.x, SparseMatrix):
        weights, wanted, steps = node_weights(lesson.seen), answers.clamp_min(1e-12).log(), 1
        loss_of = taught_by(lesson, student, lesson.seen.x, [edge_divergence(wanted, lambda _: weights)])
    else:
        loss_of, steps = _in_batches(lesson, student, lesson.seen.x, answers)
    even = partial(with_even_shares, lesson.seen)
    return Teaching(student, loss_of, target=best.name, answers=answers, steps=steps, comparable=even)


def _in_batches(lesson: Lesson, student: Mlp, x: Tensor, answers: Tensor) -> tuple[Callable[[int], Tensor], int]:
    """lambda CE(labels) + (1 - lambda) CE(answers) over random batches, and how many of them make an epoch."""
    nodes, rows, weight = lesson.seen.num_nodes, lesson.train_rows, given(lesson.config.label_weight)
    order, labels = shuffled(nodes, lesson.generator(5)), lesson.seen.y[rows]

    def loss_of(_: int) -> Tensor:
        batch = next(order)
        loss = (1 - weight) * cross_entropy(student(x[batch]), answers[batch])
        return loss + weight * cross_entropy(student(x[rows]), labels) if weight else loss

    return loss_of, steps_of(nodes)


def _taught(lesson: Lesson, *terms: Term) -> Teaching:
    student = lesson.student()
    return Teaching(student, taught_by(lesson, student, lesson.seen.x, terms))


def _low(lesson: Lesson, weights_of: Callable[[GraphTask], SparseMatrix]) -> Term:
    weights = weights_of(lesson.seen)
    return edge_divergence(given(lesson.logits), lambda _: weights)


def _high(lesson: Lesson) -> Term:
    targets = difference_targets(given(lesson.logits), lesson.seen.edge_index, given(lesson.config.temperature))

    def term(out: Tensor, _: int) -> Tensor:
        return high_frequency(out, targets)

    return term


METHODS: dict[str, Method] = {
    "mlp": Method(labels_alone, needs="nothing"),
    "glnn": Method(own_node),
    "lfd": Method(neighbours),
    "hfd": Method(differences),
    "ff-g2m": Method(both_bands),
    "krd": Method(reliable_neighbours, needs="model"),
    "hgmd": Method(mixed_neighbours),
    "hgmd-weight": Method(weighted_neighbours),
    "nosmog": Method(positioned_nodes, needs="model", input_class="graph_at_inference"),
    "infgrand": Method(influential_nodes, input_class="precomputed"),
    "tined": Method(injected_steps, needs="model"),
    "g2mlp": Method(matched_neighbourhoods, needs="model"),
    "adagmlp": Method(boosted_members),
    "structkd": Method(chosen_target, chosen=True, rivals=("glnn",)),
}
"Name on the command line -> method."
