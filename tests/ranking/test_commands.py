"""The lines that scripts call: ranking distill, evaluate, score, encode, mine on a small folder; keys of contract."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from structkd.cli.app import run
from structkd.ranking.data import Collection
from structkd.ranking.negatives import bm25_candidates
from structkd.trec import read_run, write_run


@pytest.fixture
def folder(small: Collection, tmp_path: Path) -> Path:
    target = tmp_path / "small"
    target.mkdir()
    for name, texts in (("corpus", small.documents), ("queries", small.queries)):
        rows = zip(texts.ids, texts.texts, strict=True)
        lines = (json.dumps({"_id": identifier, "text": text}) + "\n" for identifier, text in rows)
        (target / f"{name}.jsonl").write_text("".join(lines))
    judged = (f"{query}\t{document}\t1\n" for query, own in small.qrels.items() for document in own)
    (target / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    write_run(tmp_path / "bm25.run", bm25_candidates(small, 10))
    return target


def output(capsys: pytest.CaptureFixture[str], *tokens: object) -> dict:
    capsys.readouterr()
    assert run(["ranking", *map(str, tokens), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_score_distill_evaluate_encode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, where = folder.parent, ("--collection", folder)
    scored = output(
        capsys, "score", *where, "--candidates", base / "bm25.run", "--teacher", "bm25", "--out", base / "s"
    )
    assert scored["asked"] == scored["rows"] == len(read_run(base / "bm25.run"))
    again = output(capsys, "score", *where, "--candidates", base / "bm25.run", "--teacher", "bm25", "--out", base / "s")
    assert (again["asked"], again["found"]) == (0, scored["rows"])
    flags = ("--student", "static", "--objective", "margin-mse", "--epochs", 2, "--seed", 3)
    made = output(capsys, "distill", *where, "--scores", base / "s", *flags, "--out", base / "d")
    assert {"run", "student", "steps", "pairs_per_second", "best"} <= made.keys()
    assert made["best"].keys() == {"step", "measures"}
    assert made["asked"] == 0
    SentenceTransformer(made["student"], device="cpu").encode(["alpha"])
    config = (base / "d" / "config.toml").read_text()
    assert "seed = 3" in config
    assert 'target_transform = "none"' in config
    for target in (made["student"], made["run"]):
        found = output(
            capsys, "evaluate", *where, "--model", target, "--mode", "rerank", "--candidates", base / "bm25.run",
            "--measures", "nDCG@10 RR@10",
        )  # fmt: skip
        assert found["mode"] == "rerank"
        assert found["queries"] == 12
        assert found["measures"].keys() == {"nDCG@10", "RR@10"}
    by_run = output(capsys, "evaluate", *where, "--run", base / "bm25.run", "--measures", "nDCG@10")
    assert 0 < by_run["measures"]["nDCG@10"] <= 1
    encoded = output(capsys, "encode", *where, "--model", made["student"], "--out", base / "v.npy")
    vectors = np.load(base / "v.npy")
    assert vectors.shape == (encoded["count"], encoded["dim"]) == (40, 384)
    assert (base / "v.txt").read_text().split() == [f"d{i:02d}" for i in range(40)]


def test_mined_negatives_are_a_run_without_positives(
    folder: Path, small: Collection, capsys: pytest.CaptureFixture[str]
) -> None:
    found = output(capsys, "mine", "--collection", folder, "--out", folder.parent / "n.run", "--per-query", 3)
    lists = read_run(folder.parent / "n.run").lists
    assert found["negatives"] == sum(len(documents) for documents, _ in lists.values())
    assert not any(document in small.qrels[query] for query, (documents, _) in lists.items() for document in documents)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["distill", "--out", "o"], "give either --scores STORE or --teacher"),
        (["evaluate"], "give either --run FILE or --model FOLDER"),
        (["distill", "--out", "o", "--teacher", "gpt"], "teacher 'gpt' is unknown"),
        (["distill", "--out", "o", "--teacher", "bm25", "--student", "dot"], "needs starting weights"),
    ],
)
def test_wrong_calls_are_usage_errors(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokens: list[str], message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    assert run(["ranking", *tokens, "--collection", str(folder)]) == 2
    assert message in capsys.readouterr().err
