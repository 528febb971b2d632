"""Fill a store from a teacher: what is missing is planned once, cut into units, and shared by any number of workers.

Workers share nothing but the folder: each takes units of the one kept plan (its rank's, or a range of a job array),
asks the teacher, and commits. A killed worker loses its unit; started again it goes on with what is missing.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError, UsageError
from structkd.ids import Pairs, Texts, text_hash
from structkd.progress import note, track
from structkd.scores.cache import Scorer
from structkd.scores.layout.id_table import IdTable
from structkd.scores.layout.log import PairLog, Unit
from structkd.scores.pairs import PairScores

IntArray = NDArray[np.int64]
UNIT_ROWS = 2048


@dataclass(frozen=True)
class Share:
    """Which units of the plan a worker takes."""

    rank: int = 0
    "This worker's number; torchrun's RANK."

    world: int = 1
    "How many workers there are; torchrun's WORLD_SIZE."

    first: int | None = None
    "First unit of a range instead (a job array)."

    last: int | None = None
    "One past the last unit of the range."

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world} workers: expected 0 to {self.world - 1}.")
        if (self.first or 0) < 0 or (self.last is not None and self.last <= (self.first or 0)):
            raise UsageError(f"unit range {self.first}:{self.last}: expected A:B with 0 <= A < B.")

    def of(self, plan: list[Unit]) -> list[Unit]:
        """The units of this worker."""
        return plan[self.first : self.last][self.rank :: self.world]


@dataclass
class Cost:
    """What a production asked for and what it took.

    Attributes:
        pairs: distinct pairs wanted.
        found: of these, in the store already.
        same_text: of these, under other ids of the same texts: copied, not asked.
        asked: pairs that the teacher scored here.
        texts: distinct texts (queries and documents) that it read for them.
        tokens: tokens that it read, where the scorer counts them.
        seconds: spent in the teacher.
        units: units committed here.
        left: units of the plan that nobody has committed yet.
    """

    pairs: int = 0
    found: int = 0
    same_text: int = 0
    asked: int = 0
    texts: int = 0
    tokens: int | None = None
    seconds: float = 0.0
    units: int = 0
    left: int = 0

    def fields(self) -> dict[str, Any]:
        """For a command's JSON."""
        return {**asdict(self), "pairs_per_second": self.asked / self.seconds if self.seconds else None}


class Production:
    """The plan of one set of pairs for one teacher.

    Attributes:
        log: the store's log.
        plan: every unit, in the order that all workers share.
        cost: counts so far.
    """

    def __init__(self, scorer: Scorer, pairs: Pairs, folder: str | Path, *, unit_rows: int = UNIT_ROWS) -> None:
        if unit_rows < 1:
            raise UsageError(f"unit_rows {unit_rows}: expected 1 or more.")
        self.folder = Path(folder)
        self.log = PairLog.open(folder, scorer.spec)
        self._queries = _Side(pairs.queries, pairs.query_rows, self.log.queries)
        self._documents = _Side(pairs.documents, pairs.document_rows, self.log.documents)
        rows = self._queries.rows[pairs.query_rows], self._documents.rows[pairs.document_rows]
        wanted = np.unique((rows[0] << 32) | rows[1])
        queries, documents = wanted >> 32, wanted & 0xFFFFFFFF
        self._wanted = queries, documents
        canonical = (self._queries.first_of(queries) << 32) | self._documents.first_of(documents)
        distinct = np.unique(canonical)
        self.cost = Cost(pairs=len(wanted), same_text=len(wanted) - len(distinct))
        self._canonical = canonical
        self.plan = self.log.plan(distinct >> 32, distinct & 0xFFFFFFFF, self._scored, unit_rows)
        self.cost.found = len(distinct) - sum(map(len, self.pending()))

    def _scored(self, queries: IntArray, documents: IntArray) -> NDArray[np.bool_]:
        return PairScores.open(self.folder).positions_of_rows(queries, documents) >= 0

    def pending(self, share: Share = Share()) -> list[Unit]:
        """Units of a share that nobody has committed."""
        done = self.log.units()
        return [unit for unit in share.of(self.plan) if unit.name not in done]

    def pairs_of(self, unit: Unit) -> Pairs:
        """The texts that the teacher reads for a unit."""
        queries, documents = self._queries, self._documents
        return Pairs(
            queries.texts, documents.texts, queries.text_of[unit.query_rows], documents.text_of[unit.document_rows]
        )

    def score(self, scorer: Scorer, unit: Unit) -> bool:
        """Ask the teacher for a unit and commit it; False when another worker was faster.

        Raises:
            DataError: the teacher gave something else than one finite number per pair.
        """
        pairs = self.pairs_of(unit)
        counted = getattr(scorer, "tokens_read", None)
        started = time.perf_counter()
        scores = scorer.score(pairs).detach().cpu().float().numpy()
        self.cost.seconds += time.perf_counter() - started
        if scores.shape != (len(unit),):
            raise DataError(f"{scorer.spec.model}: scores of shape {scores.shape} for {len(unit)} pairs.")
        self.cost.asked += len(unit)
        self.cost.texts += len(np.unique(pairs.query_rows)) + len(np.unique(pairs.document_rows))
        if counted is not None:
            self.cost.tokens = (self.cost.tokens or 0) + int(scorer.tokens_read - counted)  # type: ignore[attr-defined]
        committed = self.log.commit(unit, scores)
        self.cost.units += committed
        return committed

    def finish(self) -> None:
        """Give pairs of the same texts the scores that are there, and count the units that are left."""
        self.cost.left = len(self.pending())
        queries, documents = self._wanted
        copies = np.flatnonzero(((queries << 32) | documents) != self._canonical)
        if not len(copies):
            return
        store = PairScores.open(self.folder)
        canonical = self._canonical[copies]
        values = store.lookup_rows(canonical >> 32, canonical & 0xFFFFFFFF, missing="nan")
        there = store.positions_of_rows(queries[copies], documents[copies]) >= 0
        fresh = copies[~np.isnan(values) & ~there]
        if len(fresh):
            unit = self.log.unit(queries[fresh], documents[fresh])  # `wanted` is sorted, so is the unit
            self.log.commit(unit, values[~np.isnan(values) & ~there])


class _Side:
    """Queries or documents: rows of the texts given, rows of the store's id table, and equal texts."""

    def __init__(self, texts: Texts, used: IntArray, table: IdTable) -> None:
        self.texts = texts
        own = np.unique(used)
        hashes = [text_hash(texts.texts[row]) for row in own.tolist()]
        rows = table.extend(texts.ids.strings(own), hashes)
        self.rows = np.full(len(texts), -1, dtype=np.int64)
        self.rows[own] = rows
        self.text_of = np.full(len(table), -1, dtype=np.int64)
        self.text_of[rows] = own
        first: dict[bytes, int] = {}
        self._first = np.arange(len(table), dtype=np.int64)
        for row, digest in zip(rows.tolist(), hashes, strict=True):
            self._first[row] = first.setdefault(digest, row)

    def first_of(self, rows: IntArray) -> IntArray:
        """The first wanted row with the same text."""
        return self._first[rows]


def produce(
    scorer: Scorer, pairs: Pairs, folder: str | Path, *, share: Share = Share(), unit_rows: int = UNIT_ROWS
) -> Cost:
    """Score the pairs that the store in `folder` lacks, as far as they are this worker's share.

    Pairs named twice count once, and pairs of equal texts under other ids are copied. Interrupted, the same call
    continues; workers with other shares may run at the same time on any machine that sees the folder.

    Raises:
        TeacherMismatchError: the folder holds another teacher's scores.
    """
    job = Production(scorer, pairs, folder, unit_rows=unit_rows)
    for unit in reported(job, job.pending(share), scorer.spec.model):
        job.score(scorer, unit)
    job.finish()
    return job.cost


def reported(job: Production, units: list[Unit], name: str, every: float = 30.0) -> Iterator[Unit]:
    """The units, with a bar on a terminal, else a line with rate, cost and time left every so often."""
    total, done = sum(map(len, units)), 0
    last = started = time.monotonic()
    clock: Callable[[], float] = time.monotonic
    for unit in track(units, f"asking {name}", lines=False):
        yield unit
        done += len(unit)
        if clock() - last > every:
            last = clock()
            rate = done / (last - started)
            left = time.strftime("%H:%M:%S", time.gmtime((total - done) / rate))
            tokens = "" if job.cost.tokens is None else f", {job.cost.tokens:,} tokens"
            note(f"{name}: {done:,} of {total:,} pairs{tokens}, {rate:.1f} pairs/s, {left} left")
