"""Language models' listwise answers: how they are read, and the published run that they make again."""

from pathlib import Path

import numpy as np
import pytest

from structkd import acquisition
from structkd.cli.app import run
from structkd.errors import DataError, UsageError
from structkd.ranking.data.answers import read_answer, read_answers, replay, scores_of
from structkd.trec import Run, read_run


@pytest.mark.parametrize(
    ("text", "order", "exact", "named"),
    [
        ("[2] > [4] > [1] > [3]", [1, 3, 0, 2], True, 4),
        ("1. [2] > [4] > [1] > [3]\n", [1, 3, 0, 2], True, 4),
        ("2 > 4 > 1 > 3", [1, 3, 0, 2], True, 4),
        ("[3] > [3] > [9] > [0]", [2, 0, 1, 3], False, 1),  # repeats and strangers go, the rest follows in order
        ("I cannot rank these.", [0, 1, 2, 3], False, 0),
        ("", [0, 1, 2, 3], False, 0),
        ("[" + "9" * 5000 + "]", [0, 1, 2, 3], False, 0),
    ],
)
def test_an_answer_becomes_a_permutation(text: str, order: list[int], exact: bool, named: int) -> None:
    found = read_answer(text, 4)
    assert (found.order, found.exact, found.named) == (order, exact, named)


def test_windows_slide_from_the_bottom_to_the_top() -> None:
    """Six documents, windows of four by two: the second window sees what the first one left."""
    first = Run({"q": (list("abcdef"), -np.arange(1.0, 7.0))})
    found = replay(first, ["[4] > [3] > [2] > [1]", "[4] > [1] > [2] > [3]"], window=4, step=2, depth=6)
    assert found.run.lists["q"][0] == ["e", "a", "b", "f", "d", "c"]  # cdef -> fedc; abfe -> eabf
    np.testing.assert_array_equal(scores_of(found), [[-4, -3, -2, -1], [-2, -3, -4, -1]])


def test_answers_make_the_published_run_again(real_data: Path) -> None:
    """RankVicuna's 387 answers over BM25's lists give the run that its authors published, all 43 lists."""
    folder = real_data / "ranking"
    first = read_run(folder / "msmarco-dl19" / "runs" / "bm25.tsv", by_rank=True)
    found = replay(first, read_answers(folder / "llm-responses" / "rankvicuna_dl19_bm25.json"))
    assert (found.exact, found.windows) == (387, 387)
    published = read_run(folder / "msmarco-dl19" / "runs" / "bm25-rankvicuna.tsv", by_rank=True)
    assert list(found.run.lists) == list(published.lists)
    for query, (documents, _) in published.lists.items():
        assert found.run.lists[query][0] == list(documents)


@pytest.mark.parametrize(("name", "exact"), [("vicuna7b-raw_dl19_bm25", 365), ("vicuna13b-raw_dl19_bm25", 1)])
def test_answers_that_are_no_permutations_are_counted(real_data: Path, name: str, exact: int) -> None:
    folder = real_data / "ranking"
    first = read_run(folder / "msmarco-dl19" / "runs" / "bm25.tsv", by_rank=True)
    found = replay(first, read_answers(folder / "llm-responses" / f"{name}.json"))
    assert (found.exact, found.windows) == (exact, 387)
    for query, (documents, _) in found.run.lists.items():
        assert sorted(documents) == sorted(first.lists[query][0][:100])


def test_filters_on_real_answers(real_data: Path) -> None:
    """Round-trip consistency and agreement, with two language models as teacher and student over the same windows."""
    folder = real_data / "ranking"
    first = read_run(folder / "msmarco-dl19" / "runs" / "bm25.tsv", by_rank=True)
    good, raw = (
        scores_of(replay(first, read_answers(folder / "llm-responses" / f"{name}.json")))
        for name in ("rankvicuna_dl19_bm25", "vicuna7b-raw_dl19_bm25")
    )
    own = np.zeros(len(good), dtype=np.int64)  # the text that stood first: is it still among the answer's first three?
    kept = acquisition.teacher_filter(good, own, top=3)
    np.testing.assert_array_equal(kept, good[:, 0] >= -3)
    np.testing.assert_array_equal(kept, acquisition.teacher_filter(good, own, threshold=-3))
    assert 0 < kept.sum() < len(good)
    assert (acquisition.teacher_filter(good, own, top=1) <= kept).all()
    agreed = acquisition.agreement(raw, good, student_confidence=0.1, teacher_confidence=0.1)
    np.testing.assert_array_equal(agreed, raw.argmax(1) == good.argmax(1))
    assert 0 < agreed.sum() < len(good)
    assert not acquisition.agreement(raw, good, student_confidence=0.9, teacher_confidence=0.1).any()


def test_the_command_writes_a_run(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = real_data / "ranking"
    out = tmp_path / "order.trec"
    line = ["ranking", "order", "--answers", str(folder / "llm-responses" / "vicuna7b-raw_dl19_bm25.json")]
    line += ["--candidates", str(folder / "msmarco-dl19" / "runs" / "bm25.tsv"), "--out", str(out), "--json"]
    assert run(line) == 0
    assert '"permutations": 365' in capsys.readouterr().out
    assert len(read_run(out).lists) == 43


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = Run({"q": (list("abcdef"), -np.arange(1.0, 7.0))})
    with pytest.raises(DataError, match="1 answers for 1 queries of 2 windows"):
        replay(run, ["[1]"], window=4, step=2, depth=6)
    with pytest.raises(UsageError, match="do not cover"):
        replay(run, ["[1]"], window=4, step=3, depth=6)
    with pytest.raises(DataError, match="has 6 documents"):
        replay(run, ["[1]"] * 3, window=4, step=2, depth=8)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a JSON list of answers"):
        read_answers(tmp_path / "bad.json")
