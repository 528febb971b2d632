"""The lines that scripts call: ranking distill, evaluate, score, encode, mine on a small folder; keys of contract."""

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from structkd.cli.app import run
from structkd.index.kinds import open as open_index
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.evaluation.measures import retrieve
from structkd.ranking.models.students import load_student, student
from structkd.trec import Run, read_run, write_run


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


@pytest.fixture
def scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    run_file = folder.parent / "bm25.run"
    output(
        capsys, "score", "--collection", folder, "--candidates", run_file, "--teacher", "bm25",
        "--out", folder.parent / "s",
    )  # fmt: skip
    return folder


def distilled(scored: Path, tiny: str, capsys: pytest.CaptureFixture[str], kind: str, *flags: object) -> Path:
    base = scored.parent
    given = ("--student", kind, "--init", tiny, "--max-steps", 2, *flags)
    made = output(capsys, "distill", "--collection", scored, "--scores", base / "s", *given, "--out", base / kind)
    return Path(made["run"])


def test_colbert_distils_re_ranks_retrieves_and_is_indexed(
    scored: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, where = scored.parent, ("--collection", scored)
    model = distilled(scored, tiny, capsys, "colbert", "--variant", "matchmaker")
    evaluate = ("evaluate", *where, "--model", model, "--measures", "nDCG@10 R@40")
    re_ranked = output(capsys, *evaluate, "--mode", "rerank", "--candidates", base / "bm25.run")
    found = output(capsys, *evaluate, "--mode", "retrieve")
    assert re_ranked["mode"] == "rerank"
    assert found["measures"]["R@40"] == 1.0  # all 40 documents come back
    made = output(capsys, "encode", *where, "--model", model, "--out", base / "v.npy")
    assert made["dim"] == 32
    assert made["rows"] == len(np.load(base / "v.npy")) == len((base / "v.txt").read_text().split())
    assert made["bytes_per_document"] == pytest.approx(made["rows"] * 32 * 4 / 40, abs=0.1)
    build = ["index", "build", "--vectors", base / "v.npy", "--kind", "multi-vector", "--metric", "ip"]
    assert run([*map(str, build), "--out", str(base / "index")]) == 0
    scorer, index = load_student(model), open_index(base / "index")
    texts = datasets.load(str(scored)).queries
    top = index.search(scorer.encode_multi(texts.texts, "query"), 5).run(list(texts.ids))
    expected = retrieve(datasets.load(str(scored)), scorer, depth=5)
    assert {q: docs for q, (docs, _) in top.lists.items()} == {q: docs for q, (docs, _) in expected.lists.items()}


def test_retrieval_by_index_gives_the_models_own_scores(tiny: str, small: Collection) -> None:
    scorer = student("colbert", tiny)
    found = retrieve(small, scorer, depth=40)
    pairs = small.pairs_of(found)
    listed = np.concatenate([scores for _, scores in found.lists.values()])
    np.testing.assert_allclose(scorer.score(pairs).numpy(), listed, rtol=1e-4, atol=1e-4)


def test_prett_distils_stores_its_documents_and_re_ranks_from_them(
    scored: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, where = scored.parent, ("--collection", scored)
    model = distilled(scored, tiny, capsys, "prett", "--max-length", 34)
    made = output(capsys, "encode", *where, "--model", model, "--out", base / "layers", "--dtype", "float32")
    assert made["count"] == 40
    assert made["bytes_per_document"] > 32 * 4
    given = ("evaluate", *where, "--model", model, "--candidates", base / "bm25.run")
    plain = output(capsys, *given)
    assert output(capsys, *given, "--documents", base / "layers")["measures"] == pytest.approx(plain["measures"])
    assert run(["ranking", *map(str, given), "--mode", "retrieve"]) == 2
    assert "scores pairs and has no vectors; use mode 'rerank'" in capsys.readouterr().err
    assert run(["ranking", "encode", *map(str, where), "--model", str(model), "--out", "v.npy"]) == 2
    assert "writes a folder of document layers" in capsys.readouterr().err


def test_cat_and_tk_have_nothing_to_store_and_layers_fit_prett_alone(
    scored: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = distilled(scored, tiny, capsys, "cat")
    where = ("--collection", str(scored), "--model", str(model))
    assert run(["ranking", "encode", *where, "--out", str(scored.parent / "v.npy")]) == 2
    assert "a cat model scores pairs and has nothing to store" in capsys.readouterr().err
    assert run(["ranking", "evaluate", *where, "--mode", "retrieve"]) == 2
    assert "has no vectors; use mode 'rerank'" in capsys.readouterr().err
    assert run(["ranking", "evaluate", *where, "--documents", str(scored)]) == 2
    assert "holds stored layers of a prett model" in capsys.readouterr().err


def test_a_run_is_tested_against_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder.parent
    run_of_all = read_run(base / "bm25.run")
    reversed_lists = {query: (ids[::-1], scores) for query, (ids, scores) in run_of_all.lists.items()}
    write_run(base / "worse.run", Run(reversed_lists))
    line = ("evaluate", "--collection", folder, "--run", base / "bm25.run", "--baseline", base / "worse.run")
    found = output(capsys, *line, "--protocol", "beir", "--per-query", base / "values.json")
    assert found["protocol"] == "beir"
    assert found["measures"].keys() == {"nDCG@10", "R@100"}
    tests = {test["measure"]: test for test in found["baseline"]["tests"]}
    change = found["measures"]["nDCG@10"] - found["baseline"]["measures"]["nDCG@10"]
    assert tests["nDCG@10"]["difference"] == pytest.approx(change)
    assert tests["nDCG@10"]["difference"] > 0
    assert {"p_value", "t_test", "low", "high", "wins", "losses", "queries"} <= tests["nDCG@10"].keys()
    values = json.loads((base / "values.json").read_text())
    assert np.mean(list(values["nDCG@10"].values())) == pytest.approx(found["measures"]["nDCG@10"])


def test_evaluate_keeps_lists_values_and_a_report_in_a_run_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lists that were judged give the same measures again; another command's folder is not written over."""
    base = folder.parent
    line = ("evaluate", "--collection", folder, "--run", base / "bm25.run", "--measures", "nDCG@10")
    found = output(capsys, *line, "--out", base / "judged")
    assert {"run.json", "config.toml", "report.html"} <= {path.name for path in (base / "judged").iterdir()}
    again = output(capsys, *line[:3], "--run", base / "judged" / "run.trec", "--measures", "nDCG@10")
    assert again["measures"] == pytest.approx(found["measures"])
    values = json.loads((base / "judged" / "per_query.json").read_text())["nDCG@10"]
    assert np.mean(list(values.values())) == pytest.approx(found["measures"]["nDCG@10"])
    assert "nDCG@10" in (base / "judged" / "report.html").read_text()
    line = ("distill", "--collection", folder, "--teacher", "bm25", "--student", "static", "--out", base / "judged")
    assert run(["ranking", *map(str, line)]) == 2
    assert "judged holds a run of `ranking evaluate`, not of `ranking distill`" in capsys.readouterr().err


def test_evaluate_takes_judgements_from_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TREC's four columns; a judged document that the pool lacks stays in the ideal ranking."""
    where = ("--collection", folder, "--run", folder.parent / "bm25.run", "--measures", "nDCG@10")
    first = read_run(folder.parent / "bm25.run").lists["q00"][0][0]
    (folder.parent / "full.trec").write_text(f"q00 0 {first} 1\nq00 0 elsewhere 1\n")
    found = output(capsys, "evaluate", *where, "--qrels", folder.parent / "full.trec")
    assert found["queries"] == 1
    assert found["measures"]["nDCG@10"] == pytest.approx(1 / (1 + 1 / np.log2(3)))  # one of two, at the head
    (folder.parent / "full.trec").write_text("q99 0 d00 1\n")
    assert run(["ranking", "evaluate", *map(str, where), "--qrels", str(folder.parent / "full.trec")]) == 1
    assert "full.trec:1: query 'q99' is judged but is not among the 12 queries" in capsys.readouterr().err
