"""Objectives and policies on node logits, each switched on by one flag beside a method's own terms.

A node's logits are a list of classes, so every objective of `structkd.objectives` and every policy around one serves
here. A method (`distillation`) brings its edge terms; `Policies` adds a term on node logits (`--objective`, kl where
another flag needs one), changes its target or its weights, adds a term on hidden activations, gives the student a
second head, chooses which nodes the teacher is asked about. `--method mlp` has no term of its own: with it an
objective stands alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd import acquisition
from structkd.errors import UsageError
from structkd.graph.data import Features, rows_of, subgraph
from structkd.graph.embeddings import embed_nodes, embeds
from structkd.graph.evaluate import metric_of
from structkd.graph.heads import Head, HeadedMlp, hidden_of
from structkd.graph.inputs import RAW
from structkd.graph.lesson import Lesson, Method, Teaching
from structkd.graph.models import Mlp, relu_dropout
from structkd.graph.published import given
from structkd.graph.sparse import SparseMatrix
from structkd.graph.train import FitConfig, fit
from structkd.objectives import fusion_ratio, subclasses, targets
from structkd.objectives.dual_head import choose_mix, dual_loss
from structkd.policies import (
    REPRESENTATION_NAMES,
    SAME_WIDTH,
    SOFTMAX_OBJECTIVES,
    check_sample_weight,
    choice,
    list_weight,
    parse_objective,
    representation_loss,
    weighted_sum,
)

Logits = Float[Tensor, "nodes classes"]

TARGETS = {"lelp": 2.0, "mixup": 1.0, "rank": None, "standardise": None, "taid": 0.4, "truncate": 3.0}
ACQUIRE = {"margin": None, "rad": 1.0, "random": None}
KEEP = {"agreement": 0.5}
DOMAINS = {"class": None, "degree": 4.0}

_EVERY = 10  # epochs between two looks at what learns beside the student: fusion ratios, domain shares
_SAMPLE = 256  # nodes of an epoch's representation term, a quarter for mi-alpha, whose cost is cubic
_NEIGHBOURS = 5


@dataclass(frozen=True)
class Policies:
    """What is switched on beside the method's own terms; nothing by default."""

    objective: str = ""
    "Term on node logits: a name in structkd.objectives.OBJECTIVES, or a weighted sum such as kl:1.0,margin-mse:0.5."

    objective_temperature: float = 1.0
    "Temperature of soft-max objectives, student and teacher."

    target: str = ""
    """Target of that term: taid[:START], truncate[:CLASSES], lelp[:SUBCLASSES], mixup[:SHARE OF NODES], standardise,
    rank."""

    sample_weight: str = ""
    "Weight of each node in that term: certainty, confidence, margin, bd-kd, or tgeo (experimental)."

    representation: str = ""
    "Term on hidden activations: mi-alpha[:ALPHA], infonce, similarity-preserving, affinity-kl, cosine, feature-mse."

    representation_weight: float = 0.1
    "Weight of the term on hidden activations."

    head: Literal["single", "dual"] = "single"
    "dual: one head for the labels, one for the teacher, mixed by shares chosen on validation."

    acquire: str = ""
    "Which nodes the teacher is asked about: random, margin or rad[:PENALTY]; see budget."

    budget: float = 1.0
    "Share of the nodes that the teacher is asked about."

    keep: str = ""
    "Answers to keep: agreement[:CONFIDENCE] of the teacher with a student of the labels alone."

    domains: str = ""
    "Parts of the graph weighed by how far the student lags behind (DDK): degree[:PARTS] or class."

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return self != Policies(objective_temperature=self.objective_temperature)

    def check(self) -> None:
        """UsageError for an unknown name, or flags that exclude each other."""
        parts = self.parts()
        target, _ = choice("--target", self.target, TARGETS)
        for flag, text, known in (("--acquire", self.acquire, ACQUIRE), ("--keep", self.keep, KEEP)):
            choice(flag, text, known)
        choice("--domains", self.domains, DOMAINS)
        choice("--representation", self.representation, _REPRESENTATIONS)
        check_sample_weight(self.sample_weight, parts, ("bd-kd", "tgeo"))
        if self.head not in ("single", "dual"):
            raise UsageError(f"--head {self.head!r}: expected single or dual.")
        if target in ("taid", "lelp", "mixup") and not set(parts) <= SOFTMAX_OBJECTIVES:
            raise UsageError(f"--target {target} needs soft-max objectives; {', '.join(parts)} is none.")
        if self.head == "dual" and target in ("lelp", "mixup"):
            raise UsageError(f"--head dual and --target {target} both change the student's outputs; choose one.")
        if not 0 < self.budget <= 1:
            raise UsageError(f"--budget {self.budget}: expected a share of the nodes, above 0 and up to 1.")
        if self.budget < 1 and not self.acquire:
            raise UsageError("--budget needs --acquire random, margin or rad: which nodes to ask about.")
        if self.sample_weight == "tgeo" and (self.head == "dual" or target == "lelp"):
            raise UsageError("--sample-weight tgeo weighs labels against the teacher on one head of class scores.")

    def parts(self) -> dict[str, float]:
        """Objectives on node logits and their weights; kl where another flag needs one, empty where none does."""
        if self.objective:
            return parse_objective(self.objective)
        weighed = self.sample_weight or self.target or self.domains
        return {"kl": 1.0} if weighed and self.head == "single" else {}


NO_POLICIES = Policies()
"Nothing switched on."

_REPRESENTATIONS: dict[str, float | None] = {
    name: (1.0 if name == "mi-alpha" else None) for name in REPRESENTATION_NAMES
}


def policy_teaching(lesson: Lesson, method: Method, policies: Policies) -> Teaching:
    """A method's teaching with what is switched on beside it.

    Raises:
        UsageError: flags that exclude each other, or do not fit the method.
    """
    return _Policy(lesson, method, policies).teaching()


class _Policy:
    """One distillation with policies: what is prepared once, and what changes from epoch to epoch.

    Attributes:
        asked: rows of the nodes whose answers the teacher gives and the student uses, ascending.
        domain_shares: share of each domain, empty without `--domains`.
    """

    def __init__(self, lesson: Lesson, method: Method, policies: Policies) -> None:
        policies.check()
        self.lesson, self.method, self.policies = lesson, method, policies
        self.seen, self.share = lesson.seen, given(lesson.config.label_weight)
        self.parts = policies.parts()
        if method.needs == "nothing" and not (self.parts or policies.head == "dual" or policies.representation):
            self.parts = {"kl": 1.0}  # what the teacher was asked about must teach something
        self.generator = np.random.default_rng([lesson.seed, 20_250])
        self.train_rows = lesson.train_rows
        if lesson.logits is None:
            raise UsageError("policies change what is learned from a teacher; give its scores.")
        self.teacher = lesson.logits.detach()
        inside = _embeddings(lesson)
        self.looks_inside = inside is not None
        self.embeddings = self.teacher if inside is None else inside
        self.target, self.number = choice("--target", policies.target, TARGETS)
        self.asked = self._asked()
        self.all_asked = len(self.asked) == self.seen.num_nodes
        self.taught = self._taught()
        self.also: torch.nn.Linear | None = None
        self.student, self.x, self.base = self._base()
        self.taid = self._taid()
        self.weight = list_weight(policies.sample_weight, self.teacher[self.asked], None)
        self.domain_of, self.domain_shares = self._domains()
        self._ratios: Tensor | None = None

    def teaching(self) -> Teaching:
        """Student and loss."""
        target = "teacher" if self.base is None else self.base.target
        inputs = RAW if self.base is None else self.base.inputs
        also = [module for module in (self.also, None if self.base is None else self.base.also) if module is not None]
        groups = None if self.base is None else self.base.groups
        if groups is not None and self.also is not None:
            groups = [*groups, {"params": list(self.also.parameters())}]
        return Teaching(
            self.student,
            self.loss,
            inputs,
            torch.nn.ModuleList(also) if also else None,
            groups,
            target,
            finish=self.finish,
        )

    def loss(self, epoch: int) -> Float[Tensor, ""]:
        """The loss of an epoch (from 1): labels, the method's terms, and what is switched on."""
        policies, student = self.policies, self.student
        looking = (epoch - 1) % _EVERY == 0
        if looking and len(self.domain_shares):
            self._weigh_domains(first=epoch == 1)
        if looking and policies.sample_weight == "tgeo":
            self._learn_ratios()
        hidden, raw = self._outputs()
        labelled = taught = student.fold(raw) if isinstance(student, HeadedMlp) else raw
        if isinstance(student, HeadedMlp) and student.head == "dual":
            heads = student.heads(raw)
            labelled, taught = heads.label, heads.teacher
        extra = raw.new_zeros(())
        if self.parts:
            extra = extra + self._node_term(raw, taught[self.asked], epoch)
        elif isinstance(student, HeadedMlp) and student.head == "dual":
            extra = extra + self._dual(student, raw)
        if policies.representation:
            extra = extra + policies.representation_weight * self._representation(hidden)
        return (1 - self.share) * extra + self._rest(labelled, epoch)

    def finish(self) -> None:
        """After training: choose the mix of a dual head on validation."""
        student = self.student
        if isinstance(student, HeadedMlp) and student.head == "dual":
            student.eval()
            rows = torch.nonzero(self.seen.valid).flatten()
            with torch.no_grad():
                raw = Mlp.forward(student, self.x)[rows]
                student.mix.copy_(torch.tensor(choose_mix(student.heads(raw), self.seen.y[rows])))

    # the method that policies stand beside

    def _prepares_its_own(self) -> UsageError:
        return UsageError(
            f"method {self.lesson.config.method} prepares inputs or targets of its own; --head, --acquire, --keep "
            "and tgeo need a method of features and logits alone, as glnn, ff-g2m or mlp."
        )

    def _base(self) -> tuple[Mlp, Features, Teaching | None]:
        """The student, its input, and the method's own teaching (None for one of labels alone)."""
        lesson, headed = self.lesson, self._headed()
        if headed is not None:
            self.share = self.share or 0.5  # a label head that nothing teaches would be noise
        teaching = None
        if self.method.needs != "nothing":
            part, config = self.seen, lesson.config
            if self._own_labels:
                config = replace(config, label_weight=0.0)
            if not self.all_asked:
                part = subgraph(self.seen, self.asked)
            view = None if headed is None else (_TeacherHead(headed) if headed.head == "dual" else headed)
            logits = self.teacher[self.asked]
            alone = self._own_labels or headed is not None
            if alone and self.method.chosen:  # before its target is prepared, which takes a while
                raise self._prepares_its_own()
            teaching = self.method.teach(replace(lesson, seen=part, logits=logits, config=config, built=view))
            if alone and teaching.inputs is not RAW:
                raise self._prepares_its_own()
        student = headed or (lesson.student() if teaching is None else teaching.student)
        if not isinstance(student, Mlp):
            raise UsageError(f"method {lesson.config.method} has a student of its own kind; policies need a plain MLP.")
        x = self.seen.x if teaching is None else teaching.inputs.seen(self.seen)
        self._add_projection()
        return student, x, teaching

    @property
    def _own_labels(self) -> bool:
        """Whether the labels' term is made here, since the method sees another student or fewer nodes."""
        return self.policies.head == "dual" or self.policies.sample_weight == "tgeo" or not self.all_asked

    def _rest(self, labelled: Tensor, epoch: int) -> Tensor:
        """The labels' term and the method's own."""
        if self.base is not None and not self._own_labels:
            return self.base.loss_of(epoch)
        if self.policies.sample_weight == "tgeo":
            total = self._fused(labelled)
        else:
            total = self.share * cross_entropy(labelled[self.train_rows], self._labels)
        return total if self.base is None else total + (1 - self.share) * self.base.loss_of(epoch)

    def _headed(self) -> HeadedMlp | None:
        """A student of several outputs per class, where a flag asks for one."""
        lesson, config = self.lesson, self.lesson.config
        if self.policies.head != "dual" and self.target != "lelp":
            return None
        head: Head
        head, count = ("subclasses", round(self.number)) if self.target == "lelp" else ("dual", 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lesson.seed)
            return HeadedMlp(
                self.seen.num_features, given(config.hidden), self.seen.classes, given(config.layers),
                given(config.dropout), head=head, per_class=count,
            )  # fmt: skip

    def _add_projection(self) -> None:
        if choice("--representation", self.policies.representation, _REPRESENTATIONS)[0] in SAME_WIDTH:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.lesson.seed + 1)
                self.also = torch.nn.Linear(given(self.lesson.config.hidden), self.embeddings.shape[1])

    def _outputs(self) -> tuple[Tensor | None, Tensor]:
        """(hidden activations where a term wants them, all outputs)."""
        if not self.policies.representation:
            return None, Mlp.forward(self.student, self.x)
        hidden = hidden_of(self.student, self.x)
        raw: Tensor = self.student.layers[-1](hidden)
        return hidden, raw

    @property
    def _labels(self) -> Int[Tensor, " train"]:
        return self.seen.y[self.train_rows]

    # which answers

    def _asked(self) -> Int[Tensor, " asked"]:
        """Rows that the teacher is asked about and whose answers are kept."""
        policies, nodes = self.policies, self.seen.num_nodes
        policy, penalty = choice("--acquire", policies.acquire, ACQUIRE)
        keep, confidence = choice("--keep", policies.keep, KEEP)
        rows = np.arange(nodes)
        if not policy and not keep:
            return torch.from_numpy(rows)
        student = self._warm_up()
        budget = round(policies.budget * nodes)
        if policy == "random":
            rows = acquisition.random(student, budget, generator=self.generator)
        elif policy == "margin":
            rows = acquisition.margin(student, budget)
        elif policy == "rad":
            right = metric_of(self.teacher, self.seen.y, self.seen.valid)
            rows = acquisition.rad(student, budget, teacher_accuracy=right, generator=self.generator, penalty=penalty)
        if keep:
            agreed = acquisition.agreement(
                student[rows], self.teacher[rows].double().numpy(),
                student_confidence=confidence, teacher_confidence=confidence,
            )  # fmt: skip
            rows = rows[agreed]
        if not len(rows):
            raise UsageError("no answer of the teacher is left; raise --budget, or lower the confidence of --keep.")
        return torch.from_numpy(rows)

    def _warm_up(self) -> Float[np.ndarray, "nodes classes"]:
        """Scores of a student of the labels alone: what is known before the teacher is asked."""
        seen, student, config = self.seen, self.lesson.student(), self.lesson.config
        x = rows_of(seen.x, self.train_rows)

        def validate() -> tuple[float, float]:
            out = student(seen.x)
            loss = cross_entropy(out[seen.valid], seen.y[seen.valid])
            return metric_of(out, seen.y, seen.valid, seen.metric), float(loss)

        settings = FitConfig(given(config.learning_rate), given(config.weight_decay), config.epochs, config.patience)
        fit(student, lambda _: cross_entropy(student(x), self._labels), validate, settings, self.lesson.seed)
        with torch.no_grad():
            return np.asarray(student(seen.x).double().numpy())

    # what the node term learns from

    def _taught(self) -> Tensor:
        """The teacher's side of the node term for the asked nodes: fixed transforms are made here, once."""
        teacher = self.teacher[self.asked]
        if self.target == "standardise":
            return targets.standardise(teacher)
        if self.target == "rank":
            return targets.rank(teacher)
        if self.target == "lelp":
            if not self.looks_inside:
                raise UsageError(
                    "--target lelp splits classes by embeddings, and logits alone were given; pass a trained gcn or "
                    "sage teacher (--weights DIR of `structkd graph teach`)."
                )
            known = self.embeddings[self.asked]
            # a weak teacher of uneven classes may answer one of them only; training labels name them all
            classes = torch.where(self.seen.train, self.seen.y, self.teacher.argmax(1))[self.asked]
            axes = subclasses.fit(
                known, subclasses.class_weights(known, teacher), classes,
                per_class=round(self.number), generator=self.generator,
            )  # fmt: skip
            return subclasses.subclass_targets(teacher, subclasses.coordinates(known, axes))
        return teacher

    def _taid(self) -> targets.Taid:
        epochs, start = self.lesson.config.epochs, self.number if self.target == "taid" else 0.4
        return targets.Taid(targets.TaidConfig(steps=epochs, start=start, alpha=4 / epochs))

    def _node_term(self, raw: Tensor, answers: Tensor, epoch: int) -> Tensor:
        """The objectives on the asked nodes' logits."""
        student, teacher, mask = answers, self.taught, None
        if self.target == "lelp":
            student = raw[self.asked]
        elif self.target == "mixup":
            student, teacher = self._mixed()
        elif self.target == "truncate":
            mask = targets.truncate(teacher, round(self.number))
        elif self.target == "taid":
            teacher = self.taid.target(student, teacher)
        value = weighted_sum(
            self.parts, student, teacher, mask=mask, weight=self._node_weight(),
            temperature=self.policies.objective_temperature, balanced=self.policies.sample_weight == "bd-kd",
        )  # fmt: skip
        if self.target == "taid":
            self.taid.update(value.detach(), epoch - 1)
        return value

    def _mixed(self) -> tuple[Tensor, Tensor]:
        """Student scores of mixed inputs, and the mixture of the stored answers.

        The first layer is linear, so its outputs are mixed in place of its inputs: the same, and sparse inputs stay.
        """
        student = self.student
        mixing = targets.interpolation(len(self.asked), generator=self.generator, mixed=self.number)
        x = mixing.mix(student.layers[0](self.x)[self.asked])
        for layer in student.layers[1:]:
            x = layer(relu_dropout(x, student.dropout, student.training))
        return x, mixing.mix_targets(self.taught)

    def _node_weight(self) -> Tensor | None:
        weight = self.weight
        if len(self.domain_shares):
            counts = torch.bincount(self.domain_of, minlength=len(self.domain_shares)).clamp(min=1)
            wanted = torch.from_numpy(self.domain_shares).float() * len(self.domain_of) / counts
            weight = wanted[self.domain_of] if weight is None else weight * wanted[self.domain_of]
        return weight

    def _dual(self, student: HeadedMlp, raw: Tensor) -> Tensor:
        """DHO's divergences of the teacher head, labelled and unlabelled nodes apart."""
        rows = self.asked
        labels = self.seen.y.clamp(min=0)[rows]
        return dual_loss(student.heads(raw[rows]), self.taught, labels, self.seen.train[rows], label_share=0.0)

    # activations

    def _representation(self, hidden: Tensor | None) -> Tensor:
        """The term on activations of some asked nodes, drawn anew in each epoch."""
        assert hidden is not None
        name, alpha = choice("--representation", self.policies.representation, _REPRESENTATIONS)
        size = min(_SAMPLE // 4 if name == "mi-alpha" else _SAMPLE, len(self.asked))
        rows = self.asked[torch.from_numpy(self.generator.choice(len(self.asked), size, replace=False))]
        neighbours = None
        if name == "affinity-kl":
            rows, neighbours = self._with_neighbours(rows)
        mine = hidden[rows]
        if name in SAME_WIDTH:
            assert self.also is not None
            mine = self.also(mine)
        return representation_loss(name, mine, self.embeddings[rows], alpha=alpha, neighbours=neighbours)

    def _with_neighbours(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows followed by five neighbours of each, drawn with repetition, and where those stand; -1 pads.

        A neighbour that the teacher was not asked about does not count.
        """
        graph, known = self.seen.adjacency, torch.zeros(self.seen.num_nodes, dtype=torch.bool)
        known[self.asked] = True
        degrees = self.seen.degrees[rows][:, None]
        drawn = (torch.from_numpy(self.generator.random((len(rows), _NEIGHBOURS))) * degrees).long()
        near = graph.columns[(graph.starts[rows][:, None] + drawn).clamp(max=max(0, len(graph.columns) - 1))]
        places = torch.full((len(rows) * (1 + _NEIGHBOURS), _NEIGHBOURS), -1)
        positions = len(rows) + torch.arange(near.numel()).reshape(near.shape)
        places[: len(rows)] = torch.where((degrees > 0) & known[near], positions, -1)
        return torch.cat([rows, near.flatten()]), places

    # what learns beside the student

    def _domains(self) -> tuple[Tensor, Float[np.ndarray, " domains"]]:
        """Domain of each asked node and equal first shares; nothing without `--domains`."""
        name, parts = choice("--domains", self.policies.domains, DOMAINS)
        if not name:
            return torch.empty(0, dtype=torch.int64), np.empty(0)
        if name == "class":
            domain = self.teacher.argmax(1)
        else:
            degrees = self.seen.degrees.double()
            inner = torch.linspace(0, 1, round(parts) + 1, dtype=torch.float64)[1:-1]
            domain = torch.bucketize(degrees, torch.unique(torch.quantile(degrees, inner)))
        self._domain_of_all = domain
        count = int(domain.max()) + 1
        return domain[self.asked], np.full(count, 1 / count)

    def _weigh_domains(self, first: bool) -> None:
        """DDK's shares from the validation cross-entropies of student and teacher in each domain."""
        seen, rows = self.seen, torch.nonzero(self.seen.valid).flatten()
        self.student.eval()
        with torch.no_grad():
            mine = self.student(self.x)[rows]
        self.student.train()
        losses = [cross_entropy(out, seen.y[rows], reduction="none").double() for out in (mine, self.teacher[rows])]
        member = torch.nn.functional.one_hot(self._domain_of_all[rows], len(self.domain_shares)).double()
        count = member.sum(0)
        # a domain without a validation node shows no lag of its own: it takes the mean of all
        means = [torch.where(count > 0, member.T @ loss / count.clamp(min=1), loss.mean()).numpy() for loss in losses]
        previous = None if first else self.domain_shares
        self.domain_shares = acquisition.domain_weights(means[0], means[1], previous=previous)

    def _learn_ratios(self) -> None:
        """One update of TGeo's network on validation nodes; new ratios of the training nodes."""
        seen, rows = self.seen, self.train_rows
        if self._ratios is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._network = fusion_ratio.FusionRatio(seen.classes)
            self._optimizer = torch.optim.Adam(self._network.parameters(), lr=0.1, weight_decay=0.05)
            valid = torch.nonzero(seen.valid).flatten()
            dense = self.x.dense() if isinstance(self.x, SparseMatrix) else self.x
            self._fusion = (
                fusion_ratio.Labelled(dense[rows], seen.y[rows], self.teacher[rows]),
                fusion_ratio.Labelled(dense[valid], seen.y[valid]),
                fusion_ratio.class_means(self.teacher[rows], seen.y[rows], seen.classes),
            )
        train, valid_rows, means = self._fusion
        self.student.eval()  # dropout would make the hypergradient noisy
        _, self._ratios = fusion_ratio.learn_ratios(
            self._network, self._optimizer, self.student, train, valid_rows, means,
            learning_rate=given(self.lesson.config.learning_rate),
        )  # fmt: skip
        self.student.train()

    def _fused(self, scores: Tensor) -> Tensor:
        assert self._ratios is not None
        rows = self.train_rows
        return fusion_ratio.fused_loss(scores[rows], self.teacher[rows], self._labels, self._ratios)


class _TeacherHead(Mlp):
    """The teacher head of a dual student as a student of its own, on the same weights: what a method's terms see."""

    def __init__(self, student: HeadedMlp) -> None:
        torch.nn.Module.__init__(self)
        self.widths, self.dropout, self.layers = student.widths, student.dropout, student.layers

    def forward(self, x: Features) -> Logits:
        """Scores of the teacher head."""
        return super().forward(x)[:, self.widths[-1] :]


def _embeddings(lesson: Lesson) -> Float[Tensor, "nodes dims"] | None:
    """What the teacher's last layer reads, where the teacher itself is known; its logits serve where it is not."""
    if lesson.teacher is None or not embeds(lesson.teacher):
        return None
    return embed_nodes(lesson.teacher, lesson.seen)
