"""READERS and WRITERS: format name -> function; `sniff` tells a file's format from its content."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from structkd.errors import DataError, UsageError, did_you_mean
from structkd.scores.formats_base import Lists, NodeTable, ScoreTable, lists_of, nodes_of
from structkd.scores.formats_lists import (
    read_margin_tsv_ids,
    read_node_npz,
    read_sbert_jsonl,
    write_margin_tsv_ids,
    write_node_npz,
    write_sbert_jsonl,
)
from structkd.scores.formats_runs import (
    open_parquet,
    read_beir_run,
    read_lightning_ir,
    read_parquet_table,
    read_pylate,
    read_trec_run,
    write_beir_run,
    write_lightning_ir,
    write_parquet_table,
    write_trec_run,
)
from structkd.scores.formats_texts import (
    is_pickle,
    read_colbert_examples,
    read_flagembedding,
    read_hf_margin,
    read_margin_tsv_text,
    read_rank_permutations,
    read_sbert_pickle,
    read_tevatron,
    write_colbert_examples,
    write_flagembedding,
    write_hf_margin,
    write_margin_tsv_text,
    write_rank_permutations,
    write_sbert_pickle,
    write_tevatron,
)
from structkd.scores.nodes import NodeScores
from structkd.scores.pairs import PairScores
from structkd.trec import read_lines

READERS: dict[str, Callable[[Path], ScoreTable | NodeTable]] = {
    "beir-run": read_beir_run,
    "colbert-examples": read_colbert_examples,
    "flagembedding": read_flagembedding,
    "hf-margin": read_hf_margin,
    "lightning-ir": read_lightning_ir,
    "margin-tsv-ids": read_margin_tsv_ids,
    "margin-tsv-text": read_margin_tsv_text,
    "node-npz": read_node_npz,
    "parquet": read_parquet_table,
    "pylate": read_pylate,
    "rank-permutations": read_rank_permutations,
    "sbert-jsonl": read_sbert_jsonl,
    "sbert-pickle": read_sbert_pickle,
    "tevatron": read_tevatron,
    "trec-run": read_trec_run,
}
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
NODE_WRITERS: dict[str, Callable[[Path, NodeTable], None]] = {"node-npz": write_node_npz}
WRITERS: dict[str, Callable[..., None]] = {**PAIR_WRITERS, **NODE_WRITERS}


def read(path: str | Path, format: str = "auto") -> tuple[str, ScoreTable | NodeTable]:
    """Read a score file; returns the format (told from the content for "auto") and the table.

    Raises:
        UsageError: no such format.
        DataError: with file and line.
    """
    path = Path(path)
    if format != "auto" and format not in READERS:
        known = f"expected auto or one of {', '.join(sorted(READERS))}."
        raise UsageError(f"format {format!r}; {known}{did_you_mean(format, READERS)}")
    chosen = sniff(path) if format == "auto" else format
    table = READERS[chosen](path)
    if isinstance(table, ScoreTable) and not len(table):
        raise DataError(f"{path}: no scores in it.")
    return chosen, table


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
    lists = lists_of(store)
    PAIR_WRITERS[format](Path(path), Lists(lists, query_texts, document_texts, store.spec.model))
    return sum(len(documents) for documents, _ in lists.values())


def sniff(path: Path) -> str:
    """Format of a file, from its content; UsageError when several or none fit, naming what was seen."""
    if path.is_dir():
        return "pylate" if any(path.glob("train*")) else "parquet"
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with open(path, "rb") as handle:
        head = handle.read(4)
    if head == b"PAR1":
        return _sniff_parquet(set(open_parquet_schema(path)))
    if head[:2] == b"PK":
        return "node-npz"
    if is_pickle(path):
        return "sbert-pickle"
    _, line = next(read_lines(path), (0, ""))
    if line.lstrip()[:1] in ("{", "["):
        return _sniff_json(path, line)
    return _sniff_columns(path, line)


def open_parquet_schema(path: Path) -> list[str]:
    """Column names of a parquet file."""
    return list(open_parquet(path).column_names)


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


def _sniff_columns(path: Path, line: str) -> str:
    tabs, words = line.split("\t"), line.split()
    if len(tabs) == 5 and _is_number(tabs[0]) and _is_number(tabs[1]):
        return "margin-tsv-text" if any(" " in column.strip() for column in tabs[2:]) else "margin-tsv-ids"
    if len(words) == 3 and words[2].isdigit():
        return "rank-permutations"
    if len(words) in (4, 6) and _is_number(words[-1 if len(words) == 4 else -2]):
        return "trec-run"
    if words and words[0].lower().split(",")[0] in ("query_id", "qid"):
        return "lightning-ir"
    raise _unknown(path, line)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown(path: Path, line: str) -> DataError:
    shown = line if len(line) <= 80 else line[:77] + "..."
    return DataError(f"{path}:1: no known score format starts with {shown!r}. Name one with --format.")
