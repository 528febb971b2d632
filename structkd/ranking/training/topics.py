"""Batches of one topic: queries clustered by their vectors, one margin-balanced pair of documents per query."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.ids import fingerprint_arrays
from structkd.progress import note
from structkd.ranking.data.collection import Collection
from structkd.ranking.training.train import Lists, Plan

IntArray = NDArray[np.int64]

_ROUNDS = 25


def topics_of(vectors: Float[np.ndarray, "queries dimension"], count: int, seed: int = 0) -> IntArray:
    """Cluster of each query: k-means over unit vectors, first centres drawn at random, an empty cluster takes the
    query that is farthest from its centre."""
    points = torch.nn.functional.normalize(torch.from_numpy(np.asarray(vectors, dtype=np.float32)), dim=-1)
    count = min(count, len(points))
    start = np.random.default_rng([seed, count]).permutation(len(points))[:count]
    centres, owner = points[torch.from_numpy(np.sort(start))].clone(), torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        best, found = (points @ centres.T).max(dim=1)
        if torch.equal(found, owner):
            break
        owner = found
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        empty = (torch.bincount(owner, minlength=count) == 0).nonzero()[:, 0]
        sums[empty] = points[best.argsort()[: len(empty)]]
        centres = torch.nn.functional.normalize(sums, dim=-1)
    return owner.numpy().astype(np.int64)


@dataclass(frozen=True)
class TopicPlan(Plan):
    """TAS-Balanced batches (Hofstatter et al. 2021, section 3.2): queries of one topic, a balanced pair for each.

    Each epoch names every query once. A topic's queries are shuffled and cut into batches; what is left of the topics
    is joined in topic order, so that no query is lost. A query's pair: its margins fall into `bins` bins of equal
    width, a bin that holds any is drawn, then a pair in it; the positive comes first in the batch. A single pair is
    its own bin, and so are equal margins (bins of no width).

    Attributes:
        topics: topic of each list.
        positive: True at the flat pairs that are positives.
        bins: margin bins.
    """

    topics: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    positive: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    bins: int = 10

    def identity(self) -> list[str]:
        """What tells these batches from others."""
        return [fingerprint_arrays(topics=self.topics, positive=self.positive, bins=np.asarray([self.bins]))]

    def epoch(self, number: int) -> list[list[tuple[int, IntArray]]]:
        """Batches of (list, [positive, negative] item positions)."""
        generator = np.random.default_rng([self.seed, number])
        whole: list[IntArray] = []
        left: list[IntArray] = []
        for topic in np.unique(self.topics):
            queries = generator.permutation(np.flatnonzero(self.topics == topic))
            cut = len(queries) // self.batch_lists * self.batch_lists
            whole += np.split(queries[:cut], cut // self.batch_lists) if cut else []
            left.append(queries[cut:])
        rest = np.concatenate(left)
        whole += [rest[low : low + self.batch_lists] for low in range(0, len(rest), self.batch_lists)]
        order = generator.permutation(len(whole))
        return [[(int(row), self._pair(int(row), generator)) for row in whole[place]] for place in order]

    def _pair(self, row: int, generator: np.random.Generator) -> IntArray:
        low, high = int(self.lists.offsets[row]), int(self.lists.offsets[row + 1])
        held = self.positive[low:high]
        first, second = np.flatnonzero(held), np.flatnonzero(~held)
        scores = self.lists.targets[low:high].astype(np.float64)
        margins = (scores[first][:, None] - scores[second][None]).reshape(-1)
        place = balanced(margins, self.bins, generator)
        return low + np.asarray([first[place // len(second)], second[place % len(second)]], dtype=np.int64)


def balanced(margins: Float[np.ndarray, " pairs"], bins: int, generator: np.random.Generator) -> int:
    """A position: a bin drawn among those that hold a margin, then one of its margins."""
    low, width = float(margins.min()), float(np.ptp(margins)) / bins
    # the largest margin belongs to the last bin, and rounding cannot make one more
    of = np.zeros(len(margins), dtype=np.int64)
    if width > 0:
        of = np.minimum(((margins - low) / width).astype(np.int64), bins - 1)
    return int(generator.choice(np.flatnonzero(of == generator.choice(np.unique(of)))))


def with_pairs(lists: Lists, collection: Collection) -> tuple[Lists, NDArray[np.bool_]]:
    """(lists that have a pair, True at their positives).

    Positives are the judged ones; of a list without a judged one, the teacher's best document. A list of positives
    alone has no pair and is left out with a note.

    Raises:
        DataError: no list has a pair.
    """
    kept: list[int] = []
    marks: list[NDArray[np.bool_]] = []
    ids = lists.queries.ids
    for row, query in enumerate(lists.query_rows):
        low, high = int(lists.offsets[row]), int(lists.offsets[row + 1])
        judged = set(collection.positives(ids[int(query)]))
        names = lists.documents.ids.strings(lists.document_rows[low:high])
        mark = np.asarray([name in judged for name in names], dtype=bool)
        if not mark.any() and high > low:
            mark[int(np.argmax(lists.targets[low:high]))] = True
        if mark.any() and not mark.all():
            kept.append(row)
            marks.append(mark)
    if not kept:
        raise DataError(f"{collection.name}: none of {len(lists)} lists has a positive and another document.")
    if len(kept) < len(lists):
        note(f"{collection.name}: {len(lists) - len(kept)} lists without a pair of positive and negative, left out")
    return lists.take(kept), np.concatenate(marks)
