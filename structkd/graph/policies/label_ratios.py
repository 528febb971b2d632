"""EXPERIMENTAL. For each training node, how far to follow the teacher and how far the label (TGeo-KD)."""

import torch
from jaxtyping import Float
from torch import Tensor

from structkd.graph.data.sparse import SparseMatrix
from structkd.graph.data.task import Features
from structkd.graph.methods.lesson import Lesson
from structkd.graph.models.networks import Mlp
from structkd.graph.published import given
from structkd.objectives import fusion_ratio


class LabelRatios:
    """The shares of `objectives.fusion_ratio` on training nodes, learned from validation nodes beside the student."""

    def __init__(self, lesson: Lesson, x: Features) -> None:
        seen, self.rows, teacher = lesson.seen, lesson.train_rows, given(lesson.logits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lesson.seed)
            self._network = fusion_ratio.FusionRatio(seen.classes)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=0.1, weight_decay=0.05)
        self._learning_rate = given(lesson.config.learning_rate)
        valid = torch.nonzero(seen.valid).flatten()
        dense = x.dense() if isinstance(x, SparseMatrix) else x
        self._train = fusion_ratio.Labelled(dense[self.rows], seen.y[self.rows], teacher[self.rows])
        self._valid = fusion_ratio.Labelled(dense[valid], seen.y[valid])
        self._means = fusion_ratio.class_means(teacher[self.rows], seen.y[self.rows], seen.classes)
        self._ratios = torch.full((len(self.rows),), 0.5)

    def look(self, student: Mlp) -> None:
        """One update of the network; new ratios."""
        student.eval()  # dropout would make the hypergradient noisy
        _, self._ratios = fusion_ratio.learn_ratios(
            self._network, self._optimizer, student, self._train, self._valid, self._means,
            learning_rate=self._learning_rate,
        )  # fmt: skip
        student.train()

    def loss(self, scores: Float[Tensor, "nodes classes"]) -> Float[Tensor, ""]:
        """`fusion_ratio.fused_loss` on the training nodes."""
        train = self._train
        return fusion_ratio.fused_loss(scores[self.rows], given(train.teacher), train.labels, self._ratios)
