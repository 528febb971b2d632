"""Built-in collections, and the one entry that opens any: built-in name, `ir_datasets:ID`, folder in BEIR layout."""

import ast
import dataclasses
import functools
import hashlib
import importlib
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structkd.errors import DataError, MissingExtraError, did_you_mean
from structkd.files import atomic_path
from structkd.ids import Ids, Texts, text_hash
from structkd.ranking.data import collection
from structkd.ranking.data.collection import Collection, normalise

PYDOCS_LIMIT = 6_000
"Passages that `pydocs` keeps at most; a hash of the text chooses, so the choice is the same on every machine."

_SKIPPED = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
_SENTENCE = re.compile(r"(.+?[.!?])(?=\s+[^a-z\s]|\s*$)", re.DOTALL)
_CALL = re.compile(r"(\w+)(?:\(\))?")
_WORD = re.compile(r"[^\W\d_]{2,}")
_QUERY_WORDS, _PASSAGE_WORDS = 3, 8  # fewest words that make sense as a query, as a passage


def load(path: str | Path, split: str | None = None) -> Collection:
    """Open a collection by name or folder.

    Args:
        path: a key of DATASETS, `ir_datasets:ID`, or a folder as `structkd.ranking.data.collection.load` reads it.
        split: which queries and judgements, as in a folder.

    Raises:
        DataError: no such folder, malformed files, an unknown split.
        MissingExtraError: `ir_datasets:` without that package.
    """
    name = str(path)
    if name in DATASETS and not Path(path).is_dir():
        return DATASETS[name](split)
    if name.startswith("ir_datasets:"):
        return ir_dataset(name.removeprefix("ir_datasets:"), split)
    if not Path(path).is_dir() and "/" not in name:
        raise DataError(
            f"{name}: neither a folder nor a built-in collection; expected a folder in BEIR layout, ir_datasets:ID, "
            f"or one of {', '.join(DATASETS)}.{did_you_mean(name, DATASETS)}"
        )
    return collection.load(path, split)


def splits(path: str | Path) -> list[str]:
    """Names that `load(path, split)` knows besides the default; none for ir_datasets, where a split is a name."""
    if str(path) in DATASETS and not Path(path).is_dir():
        return ["test", "train"]
    return collection.splits(path) if Path(path).is_dir() else []


def pydocs(split: str | None = None) -> Collection:
    """Python's own documentation strings: find the rest of a description from its first sentence.

    The standard library's sources are read with `ast`; no module is imported. A query is the first sentence with the
    object's name removed; relevant is the passage that holds the rest of the same text. Strings that are one sentence
    long are passages without a query. Equal passages and equal queries are merged. Ids are qualified names. One
    Python version gives one collection; another gives a slightly different one, so the version is in the name.

    Args:
        split: "test" (the default), a fifth of the queries, or "train", the others: by hash of the query id; "all"
            has the queries of both and no judgements.

    Raises:
        DataError: an unknown split; a Python without its library's sources.
    """
    if split not in (None, "train", "test", "all"):
        raise DataError(f"pydocs has no split {split!r}; expected train, test or all.")
    whole = _pydocs()
    if split == "all":
        return dataclasses.replace(whole, qrels={})
    chosen = [query for query in whole.queries.ids if _held_out(query) is (split != "train")]
    part = whole.with_queries(chosen)
    return dataclasses.replace(part, name=f"{whole.name}/train") if split == "train" else part


def ir_dataset(identifier: str, split: str | None = None) -> Collection:
    """A collection of the package ir_datasets (optional), which downloads it on first use.

    Args:
        identifier: its name there, for example `beir/scifact`.
        split: appended to the name: `beir/scifact` with "test" is `beir/scifact/test`.

    Raises:
        MissingExtraError: ir_datasets is not installed.
        DataError: the package knows no such collection, or it has no documents or no queries.
    """
    try:
        package: Any = importlib.import_module("ir_datasets")
    except ImportError:
        raise MissingExtraError("ir_datasets", "ir-datasets", f"collection ir_datasets:{identifier}") from None
    name = identifier if split is None else f"{identifier}/{split}"
    try:
        source = package.load(name)
    except KeyError:
        raise DataError(
            f"ir_datasets knows no collection {name!r}; see https://ir-datasets.com for the names."
        ) from None
    if not source.has_docs() or not source.has_queries():
        raise DataError(f"ir_datasets:{name} has no documents or no queries; name a subset that has both.")
    documents = {doc.doc_id: doc.default_text() for doc in source.docs_iter()}
    queries = {query.query_id: query.default_text() for query in source.queries_iter()}
    qrels: dict[str, dict[str, int]] = {}
    for judgement in source.qrels_iter() if source.has_qrels() else ():
        if judgement.query_id in queries:
            qrels.setdefault(judgement.query_id, {})[judgement.doc_id] = int(judgement.relevance)
    return Collection(
        name, Texts(Ids(queries), list(queries.values())), Texts(Ids(documents), list(documents.values())), qrels
    )


def write(collection: Collection, folder: str | Path, splits: dict[str, Collection] | None = None) -> Path:
    """Write a collection in BEIR layout, to be read again by `load`.

    Args:
        collection: documents and all queries; its judgements go to qrels.tsv when there are no splits.
        folder: where; files that stand there are replaced.
        splits: name -> the judgements that go to qrels/NAME.tsv.
    """
    folder = Path(folder)
    _write_jsonl(folder / "corpus.jsonl", collection.documents, title=True)
    _write_jsonl(folder / "queries.jsonl", collection.queries, title=False)
    parts = {"qrels.tsv": collection} if splits is None else {f"qrels/{name}.tsv": c for name, c in splits.items()}
    for name, part in parts.items():
        with atomic_path(folder / name) as temporary, open(temporary, "w", encoding="utf-8") as handle:
            handle.write("query-id\tcorpus-id\tscore\n")
            for query, judged in part.qrels.items():
                handle.writelines(f"{query}\t{document}\t{grade}\n" for document, grade in judged.items())
    return folder


DATASETS: dict[str, Callable[[str | None], Collection]] = {"pydocs": pydocs}
"Built-in collections: name -> builder, called with the split."


@dataclass(frozen=True)
class _Entry:
    """One documentation string, cut in two; `query` is empty when there is nothing to ask."""

    name: str
    query: str
    passage: str


@functools.cache
def _pydocs() -> Collection:
    """All of pydocs, built once per process."""
    root = Path(sysconfig.get_paths()["stdlib"])
    passages: dict[str, str] = {}  # normalised text -> id of its first holder
    documents: dict[str, str] = {}
    asked: dict[str, tuple[str, str, list[str]]] = {}  # normalised query -> id, text, relevant ids
    for entry in _chosen(_entry(name, text) for name, text in _docstrings(root)):
        document = passages.setdefault(normalise(entry.passage), entry.name)
        documents.setdefault(document, entry.passage)
        if entry.query:
            _, _, relevant = asked.setdefault(normalise(entry.query), (entry.name, entry.query, []))
            if document not in relevant:
                relevant.append(document)
    if not documents:
        raise DataError(f"{root}: holds no Python sources with documentation; this Python came without its library.")
    queries = {query: text for query, text, _ in asked.values()}
    qrels = {query: dict.fromkeys(relevant, 1) for query, _, relevant in asked.values()}
    version = ".".join(platform.python_version_tuple()[:2])
    return Collection(
        f"pydocs-{version}",
        Texts(Ids(queries), list(queries.values())),
        Texts(Ids(documents), list(documents.values())),
        qrels,
    )


def _chosen(entries: Iterator[_Entry | None]) -> list[_Entry]:
    """Entries in id order, at most PYDOCS_LIMIT of them, chosen by the hash of their passage."""
    found = [entry for entry in entries if entry is not None]
    kept = sorted(found, key=lambda entry: (text_hash(entry.passage), entry.name))[:PYDOCS_LIMIT]
    return sorted(kept, key=lambda entry: entry.name)


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, documentation string) of every module, class and function of the library's sources."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a stray backslash in the library is not the user's concern
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for name, text in _walk(tree, ".".join(parts).removesuffix(".__init__")):
            if name not in seen:  # two definitions under one name: `if windows: ... else: ...`
                seen.add(name)
                yield name, text


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")


def _entry(name: str, text: str) -> _Entry | None:
    """Cut a string into query and passage; the whole string is the passage when one half is too short."""
    whole = " ".join(text.split())
    if len(_WORD.findall(whole)) < _PASSAGE_WORDS:
        return None
    first = text.strip().split("\n\n", 1)[0]
    sentence = _SENTENCE.match(first)
    head = sentence.group(1) if sentence else first
    rest = " ".join(text.strip()[len(head) :].split())
    own = name.rsplit(".", 1)[-1].lower()
    # one pattern for all names: compiling one per name took a third of the time
    query = " ".join(_CALL.sub(lambda m: " " if m.group(1).lower() == own else m.group(), head).split())
    if len(_WORD.findall(query)) < _QUERY_WORDS or len(_WORD.findall(rest)) < _PASSAGE_WORDS:
        return _Entry(name, "", whole)
    return _Entry(name, query, rest)


def _held_out(query_id: str) -> bool:
    """One query in five, by the hash of its id."""
    return hashlib.sha256(query_id.encode()).digest()[0] % 5 == 0


def _write_jsonl(path: Path, texts: Texts, title: bool) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for identifier, text in zip(texts.ids, texts.texts, strict=True):
            row = {"_id": identifier, "title": "", "text": text} if title else {"_id": identifier, "text": text}
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
