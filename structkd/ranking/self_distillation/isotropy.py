"""Labels from sentence vectors whose common direction is taken out: softly whitened cosines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from structkd.files import atomic_path
from structkd.ids import Pairs, fingerprint_arrays
from structkd.ranking.self_distillation.pseudo_labels import SentenceScorer
from structkd.scores.manifest import TeacherSpec

LabelSpace = Literal["auto", "raw", "whitened"]
Vectors = NDArray[np.float32]

ANISOTROPIC = 0.15
"Mean cosine of two random texts above which `auto` whitens: encoders trained with contrast have some hundredths."

_POWER = 0.25  # of full whitening (1); 0 only takes the mean away
_FLOOR = 1e-3  # of the largest variance: directions of less are noise that whitening would blow up


@dataclass(frozen=True)
class Whitening:
    """x -> (x - centre) @ axes, which gives each principal direction of variance v the variance v^(1 - power).

    Full whitening (power 1: Su et al. 2021, arXiv 2103.15316) also levels what carries meaning; a quarter of it keeps
    most of that and loses the direction that all texts share (Mu and Viswanath 2018, arXiv 1702.01417).

    Attributes:
        centre: float32 [dimension].
        axes: float32 [dimension, dimension].
    """

    centre: Vectors
    axes: Vectors

    @classmethod
    def fit(cls, vectors: Vectors, power: float = _POWER) -> "Whitening":
        """From the vectors [texts, dimension] of distinct texts."""
        wide = vectors.astype(np.float64)
        centre = wide.mean(0)
        variances, directions = np.linalg.eigh((wide - centre).T @ (wide - centre) / len(wide))
        scale = np.maximum(variances, max(_FLOOR * float(variances[-1]), 1e-12)) ** (-power / 2)
        return cls(centre.astype(np.float32), (directions * scale).astype(np.float32))

    @classmethod
    def load(cls, path: Path) -> "Whitening":
        """What `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["centre"], arrays["axes"])

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, centre=self.centre, axes=self.axes)

    def cosines(self, left: Vectors, right: Vectors) -> Vectors:
        """Cosine of each row of `left` with the same row of `right`, both whitened; 0 for a vector that is the mean."""
        sides = [(side - self.centre) @ self.axes for side in (left, right)]
        norms = [np.linalg.norm(side, axis=1) for side in sides]
        return np.asarray((sides[0] * sides[1]).sum(1) / np.maximum(norms[0] * norms[1], 1e-12), dtype=np.float32)


class WhitenedScorer:
    """A Scorer of sentence pairs: cosines of a bi-encoder's softly whitened vectors."""

    def __init__(self, scorer: SentenceScorer, whitening: Whitening) -> None:
        self.scorer, self.whitening = scorer, whitening

    @property
    def spec(self) -> TeacherSpec:
        """The bi-encoder's, and which whitening."""
        spec = self.scorer.spec
        used = fingerprint_arrays(centre=self.whitening.centre, axes=self.whitening.axes)
        return TeacherSpec(**{**spec.fields(), "head": "whitened cosine", "extra": {**spec.extra, "whitening": used}})

    def score(self, pairs: Pairs) -> Float[Tensor, " pairs"]:
        """Whitened cosines, float32 on the CPU."""
        if not len(pairs):
            return torch.empty(0)
        left, right = (self.scorer.encode(texts, "document") for texts in (pairs.query_texts, pairs.document_texts))
        return torch.from_numpy(self.whitening.cosines(left, right))


def mean_cosine(vectors: Vectors) -> float:
    """Mean cosine of two random texts: the squared length of the mean of the normalised vectors [texts, dimension].

    The anisotropy of Ethayarajh 2019 (arXiv 1909.00512, section 4.1) with sentences in place of words.
    """
    normalised = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return float((normalised.mean(0, dtype=np.float64) ** 2).sum())


def sentence_vectors(scorer: SentenceScorer, pairs: Pairs) -> Vectors:
    """[sentences, dimension] vectors of the distinct sentences of the pairs."""
    rows = np.unique(np.concatenate([pairs.query_rows, pairs.document_rows]))
    return scorer.encode([pairs.documents.texts[row] for row in rows], "document")
