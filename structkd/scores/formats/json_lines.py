"""One training example a line, as JSON: lists of scored ids, or of scored texts."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from structkd.errors import DataError
from structkd.ids import text_hash
from structkd.packed import text_writer
from structkd.scores.formats.base import Blocks, Lists, Rows, identifier, json_lines, json_names, number
from structkd.scores.formats.margins import Writable


def _read(path: Path, add: Callable[[Rows, int, Any], None], texts: bool = False) -> Blocks:
    """Blocks of what `add` makes of each line."""
    rows = Rows(path, query_texts=[] if texts else None, document_texts=[] if texts else None)
    for line, value in json_lines(path):
        add(rows, line, value)
        if rows.full:
            yield rows.take()
    yield rows.take()


def _line(handle: io.TextIOWrapper, value: Any) -> None:
    handle.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


# sbert-jsonl


def read_sbert_jsonl(path: Path) -> Blocks:
    """Hard negatives with scores: {"qid", "pos": [{"pid", "ce-score"}], "neg": {system: [{"pid", "ce-score"}]}}."""
    return _read(path, _add_negatives)


def _add_negatives(rows: Rows, line: int, value: Any) -> None:
    where = f"{rows.path}:{line}"
    if not isinstance(value, dict) or not {"qid", "neg"} <= value.keys():
        raise DataError(f'{where}: expected an object with "qid", "pos" and "neg".')
    query = identifier(value["qid"], where, "query")
    groups = [value.get("pos", []), *(value["neg"].values() if isinstance(value["neg"], dict) else [value["neg"]])]
    for group in groups:
        if not isinstance(group, list):
            raise DataError(f"{where}: found a {type(group).__name__}, expected a list of documents.")
        for item in group:
            if not isinstance(item, dict):
                raise DataError(
                    f"{where}: items are plain ids: this is the file of that name without scores. Expected the one "
                    'whose items are {"pid", "ce-score"}.'
                )
            if not {"pid", "ce-score"} <= item.keys():
                raise DataError(f'{where}: item with fields {sorted(item)}, expected "pid" and "ce-score".')
        rows.add_list(query, [item["pid"] for item in group], [item["ce-score"] for item in group], line)


def write_sbert_jsonl(path: Path, lists: Lists) -> None:
    """Each list's best document under "pos", the others under the teacher's name."""
    query_type, document_type = json_names(lists)
    with text_writer(path) as handle:
        for query, (names, scores) in lists.items():
            items = [
                {"pid": document_type(name), "ce-score": score}
                for name, score in zip(names, scores.tolist(), strict=True)
            ]
            _line(handle, {"qid": query_type(query), "pos": items[:1], "neg": {lists.model: items[1:]}})


# colbert-examples


def read_colbert_examples(path: Path) -> Blocks:
    """`[qid, [pid, score], ...]` a line; the scorer's own `[qid, [[score, pid], ...]]` is told apart and read."""
    return _read(path, _add_example)


def _add_example(rows: Rows, line: int, value: Any) -> None:
    where = f"{rows.path}:{line}"
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[1], list) or not value[1]:
        raise DataError(f"{where}: expected [qid, [pid, score], ...]; lists of ids alone are rank-permutations.")
    swapped = len(value) == 2 and isinstance(value[1][0], list)
    items = value[1] if swapped else value[1:]
    for item in items:
        if not isinstance(item, list) or len(item) != 2:
            raise DataError(f"{where}: found {item!r}, expected a pair of document and score.")
    first, second = [item[0] for item in items], [item[1] for item in items]
    documents, scores = (second, first) if swapped else (first, second)
    rows.add_list(identifier(value[0], where, "query"), documents, scores, line)


def write_colbert_examples(path: Path, lists: Lists) -> None:
    """One list a line, best document first."""
    query_type, document_type = json_names(lists)
    with text_writer(path) as handle:
        for query, (names, scores) in lists.items():
            items = [[document_type(name), score] for name, score in zip(names, scores.tolist(), strict=True)]
            _line(handle, [query_type(query), *items])


# tevatron


def read_tevatron(path: Path) -> Blocks:
    """{"query_id", "query", "positive_passages": [{docid, title, text, score}], "negative_passages": [...]} a line."""
    return _read(path, _add_passages, texts=True)


def _add_passages(rows: Rows, line: int, value: Any) -> None:
    where = f"{rows.path}:{line}"
    if not isinstance(value, dict) or not {"query_id", "query", "positive_passages"} <= value.keys():
        raise DataError(f"{where}: expected query_id, query, positive_passages and negative_passages.")
    query_id = identifier(value["query_id"], where, "query")
    for item in [*value["positive_passages"], *value.get("negative_passages", [])]:
        if not isinstance(item, dict) or not {"docid", "text", "score"} <= item.keys():
            raise DataError(f"{where}: a passage without docid, text or score; scores are what is imported here.")
        text = " ".join(part for part in (item.get("title", ""), item["text"]) if part)
        _add_text(rows, line, value["query"], text, item["score"], query_id, identifier(item["docid"], where))


def _add_text(rows: Rows, line: int, query: Any, text: Any, score: Any, query_id: str, document_id: str) -> None:
    """A pair of texts; where the file has no id the text's hash is it."""
    where = f"{rows.path}:{line}"
    for found, what in ((query, "query"), (text, "document")):
        if not isinstance(found, str):
            raise DataError(f"{where}: the text of a {what} is a {type(found).__name__}, expected a string.")
    rows.add(query_id or text_hash(query).hex(), document_id or text_hash(text).hex(), number(score, where), line)
    if rows.query_texts is not None and rows.document_texts is not None:
        rows.query_texts.append(query)
        rows.document_texts.append(text)


def write_tevatron(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive passage."""
    texts = Writable(lists, path)
    with text_writer(path) as handle:
        for query, (names, scores) in lists.items():
            passages = [
                {"docid": name, "title": "", "text": text, "score": score}
                for name, text, score in zip(names, texts.documents(names), scores.tolist(), strict=True)
            ]
            line = {"query_id": query, "query": texts.query(query), "positive_passages": passages[:1]}
            _line(handle, line | {"negative_passages": passages[1:]})


# flagembedding


def read_flagembedding(path: Path) -> Blocks:
    """{"query", "pos", "neg", "pos_scores", "neg_scores"} a line; document ids are the hashes of the texts."""
    return _read(path, _add_groups, texts=True)


def _add_groups(rows: Rows, line: int, value: Any) -> None:
    where = f"{rows.path}:{line}"
    if not isinstance(value, dict) or not {"query", "pos", "neg"} <= value.keys():
        raise DataError(f"{where}: expected query, pos, neg, pos_scores and neg_scores.")
    query_id = "" if value.get("id", "") == "" else identifier(value["id"], where, "query")
    for texts, scores in (("pos", "pos_scores"), ("neg", "neg_scores")):
        found = value.get(scores)
        if not isinstance(found, list) or len(found) != len(value[texts]):
            count = len(found) if isinstance(found, list) else "no"
            raise DataError(f"{where}: {len(value[texts])} {texts} texts but {count} {scores}.")
        for text, score in zip(value[texts], found, strict=True):
            _add_text(rows, line, value["query"], text, number(score, where, scores), query_id, "")


def write_flagembedding(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive; the format has no place for document ids."""
    texts = Writable(lists, path)
    with text_writer(path) as handle:
        for query, (names, scores) in lists.items():
            found, values = texts.documents(names), scores.tolist()
            line = {"query": texts.query(query), "pos": found[:1], "neg": found[1:]}
            _line(handle, line | {"pos_scores": values[:1], "neg_scores": values[1:], "id": query})
