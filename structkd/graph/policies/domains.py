"""Parts of a graph weighed by how far the student lags behind the teacher in each (DDK)."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from structkd import acquisition
from structkd.graph.data.task import Features, GraphTask
from structkd.graph.models.networks import Mlp
from structkd.graph.policies.flags import DOMAINS
from structkd.policies import choice


class NodeDomains:
    """Domains of nodes and their shares, `acquisition.domain_weights` of validation cross-entropies.

    "degree:PARTS": quantiles of the degree. "class": the teacher's answer.

    Attributes:
        domain_of: domain of each observed node.
        shares: share of each domain, equal at first.
    """

    def __init__(self, text: str, seen: GraphTask, teacher: Float[Tensor, "nodes classes"]) -> None:
        self.seen, self.teacher = seen, teacher
        self.domain_of = _domain_of(text, seen, teacher)
        count = int(self.domain_of.max()) + 1
        self.shares: Float[np.ndarray, " domains"] = np.full(count, 1 / count)
        self._first = True

    def weights(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Weight of each of these nodes: its domain's share over the domain's part of them; mean 1."""
        domain = self.domain_of[rows]
        counts = torch.bincount(domain, minlength=len(self.shares)).clamp(min=1)
        return (torch.from_numpy(self.shares).float() * len(rows) / counts)[domain]

    @torch.no_grad()
    def look(self, student: Mlp, x: Features) -> None:
        """New shares from what student and teacher lose on the validation nodes of each domain."""
        rows = torch.nonzero(self.seen.valid).flatten()
        student.eval()
        mine = student(x)[rows]
        student.train()
        losses = [
            cross_entropy(out, self.seen.y[rows], reduction="none").double() for out in (mine, self.teacher[rows])
        ]
        member = one_hot(self.domain_of[rows], len(self.shares)).double()
        count = member.sum(0)
        # a domain without a validation node shows no lag of its own: it takes the mean of all
        means = [torch.where(count > 0, member.T @ loss / count.clamp(min=1), loss.mean()).numpy() for loss in losses]
        self.shares = acquisition.domain_weights(means[0], means[1], previous=None if self._first else self.shares)
        self._first = False


def _domain_of(text: str, seen: GraphTask, teacher: Tensor) -> Int[Tensor, " nodes"]:
    name, parts = choice("--domains", text, DOMAINS)
    if name == "class":
        return teacher.argmax(1)
    degrees = seen.degrees.double()
    inner = torch.linspace(0, 1, round(parts) + 1, dtype=torch.float64)[1:-1]
    return torch.bucketize(degrees, torch.unique(torch.quantile(degrees, inner)))
