"""The term on node logits: objectives, the target they aim at, the weight of each node."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from structkd.errors import UsageError
from structkd.graph.data.task import Features
from structkd.graph.methods.lesson import Lesson
from structkd.graph.models.networks import Mlp, relu_dropout
from structkd.graph.policies.flags import TARGETS, Policies
from structkd.graph.published import given
from structkd.objectives import subclasses, targets
from structkd.policies import choice, list_weight, weighted_sum

Logits = Float[Tensor, "nodes classes"]


class NodeTerm:
    """A weighted sum of objectives on the logits of the nodes that the teacher was asked about.

    Attributes:
        target: name of the target transform, empty for the teacher's own scores.
        number: its number.
        taught: the teacher's side; fixed transforms are made here, once.
    """

    def __init__(
        self,
        lesson: Lesson,
        policies: Policies,
        parts: Mapping[str, float],
        asked: Int[Tensor, " asked"],
        embeddings: Float[Tensor, "nodes dims"] | None,
        generator: np.random.Generator,
    ) -> None:
        self.parts, self.policies, self.asked, self.generator = parts, policies, asked, generator
        self.target, self.number = choice("--target", policies.target, TARGETS)
        self.taught = self._taught(lesson, embeddings)
        epochs, start = lesson.config.epochs, self.number if self.target == "taid" else 0.4
        self.taid = targets.Taid(targets.TaidConfig(steps=epochs, start=start, alpha=4 / epochs))
        self.weight = list_weight(policies.sample_weight, given(lesson.logits)[asked], None)

    def value(
        self,
        student: Mlp,
        x: Features,
        raw: Float[Tensor, "nodes outputs"],
        scores: Logits,
        epoch: int,
        domain_weight: Float[Tensor, " asked"] | None,
    ) -> Float[Tensor, ""]:
        """The term for one epoch (from 1), on all outputs of the student and its scores of classes."""
        mine, wanted, mask = scores[self.asked], self.taught, None
        if self.target == "lelp":
            mine = raw[self.asked]
        elif self.target == "mixup":
            mine, wanted = self.mixed(student, x)
        elif self.target == "truncate":
            mask = targets.truncate(wanted, round(self.number))
        elif self.target == "taid":
            wanted = self.taid.target(mine, wanted)
        weight = self.weight
        if domain_weight is not None:
            weight = domain_weight if weight is None else weight * domain_weight
        value = weighted_sum(
            self.parts, mine, wanted, mask=mask, weight=weight,
            temperature=self.policies.objective_temperature, balanced=self.policies.sample_weight == "bd-kd",
        )  # fmt: skip
        if self.target == "taid":
            self.taid.update(value.detach(), epoch - 1)
        return value

    def mixed(self, student: Mlp, x: Features) -> tuple[Tensor, Tensor]:
        """Student scores of mixed inputs, and the mixture of the stored answers.

        The first layer is linear, so its outputs are mixed in place of its inputs: the same, and sparse inputs stay.
        """
        mixing = targets.interpolation(len(self.asked), generator=self.generator, mixed=self.number)
        h = mixing.mix(student.layers[0](x)[self.asked])
        for layer in student.layers[1:]:
            h = layer(relu_dropout(h, student.dropout, student.training))
        return h, mixing.mix_targets(self.taught)

    def _taught(self, lesson: Lesson, embeddings: Tensor | None) -> Tensor:
        """The teacher's scores of the asked nodes, as the target transform wants them."""
        logits = given(lesson.logits).detach()
        teacher = logits[self.asked]
        if self.target == "standardise":
            return targets.standardise(teacher)
        if self.target == "rank":
            return targets.rank(teacher)
        if self.target != "lelp":
            return teacher
        if embeddings is None:
            raise UsageError(
                "--target lelp splits classes by embeddings, and logits alone were given; pass a trained gcn or "
                "sage teacher (--weights DIR of `structkd graph teach`)."
            )
        known = embeddings[self.asked]
        # a weak teacher of uneven classes may answer one of them only; training labels name them all
        classes = torch.where(lesson.seen.train, lesson.seen.y, logits.argmax(1))[self.asked]
        axes = subclasses.fit(
            known, subclasses.class_weights(known, teacher), classes,
            per_class=round(self.number), generator=self.generator,
        )  # fmt: skip
        return subclasses.subclass_targets(teacher, subclasses.coordinates(known, axes))
