"""Collections: queries, documents, judgements; the reader of the BEIR folder layout; pairs of their texts."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import DataError, UsageError
from structkd.files import read_json
from structkd.ids import Ids, Pairs, Texts
from structkd.progress import note
from structkd.trec import Run, read_lines

Qrels = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Collection:
    """Queries, documents and judgements of one ranking task.

    Attributes:
        name: what tables call it.
        queries: query texts.
        documents: document texts; an empty text is allowed.
        qrels: query id -> document id -> grade. A judged document may lie outside `documents`: it then counts in the
            ideal ranking of a measure, as full judgements over a pooled collection need.
    """

    name: str
    queries: Texts
    documents: Texts
    qrels: Qrels = field(default_factory=dict)

    def positives(self, query_id: str, grade: int = 1) -> list[str]:
        """Documents of the collection judged at least `grade` for the query, in id order."""
        judged = self.qrels.get(query_id, {})
        return sorted(
            document for document, value in judged.items() if value >= grade and document in self.documents.ids
        )

    def pairs(self, query_ids: Sequence[str], document_ids: Sequence[str]) -> Pairs:
        """The pairs of these ids; DataError with count and examples when some are not in the collection."""
        return Pairs(
            self.queries,
            self.documents,
            self.queries.ids.rows(query_ids, f"{self.name}: queries"),
            self.documents.ids.rows(document_ids, f"{self.name}: documents"),
        )

    def pairs_of(self, run: Run) -> Pairs:
        """All pairs of a run, in its order."""
        query_ids, document_ids, _ = run.pairs()
        return self.pairs(query_ids, document_ids)

    def with_queries(self, query_ids: Iterable[str]) -> "Collection":
        """The same documents with these queries and their judgements only."""
        keep = set(query_ids)
        positions = [row for row, query in enumerate(self.queries.ids) if query in keep]
        queries = Texts(Ids(self.queries.ids.strings(positions)), [self.queries.texts[row] for row in positions])
        qrels = {query: judged for query, judged in self.qrels.items() if query in keep}
        return dataclasses.replace(self, queries=queries, qrels=qrels)


def load(path: str | Path, split: str | None = None) -> Collection:
    """Read a collection in BEIR layout.

    `corpus.jsonl` (`_id`, `title` optional, `text`; a document's text is "title text" stripped), `queries.jsonl`
    (`_id`, `text`) and judgements: `qrels.tsv`, or `qrels/SPLIT.tsv`, or `SPLIT.json` with its own queries
    (`{"queries": {id: text}, "qrels": [[query, document, grade], ...]}`). Judgement lines have three columns (a
    header is skipped) or TREC's four. No judgements at all are allowed.

    Args:
        path: the folder.
        split: which judgements; by default `qrels.tsv`, else `qrels/test.tsv`, else the only file in `qrels/`. With
            `qrels/SPLIT.tsv` and `SPLIT.json` the queries are those of the split. Training queries whose text repeats
            a test query's are dropped, and a note says which. "all": the queries of every split, no judgements.

    Raises:
        DataError: with file and line: no JSON, a field missing, an id twice, a grade that is no whole number, a
            judgement of an unknown query or a second one of the same pair; an unknown split.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected corpus.jsonl, queries.jsonl and qrels in it (BEIR layout)."
        )
    documents = _read_texts(folder / "corpus.jsonl", "document", titles=True)
    queries = _read_texts(folder / "queries.jsonl", "query", titles=False)
    if split == "all":
        return Collection(folder.name, _every_query(folder, queries), documents)
    if split is not None and (folder / f"{split}.json").is_file():
        own, qrels = _read_split_json(folder / f"{split}.json")
        collection = Collection(f"{folder.name}/{split}", own, documents, qrels)
        return _without_repeats(collection, queries)
    source = _qrels_file(folder, split)
    if source is None:
        return Collection(folder.name, queries, documents)
    collection = Collection(folder.name, queries, documents, read_qrels(source, queries.ids))
    if source.parent.name != "qrels":
        return collection
    test = folder / "qrels" / "test.tsv"
    chosen = collection.with_queries(collection.qrels)
    if source.stem in ("test", "dev") or not test.is_file():
        return chosen
    named = dataclasses.replace(chosen, name=f"{folder.name}/{source.stem}")
    return _without_repeats(named, collection.with_queries(read_qrels(test, queries.ids)).queries)


def splits(path: str | Path) -> list[str]:
    """Names that `load(path, split=...)` knows besides the default."""
    folder = Path(path)
    files = [*folder.glob("qrels/*.tsv"), *(f for name in ("train", "dev") for f in folder.glob(f"{name}.json"))]
    return sorted(file.stem for file in files)


def _every_query(folder: Path, queries: Texts) -> Texts:
    """The queries of queries.jsonl and of each SPLIT.json; one id must not stand for two texts."""
    merged = dict(zip(queries.ids, queries.texts, strict=True))
    for name in splits(folder):
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        own, _ = _read_split_json(path)
        for query, text in zip(own.ids, own.texts, strict=True):
            if merged.setdefault(query, text) != text:
                raise DataError(f"{path}: query {query!r} has another text than in queries.jsonl. Rename one of them.")
    return Texts(Ids(merged), list(merged.values()))


def _qrels_file(folder: Path, split: str | None) -> Path | None:
    """The file of judgements that `split` names, None when there are none."""
    plain, several = folder / "qrels.tsv", sorted(folder.glob("qrels/*.tsv"))
    if split is not None:
        if (folder / "qrels" / f"{split}.tsv").is_file():
            return folder / "qrels" / f"{split}.tsv"
        if split == "test" and plain.is_file():
            return plain
        known = ", ".join(splits(folder)) or "none"
        raise DataError(f"{folder}: no split {split!r} (found: {known}). Add qrels/{split}.tsv or name another split.")
    if plain.is_file():
        return plain
    test = folder / "qrels" / "test.tsv"
    if test in several or len(several) == 1:
        return test if test in several else several[0]
    if several:
        names = ", ".join(file.stem for file in several)
        raise DataError(f"{folder}: several splits ({names}) and none is 'test'. Name one with --split.")
    return None


def _read_texts(path: Path, what: str, titles: bool) -> Texts:
    """A JSONL file of texts; ids and texts are strings."""
    seen: dict[str, int] = {}
    texts = []
    for number, value in _json_lines(path):
        identifier, text = value.get("_id"), value.get("text")
        title = value.get("title") if titles else ""
        if not isinstance(identifier, str) or not identifier:
            raise DataError(f"{path}:{number}: '_id' is {identifier!r}, expected a non-empty string.")
        if not isinstance(text, str) or not isinstance(title or "", str):
            raise DataError(f"{path}:{number}: {what} {identifier!r} has no string 'text'. An empty string is allowed.")
        if identifier in seen:
            raise DataError(f"{path}:{number}: {what} {identifier!r} stands in line {seen[identifier]} already.")
        if not titles and not text.strip():
            raise DataError(f"{path}:{number}: query {identifier!r} is empty. Remove it and its judgements.")
        seen[identifier] = number
        texts.append(f"{title or ''} {text}".strip())
    if not texts:
        raise DataError(f"{path}: holds no {what}; expected one JSON object a line with _id and text.")
    return Texts(Ids(seen, f"{what} id"), texts)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}). Was the file cut?") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number}: found {type(value).__name__}, expected an object with _id and text.")
        yield number, value


def read_qrels(path: Path, queries: Ids) -> dict[str, dict[str, int]]:
    """Judgements by query and document: `query document grade` with or without a header, or TREC's four columns.

    Args:
        path: the file, plain or gzip.
        queries: what may be judged. Documents are not checked: those that a pool lacks count in the ideal ranking.

    Raises:
        DataError: with file and line: a malformed line, an unknown query, a pair that is judged twice.
    """
    qrels: dict[str, dict[str, int]] = {}
    first = True
    for number, line in read_lines(path):
        columns = line.split("\t") if "\t" in line else line.split()
        header, first = first and not _is_grade(columns[-1]), False
        if header:
            continue
        if len(columns) not in (3, 4) or not _is_grade(columns[-1]):
            raise DataError(f"{path}:{number}: found {line!r}, expected `query document grade` with a whole grade.")
        _judge(qrels, columns[0], columns[-2], int(columns[-1]), queries, f"{path}:{number}")
    return qrels


def _judge(qrels: dict[str, dict[str, int]], query: str, document: str, grade: int, queries: Ids, where: str) -> None:
    if query not in queries:
        raise DataError(
            f"{where}: query {query!r} is judged but is not among the {len(queries)} queries. Add its text."
        )
    if document in qrels.setdefault(query, {}):
        raise DataError(f"{where}: document {document!r} is judged twice for query {query!r}. Remove one line.")
    qrels[query][document] = grade


def _is_grade(text: str) -> bool:
    return text.strip().removeprefix("-").isdigit()


def _read_split_json(path: Path) -> tuple[Texts, dict[str, dict[str, int]]]:
    value = read_json(path)
    if not isinstance(value, dict) or not {"queries", "qrels"} <= set(value):
        raise DataError(f'{path}: expected {{"queries": {{id: text}}, "qrels": [[query, document, grade], ...]}}.')
    queries = Texts(Ids(value["queries"], "query id"), list(value["queries"].values()))
    qrels: dict[str, dict[str, int]] = {}
    for position, row in enumerate(value["qrels"]):
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[2], int):
            raise DataError(f"{path}: qrels[{position}] is {row!r}, expected [query, document, grade].")
        _judge(qrels, str(row[0]), str(row[1]), row[2], queries.ids, f"{path}: qrels[{position}]")
    return queries, qrels


def _without_repeats(collection: Collection, test: Texts) -> Collection:
    """Drop training queries that a test query repeats (case and white space aside): they would be trained on."""
    known = {normalise(text) for text in test.texts}
    rows = zip(collection.queries.ids, collection.queries.texts, strict=True)
    repeats = [query for query, text in rows if normalise(text) in known]
    if not repeats:
        return collection
    note(f"{collection.name}: dropped {len(repeats)} queries whose text is a test query's: {', '.join(repeats[:5])}")
    return collection.with_queries(set(collection.queries.ids) - set(repeats))


def normalise(text: str) -> str:
    """Lower case, white space collapsed, final punctuation off: what two copies of one text share."""
    return " ".join(text.lower().split()).rstrip(".!?")


def hold_out(query_ids: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) query ids; the held-out ones are drawn with the seed, at least one of two or more.

    Raises:
        UsageError: `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise UsageError(f"the held-out share must lie in [0, 1), found {share}.")
    ordered = sorted(query_ids)
    count = min(len(ordered) - 1, max(1, round(share * len(ordered)))) if share and len(ordered) > 1 else 0
    chosen = set(np.random.default_rng(seed).permutation(len(ordered))[:count].tolist())
    held = [query for row, query in enumerate(ordered) if row in chosen]
    return [query for row, query in enumerate(ordered) if row not in chosen], held
