"""Which nodes the teacher is asked about under a budget, and which of its answers are kept."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from structkd import acquisition
from structkd.errors import UsageError
from structkd.graph.data.task import rows_of
from structkd.graph.evaluate import metric_of
from structkd.graph.methods.lesson import Lesson
from structkd.graph.models.train import FitConfig, fit
from structkd.graph.policies.flags import ACQUIRE, KEEP, Policies
from structkd.graph.published import given
from structkd.policies import choice


def asked_nodes(lesson: Lesson, policies: Policies, generator: np.random.Generator) -> Int[Tensor, " asked"]:
    """Rows of the observed nodes whose answers the teacher gives and the student uses, ascending.

    `--acquire` chooses by the scores of a student of the labels alone; for `rad` the teacher's accuracy is that on
    validation nodes. `--keep` then leaves out what this student and the teacher do not agree on.

    Raises:
        UsageError: no answer is left.
    """
    seen, teacher = lesson.seen, given(lesson.logits)
    policy, penalty = choice("--acquire", policies.acquire, ACQUIRE)
    keep, confidence = choice("--keep", policies.keep, KEEP)
    rows, budget = np.arange(seen.num_nodes), round(policies.budget * seen.num_nodes)
    student = label_student(lesson) if keep or policy in ("margin", "rad") else np.zeros((seen.num_nodes, 1))
    if policy == "random":
        rows = acquisition.random(student, budget, generator=generator)
    elif policy == "margin":
        rows = acquisition.margin(student, budget)
    elif policy == "rad":
        right = metric_of(teacher, seen.y, seen.valid)
        rows = acquisition.rad(student, budget, teacher_accuracy=right, generator=generator, penalty=penalty)
    if keep:
        agreed = acquisition.agreement(
            student[rows], teacher[rows].double().numpy(), student_confidence=confidence, teacher_confidence=confidence
        )
        rows = rows[agreed]
    if not len(rows):
        raise UsageError("no answer of the teacher is left; raise --budget, or lower the confidence of --keep.")
    return torch.from_numpy(rows)


def label_student(lesson: Lesson) -> Float[np.ndarray, "nodes classes"]:
    """Scores of a student of the labels alone: what is known before the teacher is asked."""
    seen, student, config = lesson.seen, lesson.student(), lesson.config
    x, labels = rows_of(seen.x, lesson.train_rows), seen.y[lesson.train_rows]

    def validate() -> tuple[float, float]:
        out = student(seen.x)
        loss = cross_entropy(out[seen.valid], seen.y[seen.valid])
        return metric_of(out, seen.y, seen.valid, seen.metric), float(loss)

    settings = FitConfig(given(config.learning_rate), given(config.weight_decay), config.epochs, config.patience)
    fit(student, lambda _: cross_entropy(student(x), labels), validate, settings, lesson.seed)
    with torch.no_grad():
        return np.asarray(student(seen.x).double().numpy())
