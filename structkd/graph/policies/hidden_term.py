"""A term on hidden activations: what the student's last layer reads against what the teacher's reads."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from structkd.errors import UsageError
from structkd.graph.methods.lesson import Lesson
from structkd.graph.policies.flags import Policies
from structkd.graph.published import given
from structkd.policies import REPRESENTATION_FLAG, SAME_WIDTH, choice, representation_loss

_SAMPLE = 256  # nodes of an epoch's term, whose cost is quadratic
_NEIGHBOURS = 5


class HiddenTerm:
    """One of the representation objectives on some asked nodes, drawn anew in each epoch.

    Attributes:
        projection: a linear map from the student's width to the teacher's, trained with the student; None where only
            relations count.

    Raises:
        UsageError: a student of one layer, which has no hidden activations.
    """

    def __init__(
        self,
        lesson: Lesson,
        policies: Policies,
        asked: Int[Tensor, " asked"],
        embeddings: Float[Tensor, "nodes dims"],
        generator: np.random.Generator,
    ) -> None:
        if given(lesson.config.layers) < 2:
            raise UsageError("a student of one layer has no hidden activations; use --layers 2 or more.")
        self.name, self.alpha = choice("--representation", policies.representation, REPRESENTATION_FLAG)
        self.seen, self.asked, self.embeddings, self.generator = lesson.seen, asked, embeddings, generator
        self.projection: torch.nn.Linear | None = None
        if self.name in SAME_WIDTH:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(lesson.seed + 1)
                self.projection = torch.nn.Linear(given(lesson.config.hidden), embeddings.shape[1])

    def value(self, hidden: Float[Tensor, "nodes hidden"]) -> Float[Tensor, ""]:
        """The term for one epoch."""
        size = min(_SAMPLE, len(self.asked))
        rows = self.asked[torch.from_numpy(self.generator.choice(len(self.asked), size, replace=False))]
        neighbours = None
        if self.name == "affinity-kl":
            rows, neighbours = self._with_neighbours(rows)
        mine = hidden[rows] if self.projection is None else self.projection(hidden[rows])
        return representation_loss(self.name, mine, self.embeddings[rows], alpha=self.alpha, neighbours=neighbours)

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
