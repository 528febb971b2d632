"""LLP: a graph teacher for links taught to an MLP that scores pairs without any edge.

Guo et al., "Linkless Link Prediction via Relational Distillation", ICML 2023. The two losses are the ones that rank
passages: a hinge on score differences and a divergence of softmax scores, over each node's context.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from structkd.errors import UsageError
from structkd.graph.data.inputs import divided, median_magnitude
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.link_prediction.task import LinkTask, Pairs, link_metrics, non_edges, split_links, walk_contexts
from structkd.graph.models.networks import Mlp, Sage
from structkd.graph.models.train import FitConfig, fit
from structkd.graph.published import dataset_name
from structkd.objectives.listwise import kl
from structkd.objectives.pairwise import hinge

LINK_METHODS = ("mlp", "llp")


@dataclass(frozen=True)
class LinkConfig:
    """Encoders, contexts and weights of the losses; what is left open comes from the published scripts."""

    hidden: int = 256
    "Width of hidden layers and embeddings."

    dropout: float = 0.5
    "Dropout between layers."

    learning_rate: float = 0.01
    "Adam's learning rate."

    epochs: int = 200
    "At most so many epochs."

    patience: int = 30
    "Stop after so many epochs without a validation AUC that reaches the best."

    anchors: int = 512
    "Nodes per epoch whose contexts are ranked."

    walks: int = 3
    "Walks from each anchor."

    hops: int | None = None
    "Steps of a walk."

    negatives: int | None = None
    "Random nodes in a context for every node met on a walk."

    margin: float = 0.1
    "Scores of the teacher further apart than this are ordered, and the student keeps them as far apart."

    edge_weight: float | None = None
    "Weight of the edges' cross-entropy."

    rank_weight: float | None = None
    "Weight of the ranking hinge."

    match_weight: float | None = None
    "Weight of the divergence of softmax scores."

    def resolved(self, dataset: str) -> "LinkConfig":
        """The same with every open field filled for this dataset."""
        row = PUBLISHED.get(dataset_name(dataset), PUBLISHED["cora"])
        return replace(
            self,
            hops=int(row["hops"]) if self.hops is None else self.hops,
            negatives=int(row["negatives"]) if self.negatives is None else self.negatives,
            edge_weight=row["edge_weight"] if self.edge_weight is None else self.edge_weight,
            rank_weight=row["rank_weight"] if self.rank_weight is None else self.rank_weight,
            match_weight=row["match_weight"] if self.match_weight is None else self.match_weight,
        )


PUBLISHED: dict[str, dict[str, float]] = {
    "cora": {"hops": 2, "negatives": 1, "edge_weight": 0.1, "rank_weight": 1.0, "match_weight": 1e-3},
    "citeseer": {"hops": 1, "negatives": 4, "edge_weight": 1e-3, "rank_weight": 1e3, "match_weight": 1e-3},
}
"Released scripts (LLP_transductive.sh), read by effect; other datasets take Cora's."


class PairScorer(nn.Module):
    """Logit of a pair of embeddings: an MLP of their product, as LLP's predictor."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.mlp = Mlp(width, width, 1, 2, dropout)

    def forward(self, first: Float[Tensor, "*pairs width"], second: Float[Tensor, "*pairs width"]) -> Tensor:
        """One logit per pair."""
        product = first * second
        out: Tensor = self.mlp(product.flatten(0, -2)).view(product.shape[:-1])
        return out


class LinkModel(nn.Module):
    """Embeddings of nodes by a graph teacher or an MLP, and the scorer of their pairs."""

    def __init__(self, encoder: nn.Module, width: int, dropout: float) -> None:
        super().__init__()
        self.encoder, self.scorer = encoder, PairScorer(width, dropout)

    def embed(self, task: GraphTask) -> Float[Tensor, "nodes width"]:
        """One row per node; only a graph encoder looks at edges."""
        return embeddings(self.encoder, task)

    def score(self, embedded: Float[Tensor, "nodes width"], pairs: Pairs) -> Float[Tensor, " pairs"]:
        """A logit for each pair."""
        out: Tensor = self.scorer(embedded[pairs[0]], embedded[pairs[1]])
        return out


@dataclass(frozen=True, eq=False)
class LinkResult:
    """Metrics of each model (sage, mlp, llp): auc, hits@K, mrr at best validation AUC, valid, epochs, cpu_seconds."""

    metrics: dict[str, dict[str, float]]
    models: dict[str, LinkModel]
    config: LinkConfig


def links(
    task: GraphTask, methods: tuple[str, ...] = LINK_METHODS, config: LinkConfig | None = None, seed: int | None = None
) -> LinkResult:
    """Split the edges, teach a GraphSAGE on the training edges, and compare students on the held-out ones.

    mlp learns from the edges alone, llp from the teacher too. Only the test figure at best validation AUC is there.

    Raises:
        UsageError: an unknown method, or a setting that hides nodes.
        DataError: too few edges.
    """
    seed = task.seed if seed is None else seed
    return learn_links(split_links(task, seed), methods, config, seed)


def learn_links(
    problem: LinkTask, methods: tuple[str, ...] = LINK_METHODS, config: LinkConfig | None = None, seed: int = 0
) -> LinkResult:
    """The same on edges that are split already.

    Training reads features whose median magnitude is 1; the models handed back read them as the task has them.
    """
    unknown = [name for name in methods if name not in LINK_METHODS]
    if unknown:
        raise UsageError(f"link method {unknown[0]!r}: expected some of {', '.join(LINK_METHODS)}.")
    unit = median_magnitude(problem.seen.x)
    problem = replace(problem, seen=divided(problem.seen, unit))
    seen = problem.seen
    config = (config or LinkConfig()).resolved(seen.name)
    teacher = _model(Sage, seen.num_features, config, seed)
    metrics = {"sage": _train(teacher, problem, config, seed, None)}
    models = {"sage": teacher}
    relations = Relations(teacher, problem, config, seed) if "llp" in methods else None
    for name in methods:
        student = _model(Mlp, seen.num_features, config, seed)
        metrics[name] = _train(student, problem, config, seed, relations if name == "llp" else None)
        models[name] = student
    for model in models.values():
        _divide_inputs(model, unit)
    return LinkResult(metrics, models, config)


class Relations:
    """What the teacher says of each anchor's context, and how far the student is from it."""

    def __init__(self, teacher: LinkModel, problem: LinkTask, config: LinkConfig, seed: int) -> None:
        self.problem, self.config = problem, config
        self.generator = torch.Generator().manual_seed(seed * 1009 + 12)
        self.teacher = teacher.eval()
        with torch.no_grad():
            self.embedded = teacher.embed(problem.seen)

    def loss(self, student: LinkModel, embedded: Float[Tensor, "nodes width"]) -> Float[Tensor, ""]:
        """rank_weight L_R + match_weight L_D on fresh anchors."""
        seen, config = self.problem.seen, self.config
        anchors = torch.randperm(seen.num_nodes, generator=self.generator)[: config.anchors]
        assert config.hops is not None
        assert config.negatives is not None
        context = walk_contexts(seen, anchors, config.walks, config.hops, config.negatives, self.generator)
        with torch.no_grad():
            wanted = context_scores(self.teacher, self.embedded, anchors, context)
        mine = context_scores(student, embedded, anchors, context)
        rank, match = rank_loss(mine, wanted, config.margin), kl(mine, wanted)
        return float(config.rank_weight or 0) * rank + float(config.match_weight or 0) * match


def rank_loss(
    student: Float[Tensor, "anchors context"], teacher: Float[Tensor, "anchors context"], margin: float
) -> Float[Tensor, ""]:
    """LLP's L_R (eq. 5): mean over all pairs of a context of max(0, margin - sign (s_a - s_b)), where the sign is the
    teacher's order, or 0 when its scores are within the margin; such ties add the margin and no gradient."""
    far = (teacher[:, :, None] - teacher[:, None, :]) > margin
    size = teacher.shape[1]
    ordered = far.sum(dim=(1, 2)).to(student.dtype) / (size * (size - 1) / 2)
    values = hinge(student, teacher, margin=margin, gap=margin, reduction="none")
    return (ordered * values + (1 - ordered) * margin).mean()


def context_scores(
    model: LinkModel,
    embedded: Float[Tensor, "nodes width"],
    anchors: Int[Tensor, " anchors"],
    context: Int[Tensor, "anchors context"],
) -> Float[Tensor, "anchors context"]:
    """Probability of an edge from each anchor to each node of its context."""
    first = embedded[anchors][:, None, :].expand(-1, context.shape[1], -1)
    out: Tensor = torch.sigmoid(model.scorer(first, embedded[context]))
    return out


def embeddings(encoder: nn.Module, task: GraphTask) -> Float[Tensor, "nodes width"]:
    """An encoder's rows; a graph encoder is given the task's edges."""
    x: Features = task.x
    out: Tensor = encoder(x, encoder.prepare(task)) if isinstance(encoder, Sage) else encoder(x)
    return out


def _model(kind: type[Mlp] | type[Sage], inputs: int, config: LinkConfig, seed: int) -> LinkModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = kind(inputs, config.hidden, config.hidden, 2, config.dropout)
        return LinkModel(encoder, config.hidden, config.dropout)


@torch.no_grad()
def _divide_inputs(model: LinkModel, unit: float) -> None:
    """x / unit in place of x, by the weights of the first map."""
    first: Any = model.encoder
    first.layers[0].weight /= unit


def _train(
    model: LinkModel, problem: LinkTask, config: LinkConfig, seed: int, relations: Relations | None
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed * 1009 + 13)
    weight = 1.0 if relations is None else float(config.edge_weight or 0)

    def loss_of(_: int) -> Tensor:
        embedded = model.embed(problem.seen)
        loss = weight * edge_loss(
            model, embedded, problem.train, non_edges(problem.seen, problem.train.shape[1], generator)
        )
        return loss if relations is None else loss + relations.loss(model, embedded)

    def validate() -> tuple[float, float]:
        return evaluate_links(model, problem.seen, problem.valid, problem.valid_negative)["auc"], 0.0

    result = fit(model, loss_of, validate, FitConfig(config.learning_rate, 0.0, config.epochs, config.patience), seed)
    found = evaluate_links(model, problem.seen, problem.test, problem.test_negative)
    return {**found, "valid": result.valid, "epochs": float(result.epochs), "cpu_seconds": result.cpu_seconds}


def edge_loss(
    model: LinkModel, embedded: Float[Tensor, "nodes width"], edges: Pairs, others: Pairs
) -> Float[Tensor, ""]:
    """Binary cross-entropy of edges against as many pairs without one."""
    scores = model.score(embedded, torch.cat([edges, others], dim=1))
    labels = torch.cat([torch.ones(edges.shape[1]), torch.zeros(others.shape[1])])
    return binary_cross_entropy_with_logits(scores, labels)


@torch.no_grad()
def evaluate_links(model: LinkModel, seen: GraphTask, edges: Pairs, others: Pairs) -> dict[str, float]:
    """Metrics of edges against non-edges in eval mode, the encoder seeing the training edges alone."""
    training = model.training
    embedded = model.eval().embed(seen)
    found = link_metrics(model.score(embedded, edges), model.score(embedded, others))
    model.train(training)
    return found
