"""Formats that group scores by training example: margins, positives and negatives, ranked lists; and node logits."""

import json
import zipfile
from pathlib import Path

import numpy as np

from structkd.errors import DataError
from structkd.files import atomic_path
from structkd.ids import fingerprint_fields
from structkd.scores.formats_base import (
    Lists,
    NodeTable,
    Rows,
    ScoreTable,
    columns,
    identifier,
    json_lines,
    json_names,
    number,
)
from structkd.scores.pairs import PairScores
from structkd.trec import read_lines

_MARGIN_COLUMNS = "pos_score, neg_score, query_id, pos_pid, neg_pid"
LOGIT_NAMES = ("logits", "out", "arr_0")

# margin-tsv-ids


def read_margin_tsv_ids(path: Path) -> ScoreTable:
    """Five tab-separated columns `pos_score neg_score query_id pos_pid neg_pid`, no header."""
    rows = Rows()
    lines = won = 0
    for where, (positive, negative, query, pos_id, neg_id) in columns(path, 5, _MARGIN_COLUMNS):
        pos_score, neg_score = number(positive, where, "pos_score"), number(negative, where, "neg_score")
        rows.add(identifier(query, where, "query"), identifier(pos_id, where), pos_score)
        rows.add(query, identifier(neg_id, where), neg_score)
        lines += 1
        won += pos_score > neg_score
    notes = []
    if lines and won < lines / 2:
        notes.append(
            f"{path}: the positive outscores the negative in only {won} of {lines} lines; are the columns swapped?"
        )
    return rows.table(notes=notes)


def write_margin_tsv_ids(path: Path, lists: Lists) -> None:
    """Each list's best document as the positive against every other one of it."""
    refuse_short(path, lists)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (documents, scores) in lists.lists.items():
            values = scores.tolist()
            for document, score in zip(documents[1:], values[1:], strict=True):
                handle.write(f"{values[0]!r}\t{score!r}\t{query}\t{documents[0]}\t{document}\n")


def write_margin_triples(path: Path, store: PairScores, triples: Path, block: int = 1 << 16) -> int:
    """`pos_score neg_score query_id pos_pid neg_pid` for each triple of a file, in its order; returns how many.

    Raises:
        DataError: a line of another number of columns.
        MissingScoreError: the store lacks a pair.
    """
    held: list[list[str]] = []
    count = 0
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:

        def flush() -> None:
            if not held:
                return
            queries, positives, negatives = (list(column) for column in zip(*held, strict=True))
            scores = [store.lookup(queries, documents).tolist() for documents in (positives, negatives)]
            for line in zip(*scores, queries, positives, negatives, strict=True):
                handle.write("\t".join(map(str, line)) + "\n")
            held.clear()

        for number, line in read_lines(triples):
            parts = line.split()
            if len(parts) != 3:
                raise DataError(f"{triples}:{number}: found {len(parts)} columns, expected query, positive, negative.")
            held.append(parts)
            count += 1
            if len(held) == block:
                flush()
        flush()
    return count


def refuse_short(path: Path, lists: Lists) -> None:
    """DataError when a list has no second document to stand against its best."""
    short = [query for query, (documents, _) in lists.lists.items() if len(documents) < 2]
    if short:
        raise DataError(
            f"{path}: {len(short)} queries have a single document, for example {short[0]!r}; a file of positives "
            "against negatives cannot hold them. Use --format trec-run."
        )


# sbert-jsonl


def read_sbert_jsonl(path: Path) -> ScoreTable:
    """Hard negatives with scores: {"qid", "pos": [{"pid", "ce-score"}], "neg": {system: [{"pid", "ce-score"}]}}."""
    rows = Rows()
    for where, value in json_lines(path):
        if not isinstance(value, dict) or not {"qid", "neg"} <= value.keys():
            raise DataError(f'{where}: expected an object with "qid", "pos" and "neg".')
        query = identifier(value["qid"], where, "query")
        groups = [value.get("pos", []), *(value["neg"].values() if isinstance(value["neg"], dict) else [value["neg"]])]
        for item in (item for group in groups for item in group):
            if not isinstance(item, dict):
                raise DataError(
                    f"{where}: items are plain ids: this is the file of that name without scores. Expected the one "
                    'whose items are {"pid", "ce-score"}.'
                )
            if not {"pid", "ce-score"} <= item.keys():
                raise DataError(f'{where}: item with fields {sorted(item)}, expected "pid" and "ce-score".')
            rows.add(query, identifier(item["pid"], where), number(item["ce-score"], where, "ce-score"))
    return rows.table()


def write_sbert_jsonl(path: Path, lists: Lists) -> None:
    """Each list's best document under "pos", the others under the teacher's name."""
    queries, documents = json_names(lists)
    with atomic_path(path) as draft, open(draft, "w", encoding="utf-8") as handle:
        for query, (names, scores) in lists.lists.items():
            items = [
                {"pid": documents[name], "ce-score": score} for name, score in zip(names, scores.tolist(), strict=True)
            ]
            line = {"qid": queries[query], "pos": items[:1], "neg": {lists.model: items[1:]}}
            handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


# node-npz


def read_node_npz(path: Path) -> NodeTable:
    """A NumPy archive with `logits` [nodes, classes] (also named out or arr_0), optionally `graph_fingerprint`."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as archive:
            name = next((name for name in LOGIT_NAMES if name in archive.files), None)
            if name is None:
                raise DataError(f"{path}: arrays {archive.files}; expected one of {LOGIT_NAMES}.")
            logits = archive[name]
            known = str(archive["graph_fingerprint"]) if "graph_fingerprint" in archive.files else None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable npz archive ({error}).") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: its arrays are Python objects, which are not read ({error}).") from None
    if logits.ndim != 2 or not np.issubdtype(logits.dtype, np.floating):
        raise DataError(f"{path}: {name} has shape {logits.shape} and dtype {logits.dtype}; expected floats in 2 axes.")
    notes = () if known else (f"{path}: names no graph_fingerprint; the rows are bound to this file's name alone.",)
    return NodeTable(logits.astype(np.float32), known or fingerprint_fields(["graph of", path.name]), notes)


def write_node_npz(path: Path, nodes: NodeTable) -> None:
    """`logits` and `graph_fingerprint`."""
    with atomic_path(path) as draft, open(draft, "wb") as handle:
        np.savez_compressed(handle, logits=nodes.logits, graph_fingerprint=np.asarray(nodes.graph_fingerprint))
