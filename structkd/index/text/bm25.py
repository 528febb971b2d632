"""Bm25Index: BM25 over texts with bm25s, English stop words and the Snowball English stemmer; no Java."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import Stemmer
import torch
from numpy.typing import NDArray
from torch import Tensor

from structkd.errors import CorruptFileError, DataError
from structkd.ids import Texts
from structkd.index.folder.draft import Draft
from structkd.index.folder.storage import Stored
from structkd.index.opened import OpenedTexts
from structkd.index.topk import NO_ROW, TopK
from structkd.ordering import top_k
from structkd.progress import track


@contextmanager
def _without_jax() -> Iterator[None]:
    """bm25s warms up JAX where that is installed, and JAX then takes three quarters of a GPU; nothing here needs it."""
    hide = "jax" not in sys.modules
    if hide:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules["jax"]


with _without_jax():
    import bm25s

_STOP_WORDS = "english"
_STEMMER = "english"
ANALYSIS = {"stop_words": _STOP_WORDS, "stemmer": f"snowball {_STEMMER}"}
_BACKEND = "numpy"  # named, so that an installed numba does not change which code runs


class Bm25Index(OpenedTexts):
    """BM25 in Lucene's form: sum over query words of idf * tf / (tf + k1 (1 - b + b length / mean length)).

    Robertson and Zaragoza 2009, eq. 3.15, with idf = ln(1 + (N - n + 0.5) / (n + 0.5)) (Kamphuis et al. 2020, table 1,
    "Lucene (accurate)"). A word that occurs twice in the query counts twice.
    """

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        arrays = stored.arrays("bm25")
        try:
            words = arrays["words"].numpy().tobytes().decode().split("\n")
            self._vocabulary = {word: row for row, word in enumerate(words)}
            engine = bm25s.BM25(
                k1=stored.manifest.parameters["k1"],
                b=stored.manifest.parameters["b"],
                method="lucene",
                backend=_BACKEND,
            )
            engine.scores = {name: arrays[name].numpy() for name in ("data", "indices", "indptr")}
        except (KeyError, UnicodeDecodeError) as error:
            raise CorruptFileError(f"{stored.path('bm25')}: incomplete ({error}). Build the index again.") from None
        engine.scores["num_docs"] = len(self)
        engine.nonoccurrence_array = None
        self._engine = engine
        self._stemmer = Stemmer.Stemmer(_STEMMER)

    def scores(self, text: str) -> NDArray[np.float32]:
        """The score of every document for one query text, float32 [count]."""
        known = [self._vocabulary[word] for word in _words([text], self._stemmer)[0] if word in self._vocabulary]
        if not known:
            return np.zeros(len(self), dtype=np.float32)
        scores: NDArray[np.float32] = self._engine.get_scores_from_ids(known)
        return scores

    def _search(self, texts: Sequence[str], k: int) -> TopK:
        rows = np.full((len(texts), k), NO_ROW, dtype=np.int64)
        scores = np.full((len(texts), k), -np.inf, dtype=np.float32)
        for place, text in enumerate(track(texts, "searching", late=True)):
            everything = self.scores(text)
            hits = np.flatnonzero(everything > 0)
            best = hits[top_k(everything[hits], k, self.ties[hits])]
            rows[place, : len(best)] = best
            scores[place, : len(best)] = everything[best]
        return TopK(rows, scores, rows >= 0, self.ids)


def write(target: Draft, documents: Texts, k1: float, b: float) -> dict[str, Tensor]:
    """Write the postings of the documents; the arrays written.

    Raises:
        DataError: k1 or b outside its range.
    """
    if not (np.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
        raise DataError(f"k1 {k1} and b {b}: expected k1 >= 0 and b between 0 and 1.")
    words = _words(documents.texts, Stemmer.Stemmer(_STEMMER))
    vocabulary = {word: row for row, word in enumerate(sorted({word for text in words for word in text}))}
    postings = {"data": np.empty(0, np.float32), "indices": np.empty(0, np.int32), "indptr": np.zeros(1, np.int64)}
    if vocabulary:
        engine = bm25s.BM25(k1=k1, b=b, method="lucene", backend=_BACKEND)
        rows = [[vocabulary[word] for word in text] for text in words]
        engine.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        postings = {name: engine.scores[name] for name in postings}
    arrays = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in postings.items()}
    arrays["words"] = torch.from_numpy(np.frombuffer("\n".join(vocabulary).encode(), dtype=np.uint8).copy())
    target.arrays("bm25", arrays)
    return arrays


def _words(texts: Sequence[str], stemmer: "Stemmer.Stemmer") -> list[list[str]]:
    """Lower-cased words of two or more characters, without stop words, stemmed."""
    words: list[list[str]] = bm25s.tokenize(
        list(texts), stopwords=_STOP_WORDS, stemmer=stemmer, return_ids=False, show_progress=False, allow_empty=True
    )
    return [[word for word in text if word] for text in words]
