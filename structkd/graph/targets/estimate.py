"""What the default method teaches: its own estimate of every node, unless validation clearly prefers the teacher's.

The estimate is a self-trained committee's (`committee`) where features are sparse, or what the features tell of its
first round where that is clearly better; and what two views agree on, the teacher among them (`views`), where they are
dense. It is taught unless a spectral response g(S) of the teacher's probabilities, training labels put back in first,
has a validation metric higher by more than two standard errors of the difference: a few hundred labels cannot rank many
near-equal candidates, and the best of them would mostly be luck (one standard error, the rule of Breiman et al., 1984,
section 3.4.3, is for two of them). Responses: identity is GLNN's target, S is FF-G2M's low band, personalised PageRank
is between, 2I - S lifts the high band of a heterophilous graph. Beside them stands what an MLP learns from the labels
alone, which on some heterophilous graphs no teacher reaches.

An estimate that is better than the teacher differs from it mostly in the low band (whole neighbourhoods change their
class). So its high band can be the teacher's at little loss, where that is asked for: q + a (I - S)(t - q), with as
little a as brings the agreement to the cosine asked for, and none that validation counts against.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.graph.data.inputs import of_one_scale
from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import GraphTask, rows_of
from structkd.graph.evaluate import CLEARLY, metric_of, standard_error, validation
from structkd.graph.models.networks import Mlp
from structkd.graph.models.train import FitConfig, fit
from structkd.graph.spectral import band_agreement, high_pass, low_pass
from structkd.graph.targets import views
from structkd.graph.targets.committee import DEFAULT, CommitteeConfig, clamped, consult, pagerank
from structkd.graph.targets.shares import Probabilities, normal, with_even_shares

RESTARTS = (0.1, 0.2, 0.5)
"Restart probabilities of the PageRank responses."

_ALONE = FitConfig(learning_rate=0.01, weight_decay=5e-4, epochs=300, patience=50, select="loss")
_ALONE_HIDDEN = 128

LIFTS = (0.1, 0.2, 0.3)
"Shares a of the high band's difference that are tried in this order."


@dataclass(frozen=True, eq=False)
class Target:
    """One estimate of every observed node's class, with its validation metric."""

    name: str
    probabilities: Probabilities
    valid: float


def choose_target(
    seen: GraphTask,
    teacher_logits: Float[Tensor, "nodes classes"],
    seed: int,
    config: CommitteeConfig = DEFAULT,
    high_band: float = 0.0,
    view_config: views.ViewsConfig = views.DEFAULT,
) -> Target:
    """The method's own estimate, or where one clearly leads it, the best response of the teacher
    or what an MLP learns from labels alone.

    Args:
        high_band: mean cosine to the teacher over the high band that the estimate is brought to; 0 leaves it alone.
    """
    seen, teacher = of_one_scale(seen), teacher_logits.softmax(dim=1)
    others = [*responses(seen, teacher, "teacher"), _features_alone(seen, seed)]
    best = max(others, key=lambda target: target.valid)
    if isinstance(seen.x, SparseMatrix):
        own = _committee(seen, seed, config, view_config)
    else:
        own = _views(seen, teacher, seed, view_config)
    if leads(seen, best, _as_drawn(seen, own), seed):
        return best
    return Target(own.name, with_high_band(seen, own.probabilities, teacher, high_band), own.valid)


def with_high_band(seen: GraphTask, estimate: Probabilities, teacher: Probabilities, cosine: float) -> Probabilities:
    """The estimate with as much of the teacher's high band as the cosine asks for, by the steps of `LIFTS`.

    A step that lowers the validation metric is not taken, nor any beyond it: under heterophily the high band carries
    the classes. The low band stays the estimate's but for clipping to distributions.
    """
    if not cosine:
        return estimate
    difference = high_pass(seen, teacher - estimate)
    kept = _judged(seen, "", estimate)
    for lift in LIFTS:
        lifted = _judged(seen, "", (estimate + lift * difference).clamp_min(1e-4))
        if band_agreement(seen, kept.probabilities, teacher)["cos_high"] >= cosine or lifted.valid < kept.valid:
            break
        kept = lifted
    return kept.probabilities


def leads(seen: GraphTask, one: Target, other: Target, seed: int) -> bool:
    """Whether one validation metric is clearly higher."""
    lead = one.valid - other.valid
    return lead > CLEARLY * standard_error(seen, _logs(one.probabilities), _logs(other.probabilities), seed)


def responses(seen: GraphTask, probabilities: Probabilities, name: str) -> list[Target]:
    """Identity, one smoothing, PageRank by each restart, and the high-band lift, all on clamped training labels."""
    start = clamped(seen, probabilities)
    lifted = (2 * start - low_pass(seen, start)).clamp_min(0)
    signals = {
        name: probabilities,
        f"{name}, smoothed": low_pass(seen, start),
        **{f"{name}, PageRank {restart}": pagerank(seen, start, restart) for restart in RESTARTS},
        f"{name}, high band lifted": lifted,
    }
    return [_judged(seen, key, signal) for key, signal in signals.items()]


def _features_alone(seen: GraphTask, seed: int) -> Target:
    """An MLP's answers from labels and a node's own features: under heterophily a graph can tell less than these."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mlp(seen.num_features, _ALONE_HIDDEN, seen.classes)
    mine, held = (rows_of(seen.x, torch.nonzero(mask).flatten()) for mask in (seen.train, seen.valid))
    labels, validate = seen.y[seen.train], validation(seen, partial(model, held))
    fit(model, lambda _: cross_entropy(model(mine), labels), validate, _ALONE, seed)
    with torch.no_grad():
        answers: Tensor = model(seen.x)
    return _judged(seen, "features alone", answers.softmax(dim=1))


def _committee(seen: GraphTask, seed: int, config: CommitteeConfig, view_config: views.ViewsConfig) -> Target:
    """The mean of the last two rounds, or what the features' view makes of the first, where that clearly leads it.

    Where many words name a node's class, its features correct what the graph says; rounds of self-training would only
    confirm the graph.
    """
    rounds = consult(seen, seed, config)
    first = _judged(seen, "committee", next(rounds))
    view = _judged(
        seen, "features' view of the committee", views.features_view(seen, first.probabilities, seed, view_config)
    )
    if leads(seen, _as_drawn(seen, view), _as_drawn(seen, first), seed):
        return view
    last = [first.probabilities, *rounds][-2:]
    return _judged(seen, first.name, torch.stack(last).mean(dim=0))


def _as_drawn(seen: GraphTask, target: Target) -> Target:
    """The target as it is compared on validation nodes that were drawn by class."""
    return _judged(seen, target.name, with_even_shares(seen, target.probabilities))


def _views(seen: GraphTask, teacher: Probabilities, seed: int, config: views.ViewsConfig) -> Target:
    """What two views agree on, from networks on filtered features, and the teacher unless it is clearly worse."""
    filters = views.feature_filters(seen, config)
    alone = _judged(seen, "views", views.labelled_views(seen, filters, seed, config))
    start, name = alone.probabilities, alone.name
    if not leads(seen, alone, _judged(seen, "teacher", teacher), seed):
        start, name = views.geometric_mean([start, teacher]), "views and teacher"
    return _judged(seen, name, views.agreed(seen, start, filters, seed, config))


def _judged(seen: GraphTask, name: str, signal: Probabilities) -> Target:
    rows = normal(signal)
    return Target(name, rows, metric_of(_logs(rows), seen.y, seen.valid, seen.metric))


def _logs(probabilities: Probabilities) -> Tensor:
    return probabilities.clamp_min(1e-12).log()
