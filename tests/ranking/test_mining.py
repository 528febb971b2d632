"""Mining: every filter against a slow loop, counts that add up, copies of positives in real data, the command line."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from structkd.cli.app import run
from structkd.errors import UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.collection import Collection, load, normalise
from structkd.ranking.data.negatives import MineConfig, bm25_candidates, mine
from structkd.scores import TeacherSpec, write_pairs
from structkd.trec import Run, read_run

RULES = ("own_id", "positive", "empty", "copy_of_positive", "repeated_text", "no_reference", "max_score")
MARGINS = ("absolute_margin", "relative_margin", "teacher_margin")
DOCUMENTS = [f"d{n}" for n in range(12)]
COLLECTION = Collection(
    "made",
    Texts(Ids(["q", "r", "s"]), ["a", "b", "c"]),
    Texts(Ids(DOCUMENTS), [f"text {n}" for n in range(12)]),
    {"q": {"d3": 1, "d6": 2}, "r": {"d0": 1}, "s": {}},
)
SCORES = {query: np.round(12 - np.arange(12.0) + shift, 2) for query, shift in (("q", 0.0), ("r", -7.5), ("s", 0.0))}
RUN = Run({"q": (DOCUMENTS, SCORES["q"]), "r": (DOCUMENTS[1:], SCORES["r"][1:]), "s": (DOCUMENTS, SCORES["s"])})


class Teacher:
    """Says 10 minus the document's number, and counts what it is asked."""

    spec = TeacherSpec("made")

    def __init__(self) -> None:
        self.asked = 0

    def score(self, pairs: Pairs) -> torch.Tensor:
        self.asked += len(pairs)
        return torch.tensor([10.0 - int(document[1:]) for document in pairs.document_ids])


def top(**values: Any) -> MineConfig:
    return MineConfig(choice="top", per_query=100, **values)


@pytest.mark.parametrize(("skip", "depth"), [(0, 12), (2, 5), (11, 100)])
def test_rank_range(skip: int, depth: int) -> None:
    mined = mine(COLLECTION, RUN, top(skip=skip, depth=depth))
    assert mined["q"] == [document for document in DOCUMENTS[skip:depth] if document not in ("d3", "d6")]
    assert mined["s"] == DOCUMENTS[skip:depth]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_score": 7.0}, 7.0),
        ({"absolute_margin": 0.0}, 6.0),  # the lowest positive, d6, has 6
        ({"absolute_margin": 2.5}, 3.5),
        ({"relative_margin": 0.5}, 3.0),
        ({"max_score": 5.0, "absolute_margin": 2.5, "relative_margin": 0.5}, 3.0),
    ],
)
def test_score_filters(config: dict[str, float], limit: float) -> None:
    expected = [
        document
        for document, score in zip(DOCUMENTS, SCORES["q"], strict=True)
        if score <= limit and document not in ("d3", "d6")
    ]
    assert mine(COLLECTION, RUN, top(**config))["q"] == expected


def test_relative_margins_of_negative_scores_stay_below_the_positive() -> None:
    """5 % of -4 is 0.2 below it, not above: logits have any sign."""
    run_below = Run({"r": (["d0", "d1", "d2"], np.asarray([-4.0, -4.1, -4.3]))})
    assert mine(COLLECTION, run_below, top(relative_margin=0.05))["r"] == ["d2"]


def test_without_a_positive_in_the_run_a_margin_lets_nothing_pass() -> None:
    mined = mine(COLLECTION, RUN, top(absolute_margin=1.0))
    assert mined["r"] == []  # d0 is not in its list
    assert mined["s"] == []  # nothing is judged
    assert mined.counts["no_reference"] == 11 + 12
    assert mined.counts["queries_without"] == 2


def test_teacher_margin() -> None:
    teacher = Teacher()
    mined = mine(COLLECTION, RUN, top(teacher_margin=1.5, depth=10), teacher=teacher)
    assert mined["q"] == ["d8", "d9"]  # the lowest positive, d6, has 4; d7 has 3 and lies too near
    assert mined["r"] == ["d2", "d3", "d4", "d5", "d6", "d7", "d8", "d9", "d10"]
    assert mined["s"] == []
    assert teacher.asked == (2 + 8) + (1 + 10) + 10
    assert mined.counts["teacher_margin"] == 6 + 1
    with pytest.raises(UsageError, match="teacher_margin needs a teacher"):
        mine(COLLECTION, RUN, top(teacher_margin=1.5))


@pytest.mark.parametrize("config", [{}, {"max_score": 6.0, "absolute_margin": 1.0, "teacher_margin": 2.0}])
def test_counts_add_up(config: dict[str, float]) -> None:
    mined = mine(COLLECTION, RUN, MineConfig(per_query=3, **config), teacher=Teacher())
    counts = defaultdict(int, mined.counts)
    assert counts["looked_at"] == 12 + 11 + 12
    assert counts["looked_at"] == counts["allowed"] + sum(counts[name] for name in (*RULES, *MARGINS))
    assert counts["taken"] == sum(map(len, mined.values())) <= 3 * 3
    assert counts["queries"] == 3
    assert counts["queries_short"] == sum(len(own) < 3 for own in mined.values())
    for own in mined.values():
        assert len(set(own)) == len(own)


def test_copies_of_positives_in_real_data_are_never_negatives(real_data: Path) -> None:
    """msmarco-dl22: 2,074 passages repeat another's text; whichever is called positive, its copies are left out."""
    collection = load(real_data / "ranking" / "msmarco-dl22")
    groups: dict[str, list[str]] = defaultdict(list)
    for document, text in zip(collection.documents.ids, collection.documents.texts, strict=True):
        groups[text].append(document)
    repeated = [group for group in groups.values() if len(group) > 1]
    assert sum(len(group) - 1 for group in repeated) == 2074
    query = next(iter(collection.queries.ids))
    judged = {query: {group[0]: 1 for group in repeated}}
    one = Collection("dl22", collection.with_queries([query]).queries, collection.documents, judged)
    everything = list(collection.documents.ids)
    mined = mine(one, Run({query: (everything, -np.arange(float(len(everything))))}), top(depth=len(everything)))
    positives = {normalise(text) for text, group in groups.items() if len(group) > 1}
    text_of = dict(zip(collection.documents.ids, collection.documents.texts, strict=True))
    taken = [normalise(text_of[document]) for document in mined[query]]
    assert not positives & set(taken)
    assert len(set(taken)) == len(taken)
    assert mined.counts["copy_of_positive"] >= 2074
    assert mined.counts["positive"] == len(repeated)


def test_without_judgements_second_copies_are_left_out_of_real_lists(real_data: Path) -> None:
    collection = load(real_data / "ranking" / "msmarco-dl22")
    collection = collection.with_queries(list(collection.queries.ids)[:10])
    lists = bm25_candidates(collection, 50)
    mined = mine(collection, lists, top(depth=50))
    assert mined.counts["repeated_text"] > 10
    assert mined.counts["taken"] == mined.counts["looked_at"] - mined.counts["repeated_text"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    place.mkdir()
    texts = ["cats purr", "cats purr", "cats sleep", "cats eat fish", "dogs bark"]
    corpus = [json.dumps({"_id": f"d{n}", "title": "", "text": text}) for n, text in enumerate(texts)]
    (place / "corpus.jsonl").write_text("\n".join(corpus))
    (place / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "cats purr"}))
    (place / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    return place


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "store", TeacherSpec("t"), ["q"] * 4, ["d0", "d2", "d3", "d4"], np.asarray([3, 2.9, 1, 0]))
    line = ["ranking", "mine", "--collection", str(folder), "--out", str(tmp_path / "n.run"), "--choice", "top"]
    assert run([*line, "--teacher-margin", "1", "--scores", str(tmp_path / "store"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert read_run(tmp_path / "n.run").lists["q"][0] == ["d3"]
    assert found["counts"]["copy_of_positive"] == found["counts"]["teacher_margin"] == found["counts"]["positive"] == 1
    assert (found["queries"], found["negatives"]) == (1, 1)
    assert run([*line, "--teacher-margin", "1"]) == 2
    assert "teacher_margin needs a teacher: give --teacher or --scores" in capsys.readouterr().err
    assert run([*line, "--teacher", "bm25", "--scores", str(tmp_path / "store")]) == 2
    assert run([*line, "--absolute-margin", "0.2"]) == 0
    assert "copy of positive" in capsys.readouterr().out
