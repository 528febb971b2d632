"""Pseudo-subclasses (LELP): a teacher of few classes says more when each class is split by what its embedding knows.

LELP (arXiv 2409.20449): from teacher embeddings to targets over classes x subclasses, without retraining the teacher:

    directions = fit(embeddings, weights, labels, per_class=4, generator=generator)      # training rows only
    target = subclass_targets(teacher, coordinates(embeddings, directions))              # [rows, classes * subclasses]
    loss = objectives.kl(student, target)                                                # a student of as many outputs
    scores = class_scores(student, num_classes)

The column of class c and subclass s is c * subclasses + s. The paper leaves the scale of the coordinates open; unit
variance on the training rows is our choice.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from structkd.errors import UsageError
from structkd.objectives._masks import check_temperature


@dataclass(frozen=True, eq=False)
class Directions:
    """How an embedding is split inside each class.

    Attributes:
        span: orthonormal basis of what the class scores see.
        axes: unit directions orthogonal to `span`.
        means: projected mean embedding of each class.
        scales: standard deviation along each axis on the rows it was fitted on; 0 where they do not vary.
    """

    span: Float[Tensor, "dims rank"]
    axes: Float[Tensor, "classes subclasses dims"]
    means: Float[Tensor, "classes dims"]
    scales: Float[Tensor, "classes subclasses"]


def fit(
    embeddings: Float[Tensor, "rows dims"],
    weights: Float[Tensor, "classes dims"],
    labels: Int[Tensor, " rows"],
    *,
    per_class: int,
    generator: np.random.Generator,
) -> Directions:
    """Directions of greatest variance inside each class, orthogonal to the class weights, randomly rotated.

    h' = (I - U U^T) h, U an orthonormal basis of the weights centred over classes (rank at most classes - 1; the
    class probabilities do not see h'); V_c the first `per_class` principal directions of h' within class c; axes V_c Q
    with a random rotation Q, so that the subclasses share the variance. `labels` are training labels, or the teacher's
    own answers. `class_weights` recovers the weights where only logits are stored.

    Raises:
        UsageError: shapes do not fit, a label out of range, a class with too few rows, too few dimensions left.
    """
    if embeddings.shape[0] != len(labels) or embeddings.shape[1] != weights.shape[1]:
        raise UsageError(
            f"embeddings {list(embeddings.shape)}, weights {list(weights.shape)}, {len(labels)} labels; expected "
            "[rows, dims], [classes, dims] and one label per row."
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= len(weights)):
        raise UsageError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; expected 0 ... {len(weights) - 1}."
        )
    span = _span(weights.detach().double())
    free = span.shape[0] - span.shape[1]
    if not 1 <= per_class <= free:
        raise UsageError(
            f"per_class {per_class}: expected 1 to {free}, the dimensions that the class scores do not see."
        )
    outside = _outside(embeddings.detach().double(), span)
    means, axes, scales = [], [], []
    for number in range(len(weights)):
        rows = outside[labels == number]
        if len(rows) <= per_class:
            raise UsageError(
                f"class {number} has {len(rows)} rows; {per_class} directions need {per_class + 1} or more."
            )
        mean = rows.mean(0)
        turned = _rotation(per_class, generator).to(rows.device) @ _principal(rows - mean, per_class)
        means.append(mean)
        axes.append(turned)
        scales.append(((rows - mean) @ turned.T).std(0, correction=0))
    return Directions(span, torch.stack(axes), torch.stack(means), torch.stack(scales))


def coordinates(
    embeddings: Float[Tensor, "rows dims"], directions: Directions
) -> Float[Tensor, "rows classes subclasses"]:
    """z_cs = v_cs . (h' - mean_c) / scale_cs of every row in every class; 0 along an axis of no variance.

    Raises:
        UsageError: embeddings of another width.
    """
    if embeddings.shape[1] != len(directions.span):
        raise UsageError(f"embeddings have {embeddings.shape[1]} dimensions; the directions {len(directions.span)}.")
    outside = _outside(embeddings.detach().double(), directions.span.to(embeddings.device))
    axes, means, scales = (x.to(outside) for x in (directions.axes, directions.means, directions.scales))
    z = torch.einsum("nd,csd->ncs", outside, axes) - torch.einsum("cd,csd->cs", means, axes)
    flat = scales <= 1e-9 * scales.max()
    z = torch.where(flat, 0, z / torch.where(flat, 1, scales))
    return z.to(torch.promote_types(embeddings.dtype, torch.float32))


def subclass_targets(
    teacher: Float[Tensor, "rows classes"],
    coordinate: Float[Tensor, "rows classes subclasses"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "rows outputs"]:
    """log P(c, s) = log softmax(teacher)_c + log softmax_s(z_c / temperature), detached: scores for `objectives.kl`.

    KL(P_T, P_S) = KL of the class probabilities + sum_c p_c KL of the splits of class c. A large temperature makes
    the splits uniform; one subclass gives the plain teacher.

    Raises:
        UsageError: shapes do not fit, the temperature is not positive.
    """
    if coordinate.shape[:2] != teacher.shape:
        raise UsageError(
            f"coordinates {list(coordinate.shape)} and teacher {list(teacher.shape)}; expected [rows, classes, "
            "subclasses] and [rows, classes]."
        )
    check_temperature(temperature)
    dtype = torch.promote_types(torch.promote_types(teacher.dtype, coordinate.dtype), torch.float32)
    log_p = torch.log_softmax(teacher.detach().to(dtype), dim=-1)
    log_split = torch.log_softmax(coordinate.detach().to(dtype) / temperature, dim=-1)
    return (log_p[:, :, None] + log_split).flatten(1)


def class_scores(student: Float[Tensor, "rows outputs"], num_classes: int) -> Float[Tensor, "rows classes"]:
    """Scores of the classes from those of the subclasses: logsumexp over s, so probabilities add up.

    Raises:
        UsageError: the outputs are no multiple of the classes.
    """
    if num_classes < 1 or student.shape[1] % num_classes:
        raise UsageError(f"{student.shape[1]} outputs are not a whole number of subclasses for {num_classes} classes.")
    return torch.logsumexp(student.reshape(len(student), num_classes, student.shape[1] // num_classes), dim=-1)


def class_weights(
    embeddings: Float[Tensor, "rows dims"], logits: Float[Tensor, "rows classes"]
) -> Float[Tensor, "classes dims"]:
    """Weights W (and a bias, dropped) of least squares, logits = W h + b: what a linear head had, from its outputs."""
    h, y = embeddings.detach().double(), logits.detach().double()
    solution: Tensor = torch.linalg.lstsq(h - h.mean(0), y - y.mean(0), driver="gelsd").solution
    return solution.T


def _span(weights: Float[Tensor, "classes dims"]) -> Float[Tensor, "dims rank"]:
    """Orthonormal basis of the weights centred over classes: a shift common to all classes changes no probability."""
    found = torch.linalg.svd(weights - weights.mean(0), full_matrices=False)
    sizes: Tensor = found.S
    axes: Tensor = found.Vh
    return axes[sizes > 1e-9 * sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)].T


def _outside(embeddings: Float[Tensor, "rows dims"], span: Float[Tensor, "dims rank"]) -> Float[Tensor, "rows dims"]:
    return embeddings - (embeddings @ span) @ span.T


def _principal(centred: Float[Tensor, "rows dims"], count: int) -> Float[Tensor, "count dims"]:
    """The first principal directions, signs fixed by their largest entry so that they do not depend on the library."""
    axes: Tensor = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)


def _rotation(size: int, generator: np.random.Generator) -> Float[Tensor, "size size"]:
    """A uniformly random orthogonal matrix: QR of a Gaussian one, with the signs of R moved into Q."""
    q, r = np.linalg.qr(generator.normal(size=(size, size)))
    return torch.from_numpy(np.ascontiguousarray(q * np.sign(np.diag(r))))
