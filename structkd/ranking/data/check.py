"""Everything that is wrong with a folder in BEIR layout, line by line; the reader stops at the first."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structkd.errors import DataError
from structkd.ranking.data.collection import normalise
from structkd.trec import read_lines


@dataclass
class Report:
    """What a check found.

    Attributes:
        problems: (file with line, what is wrong): the collection must be mended.
        notes: (file, what is odd): it can be used, but figures may surprise.
        counts: documents, queries, judgements.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def check_folder(folder: str | Path) -> Report:
    """Read every line of corpus.jsonl, queries.jsonl and the judgements; nothing is raised, all is reported."""
    folder, report = Path(folder), Report()
    documents = _texts(folder / "corpus.jsonl", report, empty_allowed=True)
    queries = _texts(folder / "queries.jsonl", report, empty_allowed=False)
    report.counts = {"documents": len(documents), "queries": len(queries), "judgements": 0}
    files = [path for path in [folder / "qrels.tsv", *sorted(folder.glob("qrels/*.tsv"))] if path.is_file()]
    if not files:
        report.notes.append((str(folder), "no judgements (qrels.tsv or qrels/SPLIT.tsv): it cannot be evaluated"))
    judged = {path.stem: _judgements(path, queries, documents, report) for path in files}
    empty = sum(not text.strip() for text in documents.values())
    if empty:
        report.notes.append((str(folder / "corpus.jsonl"), f"{empty} documents have no text"))
    copies = sum(count - 1 for text, count in Counter(map(normalise, documents.values())).items() if count > 1 and text)
    if copies:
        report.notes.append(
            (str(folder / "corpus.jsonl"), f"{copies} documents repeat another's text under another id")
        )
    _repeats(folder, judged, queries, report)
    return report


def _texts(path: Path, report: Report, empty_allowed: bool) -> dict[str, str]:
    """Texts of the sound lines by id."""
    found: dict[str, str] = {}
    for where, value in _lines(path, report, json.loads):
        if not isinstance(value, dict):
            report.problems.append((where, f"found {type(value).__name__}, expected an object with _id and text"))
            continue
        identifier, text, title = value.get("_id"), value.get("text"), value.get("title") or ""
        if not isinstance(identifier, str) or not identifier:
            report.problems.append((where, f"'_id' is {identifier!r}, expected a non-empty string"))
        elif identifier in found:
            report.problems.append((where, f"id {identifier!r} occurs a second time"))
        elif not isinstance(text, str) or not isinstance(title, str):
            report.problems.append((where, f"{identifier!r} has no string 'text'"))
        elif not empty_allowed and not text.strip():
            report.problems.append((where, f"query {identifier!r} is empty"))
        else:
            found[identifier] = f"{title} {text}".strip()
    if not found and path.is_file():
        report.problems.append((str(path), "no sound line; expected one JSON object a line with _id and text"))
    return found


def _judgements(path: Path, queries: dict[str, str], documents: dict[str, str], report: Report) -> set[str]:
    """Judged queries."""
    seen: set[tuple[str, str]] = set()
    outside, positive = 0, set()
    for position, (where, columns) in enumerate(_lines(path, report, _columns)):
        grade = columns[-1].strip()
        whole = grade.removeprefix("-").isdigit()
        if position == 0 and not whole:
            continue  # the header
        if len(columns) not in (3, 4) or not whole:
            report.problems.append((where, f"found {' '.join(columns)!r}, expected `query document grade`"))
            continue
        query, document = columns[0], columns[-2]
        if query not in queries:
            report.problems.append((where, f"query {query!r} is judged but not in queries.jsonl"))
        elif (query, document) in seen:
            report.problems.append((where, f"document {document!r} is judged twice for query {query!r}"))
        outside += document not in documents
        seen.add((query, document))
        if int(grade) > 0:
            positive.add(query)
    report.counts["judgements"] += len(seen)
    if outside:
        report.notes.append(
            (str(path), f"{outside} judged documents are not in corpus.jsonl (full judgements of a pool?)")
        )
    without = len({query for query, _ in seen} - positive)
    if without:
        report.notes.append(
            (str(path), f"{without} judged queries have no document above grade 0; they are not averaged")
        )
    return {query for query, _ in seen}


def _repeats(folder: Path, judged: dict[str, set[str]], queries: dict[str, str], report: Report) -> None:
    """Training queries that a test query repeats."""
    if not {"train", "test"} <= judged.keys():
        return
    tested = {normalise(queries[query]) for query in judged["test"] if query in queries}
    repeats = [query for query in judged["train"] if query in queries and normalise(queries[query]) in tested]
    if repeats:
        shown = ", ".join(sorted(repeats)[:3])
        report.notes.append((str(folder), f"{len(repeats)} training queries repeat a test query's text ({shown})"))


def _columns(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.split()


def _lines(path: Path, report: Report, parse: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """("file:line", parsed line); what cannot be read or parsed goes to the report."""
    try:
        for number, line in read_lines(path):
            try:
                value = parse(line)
            except json.JSONDecodeError as error:
                report.problems.append((f"{path}:{number}", f"not valid JSON ({error})"))
            else:
                yield f"{path}:{number}", value
    except DataError as error:
        report.problems.append((str(path), str(error).removeprefix(f"{path}: ")))
