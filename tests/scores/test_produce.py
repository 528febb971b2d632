"""Filling a store: one kept plan, units of many workers, resumption, equal texts, cost."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import scores
from structkd.errors import DataError, MissingScoreError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.scores import StoredScorer, TeacherSpec
from structkd.scores.layout.log import PairLog
from structkd.scores.produce import Production, Share, produce, reported

QUERIES = Texts(Ids([f"q{i}" for i in range(20)]), [f"question {i}" for i in range(20)])
DOCUMENTS = Texts(Ids([f"d{i}" for i in range(60)]), [f"body {i % 50}" for i in range(60)])  # ten are copies


class Teacher:
    """Scores by the texts alone, and remembers every pair of texts that it was asked."""

    spec = TeacherSpec("counting")

    def __init__(self, pause: float = 0.0) -> None:
        self.asked: list[tuple[str, str]] = []
        self.pause, self.tokens_read = pause, 0

    def score(self, pairs: Pairs) -> torch.Tensor:
        time.sleep(self.pause)
        texts = list(zip(pairs.query_texts, pairs.document_texts, strict=True))
        self.asked += texts
        self.tokens_read += sum(len(q.split()) + len(d.split()) for q, d in texts)
        return torch.tensor([value(q, d) for q, d in texts])


def value(query: str, document: str) -> float:
    return int(query.split()[1]) * 100 + int(document.split()[1]) * 0.5


def every_pair() -> Pairs:
    rows = np.random.default_rng(0).permutation(np.concatenate([np.arange(1200), np.arange(300)]))  # 300 twice
    return Pairs(QUERIES, DOCUMENTS, rows // 60, rows % 60)


def check(folder: Path, pairs: Pairs) -> None:
    want = [value(q, d) for q, d in zip(pairs.query_texts, pairs.document_texts, strict=True)]
    np.testing.assert_allclose(StoredScorer(scores.open(folder)).score(pairs).numpy(), want)


def test_each_pair_of_texts_is_asked_once(tmp_path: Path) -> None:
    teacher, pairs = Teacher(), every_pair()
    cost = produce(teacher, pairs, tmp_path, unit_rows=128)
    assert len(teacher.asked) == len(set(teacher.asked)) == 1000
    assert (cost.pairs, cost.same_text, cost.found, cost.asked, cost.left) == (1200, 200, 0, 1000, 0)
    assert cost.units == 8
    assert cost.tokens == 4000
    check(tmp_path, pairs)
    again = produce(Teacher(), pairs, tmp_path, unit_rows=128)
    assert (again.asked, again.found, again.units, again.tokens) == (0, 1000, 0, None)
    wider = Pairs(QUERIES, DOCUMENTS, np.array([0, 0]), np.array([1, 59]))
    assert produce(Teacher(), wider, tmp_path).asked == 0
    assert scores.verify(tmp_path).ok


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    class Dying(Teacher):
        def score(self, pairs: Pairs) -> torch.Tensor:
            if len(self.asked) >= 300:
                raise KeyboardInterrupt
            return super().score(pairs)

    first, pairs = Dying(), every_pair()
    with pytest.raises(KeyboardInterrupt):
        produce(first, pairs, tmp_path, unit_rows=100)
    second = Teacher()
    cost = produce(second, pairs, tmp_path, unit_rows=100)
    assert (cost.found, cost.asked) == (300, 700)
    assert not set(first.asked) & set(second.asked)
    check(tmp_path, pairs)


def work(folder: str, share: Share, pause: float) -> None:
    produce(Teacher(pause), every_pair(), folder, share=share, unit_rows=50)


@pytest.mark.parametrize("shares", [[Share(0, 2), Share(1, 2)], [Share(first=0, last=9), Share(first=9)]])
def test_two_processes_share_a_folder(tmp_path: Path, shares: list[Share]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(str(tmp_path), share, 0.0)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    units = PairLog.open(tmp_path, Teacher.spec).units()
    teacher = Teacher()
    cost = produce(teacher, every_pair(), tmp_path, unit_rows=50)
    assert (len(teacher.asked), cost.found) == (0, 1000)
    assert len(units) >= 20
    check(tmp_path, every_pair())


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(str(tmp_path), Share(), 0.02))
    process.start()
    while process.is_alive() and len(list(tmp_path.glob("parts/*.parquet"))) < 3:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = len(list(tmp_path.glob("parts/*.parquet")))
    cost = produce(Teacher(), every_pair(), tmp_path, unit_rows=50)
    assert 3 <= done < 20
    assert cost.asked == 1000 - 50 * done
    check(tmp_path, every_pair())


def test_a_share_alone_says_what_is_left(tmp_path: Path) -> None:
    cost = produce(Teacher(), every_pair(), tmp_path, share=Share(0, 2), unit_rows=100)
    assert (cost.units, cost.left) == (5, 5)
    with pytest.raises(MissingScoreError):
        check(tmp_path, every_pair())


def test_progress_tells_rate_cost_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    teacher = Teacher(0.01)
    job = Production(teacher, every_pair(), tmp_path, unit_rows=250)
    for unit in reported(job, job.pending(), "counting", every=0.005):
        job.score(teacher, unit)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert lines[0].startswith("counting: 250 of 1,000 pairs, 1,000 tokens, ")
    assert lines[0].endswith(" left")
    assert "pairs/s, 00:00:0" in lines[0]


def test_wrong_answers_and_shares_are_refused(tmp_path: Path) -> None:
    class Short(Teacher):
        def score(self, pairs: Pairs) -> torch.Tensor:
            return super().score(pairs)[:-1]

    with pytest.raises(DataError, match=r"scores of shape \(999,\) for 1000 pairs"):
        produce(Short(), every_pair(), tmp_path)
    for wrong in ({"rank": 2, "world": 2}, {"first": 3, "last": 3}, {"first": -1}):
        with pytest.raises(UsageError, match="expected"):
            Share(**wrong)
    with pytest.raises(UsageError, match="expected 1 or more"):
        produce(Teacher(), every_pair(), tmp_path, unit_rows=0)
