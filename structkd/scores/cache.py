"""Scorers: the protocol of teachers, a cache around one, and a stored teacher that is asked instead of the model."""

import time
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import DataError, MissingScoreError
from structkd.ids import Pairs, Texts, text_hash
from structkd.progress import track
from structkd.scores.compaction.compact import compact
from structkd.scores.layout.id_table import IdTable, TextHash
from structkd.scores.layout.log import PairLog
from structkd.scores.manifest import TeacherSpec
from structkd.scores.pairs import PairScores

IntArray = NDArray[np.int64]
_REOPEN_AFTER = 200_000  # fresh scores held in a dict before they are read back as arrays


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores pairs: a teacher, a student, a cache around one."""

    @property
    def spec(self) -> TeacherSpec:
        """What decides the scores."""
        ...

    def score(self, pairs: Pairs) -> Float[Tensor, "pairs"]:
        """One score per pair, float32 on the CPU."""
        ...


class CachedScorer:
    """A Scorer around a Scorer: found scores come from the folder, the inner one is asked for the rest, once.

    New scores are committed in units as they come, so a killed process loses one unit at most. Texts are part of the
    key: a changed text under an old id is asked again, and equal texts under several ids are asked once.

    Attributes:
        asked: pairs that the inner scorer scored.
        found: pairs that came from the store.
        seconds: spent in the inner scorer.
    """

    def __init__(self, scorer: Scorer, folder: str | Path, *, unit_rows: int = 1024) -> None:
        self.scorer, self.folder, self.unit_rows = scorer, Path(folder), unit_rows
        self.asked = self.found = 0
        self.seconds = 0.0
        self._log = PairLog.open(folder, scorer.spec)
        self._stored = PairScores.open(self.folder)
        self._fresh: dict[int, float] = {}
        self._rows: dict[tuple[int, int], tuple[Texts, IntArray]] = {}  # by text table and side

    @property
    def spec(self) -> TeacherSpec:
        """The inner scorer's."""
        return self.scorer.spec

    def store(self) -> PairScores:
        """Everything cached so far, compacted and opened for lookups."""
        compact(self.folder)
        return PairScores.open(self.folder)

    def score(self, pairs: Pairs) -> Float[Tensor, "pairs"]:
        """Scores of the pairs, float32 on the CPU.

        Raises:
            DataError: the inner scorer gave something else than one finite number per pair.
        """
        queries = self._intern(pairs.queries, pairs.query_rows, self._log.queries)
        documents = self._intern(pairs.documents, pairs.document_rows, self._log.documents)
        out = self._known(queries, documents)
        missing = np.flatnonzero(np.isnan(out))
        before = self.asked
        if len(missing):
            self._ask(pairs, queries, documents, missing)
            out[missing] = self._known(queries[missing], documents[missing])
        self.found += len(out) - (self.asked - before)
        return torch.from_numpy(out)

    def _known(self, queries: IntArray, documents: IntArray) -> NDArray[np.float32]:
        """Scores from the store and from this process's commits; not-a-number where there is none."""
        out = self._stored.lookup_rows(queries, documents, missing="nan")
        if self._fresh:
            missing = np.flatnonzero(np.isnan(out))
            keys = (queries[missing] << 32) | documents[missing]
            out[missing] = [self._fresh.get(key, np.nan) for key in keys.tolist()]
        return out

    def _ask(self, pairs: Pairs, queries: IntArray, documents: IntArray, missing: IntArray) -> None:
        """Score distinct missing pairs unit by unit and commit each unit at once."""
        _, first = np.unique((queries[missing] << 32) | documents[missing], return_index=True)
        wanted = missing[first]
        blocks = range(0, len(wanted), self.unit_rows)
        for start in track(blocks, f"asking {self.spec.model}") if len(blocks) > 1 else blocks:
            block = wanted[start : start + self.unit_rows]  # np.unique sorted it by key, as a unit is
            scores = self._ask_block(pairs.take(block), queries[block], documents[block])
            self._log.commit(self._log.unit(queries[block], documents[block]), scores)
            self._fresh.update(zip(((queries[block] << 32) | documents[block]).tolist(), scores.tolist(), strict=True))
        if len(self._fresh) > _REOPEN_AFTER:
            self._stored, self._fresh = PairScores.open(self.folder), {}

    def _ask_block(self, pairs: Pairs, queries: IntArray, documents: IntArray) -> NDArray[np.float32]:
        """Ask for pairs of distinct texts that have no score under any id; ids that share a text share the score."""
        scores = self._of_same_texts(queries, documents)
        unknown = np.flatnonzero(np.isnan(scores))
        if len(unknown):
            scores[unknown] = self._ask_distinct(pairs.take(unknown), queries[unknown], documents[unknown])
        return scores

    def _of_same_texts(self, queries: IntArray, documents: IntArray) -> NDArray[np.float32]:
        """Scores that pairs of the same texts have under other ids; not-a-number where there is none."""
        out = np.full(len(queries), np.nan, dtype=np.float32)
        triples = [
            (i, query, document)
            for i, (own_query, own_document) in enumerate(zip(queries.tolist(), documents.tolist(), strict=True))
            for query in self._log.queries.same_text(own_query)
            for document in self._log.documents.same_text(own_document)
            if (query, document) != (own_query, own_document)
        ]
        if triples:
            at, other_queries, other_documents = np.asarray(triples, dtype=np.int64).T
            values = self._known(other_queries, other_documents)
            out[at[~np.isnan(values)]] = values[~np.isnan(values)]
        return out

    def _ask_distinct(self, pairs: Pairs, queries: IntArray, documents: IntArray) -> NDArray[np.float32]:
        keys = np.concatenate([_text_keys(self._log.queries, queries), _text_keys(self._log.documents, documents)], 1)
        _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        started = time.perf_counter()
        answer = self.scorer.score(pairs.take(first))
        self.seconds += time.perf_counter() - started
        scores = answer.detach().to("cpu", torch.float32).numpy()
        if scores.shape != (len(first),):
            raise DataError(f"{self.spec.model}: scores of shape {scores.shape} for {len(first)} pairs.")
        self.asked += len(first)
        return np.ascontiguousarray(scores[back.reshape(-1)])

    def _intern(self, texts: Texts, rows: IntArray, table: IdTable) -> IntArray:
        """Rows of the store's id table for rows of a text table; remembered per text table."""
        key = (id(texts), id(table))  # sentence pairs have one text table on both sides
        held, known = self._rows.get(key, (texts, np.full(len(texts), -1, dtype=np.int64)))
        fresh = np.unique(rows[known[rows] < 0]) if len(rows) else rows
        if len(fresh):
            rows_of = fresh.tolist()
            hashes: list[TextHash] = [text_hash(texts.texts[row]) for row in rows_of]
            known[fresh] = table.extend(texts.ids.strings(rows_of), hashes)
        self._rows[key] = (held, known)  # holding the table keeps its address from being reused
        return known[rows]


def _text_keys(table: IdTable, rows: IntArray) -> NDArray[np.uint64]:
    """[rows, 2] the 16 bytes of each text hash (of the id, where the text is unknown)."""
    keys = b"".join(table.hashes[row] or table.keys(np.asarray([row])).tobytes() for row in rows)
    return np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)


class StoredScorer:
    """A Scorer over an existing store: no model, no writing; a pair that was never scored is an error.

    Args:
        store: from `scores.open`.
        match: "text" wants the texts that the teacher read where the store knows them; "id" trusts the ids.

    Attributes:
        found: pairs that were read.
    """

    def __init__(self, store: PairScores, match: Literal["text", "id"] = "text") -> None:
        if not isinstance(store, PairScores):
            raise DataError(f"{store!r}: expected scores of pairs, not of nodes.")
        self._store, self.match = store, match
        self.found = 0
        self._hashes: dict[int, tuple[Texts, dict[int, TextHash]]] = {}

    @property
    def spec(self) -> TeacherSpec:
        """The teacher that wrote the store."""
        return self._store.spec

    def store(self) -> PairScores:
        """The store."""
        return self._store

    def score(self, pairs: Pairs) -> Float[Tensor, "pairs"]:
        """Scores of the pairs, float32 on the CPU; MissingScoreError with the count and three examples."""
        self.found += len(pairs)
        if self.match == "id":
            return torch.from_numpy(self._store.lookup(pairs.query_ids, pairs.document_ids))
        query_ids, document_ids = pairs.query_ids, pairs.document_ids
        scores = self._store.lookup_texts(
            query_ids,
            self._text_hashes(pairs.queries, pairs.query_rows),
            document_ids,
            self._text_hashes(pairs.documents, pairs.document_rows),
        )
        if (missing := np.flatnonzero(np.isnan(scores))).size:
            by_id = self._store.lookup(query_ids, document_ids, missing="nan")
            changed = int((~np.isnan(by_id[missing])).sum())
            hint = (
                f"{changed} of them are there under another text: was the teacher given other texts? "
                if changed
                else ""
            )
            raise MissingScoreError(
                len(missing),
                [(query_ids[i], document_ids[i]) for i in missing[:3]],
                f"{self._store.folder}: of {len(pairs)} pairs",
                f"{hint}Score them with this teacher first.",
            )
        return torch.from_numpy(scores)

    def _text_hashes(self, texts: Texts, rows: IntArray) -> list[TextHash]:
        _, known = self._hashes.setdefault(id(texts), (texts, {}))
        for row in set(rows.tolist()) - known.keys():
            known[row] = text_hash(texts.texts[row])
        return [known[row] for row in rows.tolist()]
