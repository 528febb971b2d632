"""READERS and WRITERS: format name -> function; `sniff` tells a file's format from its content."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from structkd.errors import DataError, UsageError, did_you_mean
from structkd.packed import BROKEN, open_packed
from structkd.scores.formats.base import Blocks, Lists, NodeTable, ScoreTable, StoreLists, joined, nodes_of
from structkd.scores.formats.json_lines import (
    read_colbert_examples,
    read_flagembedding,
    read_sbert_jsonl,
    read_tevatron,
    write_colbert_examples,
    write_flagembedding,
    write_sbert_jsonl,
    write_tevatron,
)
from structkd.scores.formats.margins import (
    read_margin_tsv_ids,
    read_margin_tsv_text,
    write_margin_tsv_ids,
    write_margin_tsv_text,
)
from structkd.scores.formats.node_files import read_node_npz, write_node_npz
from structkd.scores.formats.pickles import is_pickle, read_sbert_pickle, write_sbert_pickle
from structkd.scores.formats.runs import (
    read_beir_run,
    read_rank_permutations,
    read_trec_run,
    write_beir_run,
    write_rank_permutations,
    write_trec_run,
)
from structkd.scores.formats.tables import (
    column_names,
    is_header,
    read_hf_margin,
    read_lightning_ir,
    read_parquet_table,
    read_pylate,
    write_hf_margin,
    write_lightning_ir,
    write_parquet_table,
)
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.trec import read_lines

PAIR_READERS: dict[str, Callable[[Path], Blocks]] = {
    "beir-run": read_beir_run,
    "colbert-examples": read_colbert_examples,
    "flagembedding": read_flagembedding,
    "hf-margin": read_hf_margin,
    "lightning-ir": read_lightning_ir,
    "margin-tsv-ids": read_margin_tsv_ids,
    "margin-tsv-text": read_margin_tsv_text,
    "parquet": read_parquet_table,
    "pylate": read_pylate,
    "rank-permutations": read_rank_permutations,
    "sbert-jsonl": read_sbert_jsonl,
    "sbert-pickle": read_sbert_pickle,
    "tevatron": read_tevatron,
    "trec-run": read_trec_run,
}
NODE_READERS: dict[str, Callable[[Path], NodeTable]] = {"node-npz": read_node_npz}
READERS: dict[str, Callable[[Path], Blocks | NodeTable]] = {**PAIR_READERS, **NODE_READERS}
PAIR_WRITERS: dict[str, Callable[[Path, Lists], None]] = {
    "beir-run": write_beir_run,
    "colbert-examples": write_colbert_examples,
    "flagembedding": write_flagembedding,
    "hf-margin": write_hf_margin,
    "lightning-ir": write_lightning_ir,
    "margin-tsv-ids": write_margin_tsv_ids,
    "margin-tsv-text": write_margin_tsv_text,
    "parquet": write_parquet_table,
    "pylate": write_parquet_table,
    "rank-permutations": write_rank_permutations,
    "sbert-jsonl": write_sbert_jsonl,
    "sbert-pickle": write_sbert_pickle,
    "tevatron": write_tevatron,
    "trec-run": write_trec_run,
}
ANSWERS = "answers"
"What `sniff` says of a language model's raw list-wise answers: an order of candidates that the file does not name."
NODE_WRITERS: dict[str, Callable[[Path, NodeTable], None]] = {"node-npz": write_node_npz}
WRITERS: dict[str, Callable[..., None]] = {**PAIR_WRITERS, **NODE_WRITERS}


def read(path: str | Path, format: str = "auto") -> tuple[str, ScoreTable | NodeTable]:
    """A whole score file; returns the format (told from the content for "auto") and the table.

    Raises:
        UsageError: no such format.
        DataError: with file and line.
    """
    chosen, found = stream(path, format)
    return chosen, found if isinstance(found, NodeTable) else joined(found)


def stream(path: str | Path, format: str = "auto") -> tuple[str, Blocks | NodeTable]:
    """`read` block by block, in constant memory; logits of nodes come whole."""
    path = Path(path)
    if format != "auto" and format not in READERS:
        known = f"expected auto or one of {', '.join(sorted(READERS))}."
        raise UsageError(f"format {format!r}; {known}{did_you_mean(format, READERS)}")
    chosen = sniff(path) if format == "auto" else format
    if chosen == ANSWERS:
        raise DataError(
            f"{path}: raw answers of a language model, which number the candidates of a run that the file does not "
            "name. Give that run with --candidates RUN."
        )
    if chosen in NODE_READERS:
        return chosen, NODE_READERS[chosen](path)
    return chosen, _some(path, PAIR_READERS[chosen](path))


def _some(path: Path, blocks: Blocks) -> Blocks:
    """The blocks; DataError when they hold nothing."""
    count = 0
    for block in blocks:
        count += len(block)
        yield block
    if not count:
        raise DataError(f"{path}: no scores in it.")


def write(
    path: str | Path,
    format: str,
    store: PairScores | NodeScores,
    *,
    query_texts: Mapping[str, str] | None = None,
    document_texts: Mapping[str, str] | None = None,
) -> int:
    """Write a store in a format, atomically; returns the number of scores or nodes.

    Args:
        path: the file.
        format: a name of `WRITERS`.
        store: an open store.
        query_texts: query id -> text, for the formats that hold texts.
        document_texts: document id -> text.
    """
    kind = "pairs" if isinstance(store, PairScores) else "nodes"
    names = PAIR_WRITERS if kind == "pairs" else NODE_WRITERS
    if format not in names:
        raise UsageError(f"format {format!r} cannot hold {kind}; expected one of {', '.join(sorted(names))}.")
    if isinstance(store, NodeScores):
        NODE_WRITERS[format](Path(path), nodes_of(store))
        return len(store)
    lists = StoreLists(store)
    PAIR_WRITERS[format](Path(path), Lists(lists, query_texts, document_texts, store.spec.model))
    return lists.pairs


def sniff(path: Path) -> str:
    """Format of a file, from its content; DataError when none fits, naming what was seen."""
    if path.is_dir():
        return "pylate" if any(path.glob("train*")) else "parquet"
    with open_packed(path) as handle:
        try:
            head = handle.read(4)
        except BROKEN as error:
            raise DataError(f"{path}: its packed data is damaged or cut short ({error}).") from None
    if not head:
        raise DataError(f"{path}: the file is empty.")
    if head == b"PAR1":
        return _sniff_parquet(set(column_names(path)))
    if head[:2] == b"PK":
        return "node-npz"
    if is_pickle(path):
        return "sbert-pickle"
    number, line = next(read_lines(path), (1, ""))
    if line.lstrip()[:1] in ("{", "["):
        return _sniff_json(path, line)
    return _sniff_columns(path, number, line)


def _sniff_parquet(names: set[str]) -> str:
    if {"positive_id", "negative_id"} <= names:
        return "hf-margin"
    if "document_ids" in names:
        return "pylate"
    return "lightning-ir" if names & {"docno", "doc_id"} else "parquet"


def _sniff_json(path: Path, line: str) -> str:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError:
        return "beir-run"  # one object over several lines; its reader says what is wrong with it
    if isinstance(value, dict) and {"qid", "neg"} <= value.keys():
        return "sbert-jsonl"
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value) and _is_answer(value):
        return ANSWERS
    if isinstance(value, list):
        return "colbert-examples" if any(isinstance(item, list) for item in value) else "rank-permutations"
    if isinstance(value, dict) and {"query_id", "positive_passages"} <= value.keys():
        return "tevatron"
    if isinstance(value, dict) and {"query", "pos", "neg"} <= value.keys():
        return "flagembedding"
    if isinstance(value, dict) and {"document_ids", "scores"} <= value.keys():
        return "pylate"
    if isinstance(value, dict) and {"score"} <= value.keys():
        return "lightning-ir"
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        return "beir-run"
    raise _unknown(path, line)


def _is_answer(value: list[str]) -> bool:
    """Whether most of a list's strings are what a list-wise language model writes: [2] > [1] > [3], or a phrase."""
    ranked = sum(bool(re.search(r"\[\d+\]\s*>\s*\[\d+\]", text)) for text in value)
    return ranked > 0 or sum(" " in text.strip() for text in value) > len(value) / 2


def _sniff_columns(path: Path, number: int, line: str) -> str:
    tabs, words = [part.strip() for part in line.split("\t")], line.split()
    if is_header(line):
        return "lightning-ir"
    if len(tabs) == 5 and _is_number(tabs[0]) and _is_number(tabs[1]):
        return "margin-tsv-text" if any(" " in column for column in tabs[2:]) else "margin-tsv-ids"
    if len(tabs) == 5 and _is_number(tabs[3]) and _is_number(tabs[4]):
        raise DataError(
            f"{path}:{number}: five columns whose last two are numbers; expected pos_score, neg_score, query_id, "
            "pos_pid, neg_pid. Reorder them."
        )
    for columns in (tabs, words):
        if len(columns) == 3 and columns[2].isdigit():
            return "rank-permutations"
        if len(columns) in (4, 6) and all(_is_number(columns[at]) for at in ((2, 3) if len(columns) == 4 else (3, 4))):
            return "trec-run"
    raise _unknown(path, line, number)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown(path: Path, line: str, number: int = 1) -> DataError:
    shown = line if len(line) <= 80 else line[:77] + "..."
    known = ", ".join(sorted(READERS))
    return DataError(f"{path}:{number}: no known score format starts with {shown!r}. Name one with --format: {known}.")
