"""Unlabelled pairs: from a file, or from a collection and a first stage; without those that a test needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from structkd.errors import DataError
from structkd.ids import Ids, Pairs, Texts
from structkd.progress import note
from structkd.ranking.data.collection import Collection, normalise
from structkd.trec import Run, read_lines

TextPair = tuple[str, str]
LEAST = 8
"Fewest pairs worth a cycle: one must be held out, and a rank correlation of fewer says nothing."

_HEADER = {
    *(f"{word}{mark}{number}" for word in ("sentence", "text", "sent", "s") for mark in ("", "_") for number in "12ab"),
    "query", "question", "passage", "document", "left", "right",
}  # fmt: skip


@dataclass(frozen=True)
class PairPool:
    """Pairs to label and train on.

    Attributes:
        pairs: distinct pairs; with symmetric pairs both sides are rows of one table.
        symmetric: whether (a, b) and (b, a) are the same pair.
        counts: read, repeated, excluded, identical (both sides the same text; they stay: their similarity is known).
    """

    pairs: Pairs
    symmetric: bool
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def keys(self) -> set[TextPair]:
        """What two copies of one pair share: normalised texts, without order when symmetric."""
        texts = zip(self.pairs.query_texts, self.pairs.document_texts, strict=True)
        return {_key(left, right, self.symmetric) for left, right in texts}


@dataclass(frozen=True)
class GoldPairs:
    """Pairs with a person's score, on any scale that grows with similarity: only their order is used."""

    pairs: Pairs
    scores: NDArray[np.float64]
    source: str


@dataclass(frozen=True)
class PairFile:
    """A pairs file as read.

    Attributes:
        pairs: (left, right), outer white space off.
        scores: the first of three columns, None with two.
    """

    path: Path
    pairs: Sequence[TextPair]
    scores: NDArray[np.float64] | None


def read_pair_file(path: str | Path) -> PairFile:
    """Read `left<TAB>right` or `score<TAB>left<TAB>right` lines; the first line says which, no header, no quoting.

    Raises:
        DataError: with file and line: another number of columns (a tab inside a text), an empty side, a score that is
            no finite number; a file without a pair.
    """
    path, columns = Path(path), 0
    pairs: list[TextPair] = []
    scores: list[float] = []
    for number, line in read_lines(path):
        where, fields = f"{path}:{number}", line.split("\t")
        columns = columns or len(fields)
        if len(fields) != columns or columns not in (2, 3):
            expected = "2 (text, text) or 3 (score, text, text)" if columns not in (2, 3) else f"{columns} as in line 1"
            raise DataError(
                f"{where}: {len(fields)} tab-separated columns, expected {expected}. Replace tabs inside a text by "
                "spaces, and give both texts of every pair."
            )
        left, right = (text.strip() for text in fields[-2:])
        if columns == 2 and not pairs and {left.lower(), right.lower()} <= _HEADER:
            raise DataError(
                f"{where}: {left!r} and {right!r} name columns. Remove the header line; only pairs are read."
            )
        if not left or not right:
            raise DataError(f"{where}: one side of the pair is empty. Give both texts, or remove the line.")
        if columns == 3:
            scores.append(_score(fields[0], where))
        pairs.append((left, right))
    if not pairs:
        raise DataError(f"{path}: holds no pair; expected lines of two texts, tab-separated.")
    return PairFile(path, pairs, np.asarray(scores) if columns == 3 else None)


def pool_of_file(path: str | Path, *, symmetric: bool, exclude: Iterable[TextPair] = ()) -> PairPool:
    """The distinct pairs of a file; a score column is not looked at.

    Raises:
        DataError: see `read_pair_file`; fewer pairs are left than a cycle needs.
    """
    read = read_pair_file(path)
    if read.scores is not None:
        note(f"{path}: the first column holds scores; they are not used, the pairs count as unlabelled")
    return _pool(list(read.pairs), symmetric, exclude, str(path))


def pool_of_collection(collection: Collection, candidates: Run, *, exclude: Iterable[TextPair] = ()) -> PairPool:
    """Query-passage pairs: the candidates of a first stage. Judgements are not looked at; empty passages are left out.

    Raises:
        DataError: a candidate is not in the collection; fewer pairs are left than a cycle needs.
    """
    known = {query: listed for query, listed in candidates.lists.items() if query in collection.queries.ids}
    pairs = collection.pairs_of(Run(known))
    unwanted = {_key(left, right, False) for left, right in exclude}
    texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
    full = [i for i, (left, right) in enumerate(texts) if left.strip() and right.strip()]
    kept = [i for i in full if _key(*texts[i], False) not in unwanted]
    counts = {"read": len(pairs), "repeated": 0, "excluded": len(full) - len(kept), "identical": 0}
    if len(full) < len(pairs):
        note(f"{collection.name}: {len(pairs) - len(full)} pairs with an empty text left out")
    return _enough(PairPool(pairs.take(np.asarray(kept, dtype=np.int64)), False, counts), collection.name)


def gold_of_file(path: str | Path, *, symmetric: bool) -> GoldPairs:
    """Pairs with scores to choose models by.

    Raises:
        DataError: no score column, fewer than three pairs, or one score for all: no rank correlation is defined.
    """
    read = read_pair_file(path)
    if read.scores is None:
        raise DataError(f"{path}: two columns, expected three (score, text, text). Put the gold score first.")
    if len(read.pairs) < 3 or np.ptp(read.scores) == 0:
        raise DataError(f"{path}: {len(read.pairs)} pairs with equal scores rank nothing; expected different scores.")
    return GoldPairs(_tables(list(read.pairs), symmetric), read.scores, str(path))


def overlap(pool: PairPool, gold: GoldPairs) -> int:
    """How many gold pairs are in the pool: trained on without their labels, so the figure is transductive."""
    own = pool.keys()
    texts = zip(gold.pairs.query_texts, gold.pairs.document_texts, strict=True)
    return sum(_key(left, right, pool.symmetric) in own for left, right in texts)


def swapped(pairs: Pairs) -> Pairs:
    """The same pairs in the other order."""
    return Pairs(pairs.documents, pairs.queries, pairs.document_rows, pairs.query_rows)


def _pool(found: list[TextPair], symmetric: bool, exclude: Iterable[TextPair], where: str) -> PairPool:
    first: dict[TextPair, TextPair] = {}
    for left, right in found:
        first.setdefault(_exact(left, right, symmetric), (left, right))
    distinct = list(first.values())
    unwanted = {_key(left, right, symmetric) for left, right in exclude}
    kept = [pair for pair in distinct if _key(*pair, symmetric) not in unwanted]
    counts = {
        "read": len(found),
        "repeated": len(found) - len(distinct),
        "excluded": len(distinct) - len(kept),
        "identical": sum(left == right for left, right in kept),
    }
    return _enough(PairPool(_tables(kept, symmetric), symmetric, counts), where)


def _tables(pairs: list[TextPair], symmetric: bool) -> Pairs:
    """Pairs over tables of distinct texts, numbered by first appearance."""
    if symmetric:
        table = _table("s", [text for pair in pairs for text in pair])
        left, right = table, table
    else:
        left, right = _table("q", [pair[0] for pair in pairs]), _table("d", [pair[1] for pair in pairs])
    rows = [{text: row for row, text in enumerate(table.texts)} for table in (left, right)]
    query_rows = np.asarray([rows[0][pair[0]] for pair in pairs], dtype=np.int64)
    return Pairs(left, right, query_rows, np.asarray([rows[1][pair[1]] for pair in pairs], dtype=np.int64))


def _table(letter: str, texts: list[str]) -> Texts:
    distinct = list(dict.fromkeys(texts))
    return Texts(Ids(f"{letter}{number}" for number in range(1, len(distinct) + 1)), distinct)


def _key(left: str, right: str, symmetric: bool) -> TextPair:
    return _exact(normalise(left), normalise(right), symmetric)


def _exact(left: str, right: str, symmetric: bool) -> TextPair:
    return (right, left) if symmetric and right < left else (left, right)


def _score(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(
            f"{where}: {text[:40]!r} is no score. Three columns are score, text, text, without a header line; with two "
            "columns, replace tabs inside a text by spaces."
        )
    return value


def _enough(pool: PairPool, where: str) -> PairPool:
    if len(pool) < LEAST:
        found = ", ".join(f"{count} {name}" for name, count in pool.counts.items())
        raise DataError(f"{where}: {len(pool)} pairs are left ({found}), expected at least {LEAST}. Give more pairs.")
    return pool
