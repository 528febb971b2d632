"""A method's lesson with what is switched on beside it: one student, one loss, one pass over the nodes per epoch."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd.errors import UsageError
from structkd.graph.data.inputs import RAW
from structkd.graph.data.task import Features, subgraph
from structkd.graph.methods.lesson import Lesson, Method, Teaching
from structkd.graph.models.embeddings import embed_nodes, embeds
from structkd.graph.models.heads import Head, HeadedMlp
from structkd.graph.models.networks import Mlp
from structkd.graph.policies.asked_nodes import asked_nodes
from structkd.graph.policies.domains import NodeDomains
from structkd.graph.policies.flags import Policies
from structkd.graph.policies.hidden_term import HiddenTerm
from structkd.graph.policies.label_ratios import LabelRatios
from structkd.graph.policies.node_term import NodeTerm
from structkd.graph.published import given
from structkd.objectives.dual_head import choose_mix, dual_loss

_EVERY = 10  # epochs between two looks at what learns beside the student: fusion ratios, domain shares


def policy_teaching(lesson: Lesson, method: Method, policies: Policies) -> Teaching:
    """A method's teaching with what is switched on beside it.

    Raises:
        UsageError: flags that exclude each other, or do not fit the method.
    """
    return PolicyLesson(lesson, method, policies).teaching()


class PolicyLesson:
    """One distillation with policies: what is prepared once, and what changes from epoch to epoch.

    Attributes:
        asked: rows of the nodes whose answers the teacher gives and the student uses, ascending.
        term: the objectives on node logits, None where the method's own terms are all.
        domains: domains of the nodes, None without `--domains`.
        base: the method's own teaching, None for one of labels alone.
    """

    def __init__(self, lesson: Lesson, method: Method, policies: Policies) -> None:
        policies.check()
        if lesson.logits is None:
            raise UsageError("policies change what is learned from a teacher; give its scores.")
        self.lesson, self.method, self.policies = lesson, method, policies
        self.seen, self.share = lesson.seen, given(lesson.config.label_weight)
        generator, teacher = np.random.default_rng([lesson.seed, 20_250]), lesson.logits.detach()
        inside = _embeddings(lesson)
        self.asked = asked_nodes(lesson, policies, generator)
        parts = policies.parts()
        if method.needs == "nothing" and not (parts or policies.head == "dual" or policies.representation):
            parts = {"kl": 1.0}  # what the teacher was asked about must teach something
        self.term = NodeTerm(lesson, policies, parts, self.asked, inside, generator) if parts else None
        self.student, self.x, self.base = self._base()
        self.hidden = None
        if policies.representation:
            embeddings = teacher if inside is None else inside
            self.hidden = HiddenTerm(lesson, policies, self.asked, embeddings, generator)
        self.domains = NodeDomains(policies.domains, self.seen, teacher) if policies.domains else None
        self.ratios = LabelRatios(lesson, self.x) if policies.sample_weight == "tgeo" else None
        self._heard: tuple[Features, Tensor] | None = None
        self._listening = False
        self._hook = self.student.layers[-1].register_forward_hook(self._hear)

    def teaching(self) -> Teaching:
        """Student and loss."""
        base = self.base
        projection = None if self.hidden is None else self.hidden.projection
        also = [module for module in (projection, None if base is None else base.also) if module is not None]
        groups = None if base is None else base.groups
        if groups is not None and projection is not None:
            groups = [*groups, {"params": list(projection.parameters())}]
        return Teaching(
            self.student,
            self.loss,
            RAW if base is None else base.inputs,
            torch.nn.ModuleList(also) if also else None,
            groups,
            "teacher" if base is None else base.target,
            finish=self.finish,
        )

    def loss(self, epoch: int) -> Float[Tensor, ""]:
        """The loss of an epoch (from 1): labels, the method's terms, and what is switched on."""
        student = self.student
        if (epoch - 1) % _EVERY == 0:
            if self.domains is not None:
                self.domains.look(student, self.x)
            if self.ratios is not None:
                self.ratios.look(student)
        own = self._method_terms(epoch)
        hidden, raw = self._pass()
        labelled = taught = student.fold(raw) if isinstance(student, HeadedMlp) else raw
        dual = isinstance(student, HeadedMlp) and student.head == "dual"
        if isinstance(student, HeadedMlp) and dual:
            heads = student.heads(raw)
            labelled, taught = heads.label, heads.teacher
        extra = raw.new_zeros(())
        if self.term is not None:
            weight = None if self.domains is None else self.domains.weights(self.asked)
            extra = extra + self.term.value(student, self.x, raw, taught, epoch, weight)
        elif isinstance(student, HeadedMlp) and dual:
            extra = extra + self._dual(student, raw)
        if self.hidden is not None:
            assert isinstance(hidden, Tensor)
            extra = extra + self.policies.representation_weight * self.hidden.value(hidden)
        return (1 - self.share) * extra + own + self._label_term(labelled)

    def finish(self) -> None:
        """After training: stop listening, choose the mix of a dual head on validation."""
        self._hook.remove()
        student = self.student
        if isinstance(student, HeadedMlp) and student.head == "dual":
            student.eval()
            rows = torch.nonzero(self.seen.valid).flatten()
            with torch.no_grad():
                raw = Mlp.forward(student, self.x)[rows]
                student.mix.copy_(torch.tensor(choose_mix(student.heads(raw), self.seen.y[rows])))

    # the method that policies stand beside

    def _base(self) -> tuple[Mlp, Features, Teaching | None]:
        """The student, its input, and the method's own teaching."""
        lesson, headed, name = self.lesson, self._headed(), self.lesson.config.method
        if headed is not None:
            self.share = self.share or 0.5  # a label head that nothing teaches would be noise
        if self.method.needs == "nothing":
            return headed or lesson.student(), self.seen.x, None
        part, config = self.seen, lesson.config
        if self._own_labels:
            config = replace(config, label_weight=0.0)
        if len(self.asked) < self.seen.num_nodes:
            part = subgraph(self.seen, self.asked)
        view = None if headed is None else (_TeacherHead(headed) if headed.head == "dual" else headed)
        alone = self._own_labels or headed is not None
        refused = UsageError(
            f"method {name} prepares inputs or targets of its own; --head, --acquire, --keep and tgeo need a method "
            "of features and logits alone, as glnn, ff-g2m or mlp."
        )
        if alone and self.method.chosen:  # before its target is prepared, which takes a while
            raise refused
        logits = given(lesson.logits).detach()[self.asked]
        teaching = self.method.teach(replace(lesson, seen=part, logits=logits, config=config, built=view))
        if alone and teaching.inputs is not RAW:
            raise refused
        student = headed or teaching.student
        if not isinstance(student, Mlp):
            raise UsageError(f"method {name} has a student of its own kind; policies need a plain MLP.")
        return student, teaching.inputs.seen(self.seen), teaching

    @property
    def _own_labels(self) -> bool:
        """Whether the labels' term is made here, since the method sees another student or fewer nodes."""
        fewer = len(self.asked) < self.seen.num_nodes
        return self.policies.head == "dual" or self.policies.sample_weight == "tgeo" or fewer

    def _method_terms(self, epoch: int) -> Tensor:
        """The method's own loss, labels included unless they are made here; its pass over all nodes is heard."""
        if self.base is None:
            return torch.zeros(())
        self._listening = True
        value = self.base.loss_of(epoch)
        self._listening = False
        return (1 - self.share) * value if self._own_labels else value

    def _label_term(self, labelled: Tensor) -> Tensor:
        """The labels' term where it is made here."""
        if self.base is not None and not self._own_labels:
            return labelled.new_zeros(())
        if self.ratios is not None:
            return self.ratios.loss(labelled)
        rows = self.lesson.train_rows
        return self.share * cross_entropy(labelled[rows], self.seen.y[rows])

    def _hear(self, module: torch.nn.Module, read: tuple[Features, ...], written: Tensor) -> None:
        """Keep what the last layer read and wrote in the first pass over all nodes: one pass serves every term."""
        if self._listening and self._heard is None and len(written) == self.seen.num_nodes:
            self._heard = read[0], written

    def _pass(self) -> tuple[Features, Tensor]:
        """(what the last layer read, all outputs) of every node: from the method's pass, else from one of our own."""
        if self._heard is None:
            self._listening = True
            Mlp.forward(self.student, self.x)
        found, self._heard, self._listening = self._heard, None, False
        assert found is not None
        return found

    # students of several outputs per class

    def _headed(self) -> HeadedMlp | None:
        """A student of several outputs per class, where a flag asks for one."""
        lesson, config = self.lesson, self.lesson.config
        head: Head
        if self.policies.head == "dual":
            head, count = "dual", 2
        elif self.term is not None and self.term.target == "lelp":
            head, count = "subclasses", round(self.term.number)
        else:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lesson.seed)
            return HeadedMlp(
                self.seen.num_features, given(config.hidden), self.seen.classes, given(config.layers),
                given(config.dropout), head=head, per_class=count,
            )  # fmt: skip

    def _dual(self, student: HeadedMlp, raw: Tensor) -> Tensor:
        """DHO's divergences of the teacher head, labelled and unlabelled nodes apart."""
        rows, teacher = self.asked, given(self.lesson.logits).detach()
        labels = self.seen.y.clamp(min=0)[rows]
        return dual_loss(student.heads(raw[rows]), teacher[rows], labels, self.seen.train[rows], label_share=0.0)


class _TeacherHead(Mlp):
    """The teacher head of a dual student as a student of its own, on the same weights: what a method's terms see."""

    def __init__(self, student: HeadedMlp) -> None:
        torch.nn.Module.__init__(self)
        self.widths, self.dropout, self.layers = student.widths, student.dropout, student.layers

    def forward(self, x: Features) -> Float[Tensor, "nodes classes"]:
        """Scores of the teacher head."""
        return super().forward(x)[:, self.widths[-1] :]


def _embeddings(lesson: Lesson) -> Float[Tensor, "nodes dims"] | None:
    """What the teacher's last layer reads, where the teacher itself is known; its logits serve where it is not."""
    if lesson.teacher is None or not embeds(lesson.teacher):
        return None
    return embed_nodes(lesson.teacher, lesson.seen)
