"""`structkd scores`: the lines of the contract, their JSON keys and exit status."""

import json
from pathlib import Path

import numpy as np
import pytest

from structkd import scores
from structkd.cli.app import run
from structkd.scores import TeacherSpec

RUN = "q1 Q0 d1 1 9.5 t\nq1 Q0 d2 2 3.0 t\nq1 Q0 d3 3 -1.25 t\nq2 Q0 d1 1 0.5 t\nq2 Q0 d3 2 0.25 t\n"


def called(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, dict]:
    status = run([str(argument) for argument in ("scores", *arguments, "--json")])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


def test_from_a_run_to_a_published_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "teacher.run").write_text(RUN)
    store, out = tmp_path / "s", tmp_path / "p"
    status, found = called(capsys, "import", tmp_path / "teacher.run", "--format", "trec-run", "--out", store)
    assert (status, found["rows"], found["format"]) == (0, 5, "trec-run")
    status, shown = called(capsys, "show", store)
    assert status == 0
    assert {"kind", "teacher", "fingerprint", "rows", "queries", "bytes", "bytes_per_row", "stats"} <= shown.keys()
    assert shown["teacher"]["model"] == "teacher.run"
    assert (shown["kind"], shown["rows"], shown["queries"]) == ("pairs", 5, 2)
    assert shown["bytes_per_row"] == shown["bytes"] / 5
    assert shown["stats"]["max"] == 9.5
    status, _ = called(capsys, "export", store, "--format", "margin-tsv-ids", "--out", tmp_path / "m.tsv")
    assert status == 0
    assert (tmp_path / "m.tsv").read_text().splitlines()[0] == "9.5\t3.0\tq1\td1\td2"
    status, found = called(capsys, "publish", store, "--out", out, "--license", "CC-BY-4.0")
    assert (status, found["rows"], found["files"]) == (0, 5, 6)
    status, found = called(capsys, "verify", out)
    assert (status, found) == (0, {"ok": True, "files": 6, "problems": []})
    path = out / "data" / "scores-00000.parquet"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    status, found = called(capsys, "verify", out)
    assert status == 1
    assert found["problems"] == [
        {"path": "data/scores-00000.parquet", "problem": "its bytes differ from the manifest's checksum"}
    ]
    status, found = called(capsys, "compact", store, "--dtype", "float32")
    assert (status, found["dtype"], found["rows"]) == (0, "float32", 5)


def test_import_with_a_collection_keys_by_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    texts = [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in (1, 2, 3)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in (1, 2)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    (tmp_path / "r").write_text(RUN)
    status, _ = called(
        capsys, "import", tmp_path / "r", "--out", tmp_path / "s", "--collection", folder, "--teacher-name", "mine"
    )
    assert status == 0
    store = scores.open(tmp_path / "s", expect=TeacherSpec("mine"))
    assert None not in store.documents.hashes
    for format in ("tevatron", "flagembedding", "margin-tsv-text"):
        line = ("export", tmp_path / "s", "--format", format, "--out", tmp_path / format, "--collection", folder)
        assert called(capsys, *line)[0] == 0
    assert json.loads((tmp_path / "tevatron").read_text().splitlines()[0])["positive_passages"][0]["text"] == "text 1"
    (tmp_path / "r").write_text("q1 Q0 unknown 1 2.0 t\n")
    assert (
        run(["scores", "import", str(tmp_path / "r"), "--out", str(tmp_path / "x"), "--collection", str(folder)]) == 1
    )
    assert "1 of 1 ids are unknown, for example 'unknown'" in capsys.readouterr().err


def pair_store(folder: Path, model: str, lists: dict[str, dict[str, float]]) -> Path:
    flat = [(q, d, s) for q, found in lists.items() for d, s in found.items()]
    queries, documents, values = zip(*flat, strict=True)
    scores.write_pairs(folder, TeacherSpec(model), list(queries), list(documents), np.array(values))
    return folder


A = {"q": {"a": 1.0, "b": 2.0, "c": 6.0}}
B = {"q": {"a": 3.0, "b": 4.0, "c": 0.0}}
C = {"q": {"a": 8.0, "b": 0.0, "c": 0.5}}


def standard(values: dict[str, float]) -> dict[str, float]:
    mean, deviation = np.mean(list(values.values())), np.std(list(values.values()))
    return {name: (value - mean) / deviation for name, value in values.items()}


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--method", "mean"], {"a": 4.0, "b": 2.0, "c": 6.5 / 3}),
        (["--method", "median"], {"a": 3.0, "b": 2.0, "c": 0.5}),
        (["--method", "weighted", "--weights", "1,0,3"], {"a": 6.25, "b": 0.5, "c": 1.875}),
        (
            ["--method", "rrf"],
            {"a": 1 / 63 + 1 / 62 + 1 / 61, "b": 1 / 62 + 1 / 61 + 1 / 63, "c": 1 / 61 + 1 / 63 + 1 / 62},
        ),
        (
            ["--method", "standardised"],
            {name: float(np.mean([standard(x["q"])[name] for x in (A, B, C)])) for name in "abc"},
        ),
    ],
)
def test_ensembles(tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], want: dict) -> None:
    stores = [pair_store(tmp_path / name, name, lists) for name, lists in (("a", A), ("b", B), ("c", C))]
    status, found = called(capsys, "ensemble", *stores, "--out", tmp_path / "out", *arguments)
    assert (status, found["rows"]) == (0, 3)
    store = scores.open(tmp_path / "out")
    got = store.lookup(["q"] * 3, ["a", "b", "c"])
    np.testing.assert_allclose(got, [want[name] for name in "abc"], rtol=2e-3)
    assert store.spec.model == "a+b+c"
    assert store.spec.extra["teachers"] == [TeacherSpec(name).fingerprint for name in "abc"]


def test_ensembles_never_average_over_fewer_teachers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = pair_store(tmp_path / "a", "a", A)
    two = pair_store(tmp_path / "b", "b", {"q": {"a": 3.0, "x": 1.0}, "r": {"a": 1.0}})
    line = ["scores", "ensemble", str(one), str(two), "--out", str(tmp_path / "out")]
    assert run(line) == 1
    assert "1 missing, for example r" in capsys.readouterr().err
    assert run([*line, "--missing", "union"]) == 2
    assert "average over fewer teachers" in capsys.readouterr().err
    assert run([*line, "--missing", "common"]) == 0
    assert scores.open(tmp_path / "out").pairs()[1] == ["a"]
    capsys.readouterr()
    union = tmp_path / "union"
    assert run([*line[:-1], str(union), "--missing", "union", "--method", "rrf"]) == 0
    store = scores.open(union)
    assert len(store) == 5
    assert store.lookup(["q"], ["x"]) == pytest.approx(1 / 62, rel=1e-3)
    capsys.readouterr()
    for extra, message in (
        (["--method", "weighted"], "--weights belongs to"),
        (["--method", "weighted", "--weights", "1"], "1 weights for 2 stores"),
        (["--method", "weighted", "--weights", "x,y"], "expected numbers"),
    ):
        assert run([*line, *extra]) == 2
        assert message in capsys.readouterr().err


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = pair_store(tmp_path / "a", "a", A | {"r": {"a": 5.0}})
    two = pair_store(tmp_path / "b", "b", {"q": {"a": 1.5, "b": 2.0, "x": 1.0}, "r": {"a": 5.0}})
    status, found = called(capsys, "diff", one, two)
    assert status == 0
    assert (found["only_first"], found["only_second"], found["common"]) == (1, 1, 3)
    assert found["max_difference"] == 0.5
    assert found["mean_difference"] == pytest.approx(0.5 / 3)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 5], [1.5, 2, 5])[0, 1])
    assert found["same_best"] == 1.0
    assert found["teacher_fields"] == {"model": ["a", "b"]}


def test_diff_of_orders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    lists = [{f"q{q}": {f"d{d}": float(v) for d, v in enumerate(rng.integers(0, 40, 30))} for q in range(6)}]
    lists.append({q: {d: v + float(rng.integers(-9, 9)) for d, v in own.items()} for q, own in lists[0].items()})
    one, two = (pair_store(tmp_path / name, name, own) for name, own in zip("ab", lists, strict=True))
    status, found = called(capsys, "diff", one, two)
    assert status == 0
    taus, overlaps, margins = [], [], []
    for query, own in lists[0].items():
        other = lists[1][query]
        taus.append(kendalltau([own[d] for d in own], [other[d] for d in own]).statistic)
        best = [sorted(scores, key=lambda d: (-scores[d], d))[:10] for scores in (own, other)]
        overlaps.append(len(set(best[0]) & set(best[1])) / 10)
        margins += [(own[best[0][0]] - own[d], other[best[0][0]] - other[d]) for d in own if d != best[0][0]]
    assert found["kendall_tau"] == pytest.approx(np.mean(taus))
    assert found["overlap_at_10"] == pytest.approx(np.mean(overlaps))
    first, second = np.array(margins).T
    want = {"first_mean": first.mean(), "second_std": second.std(), "pearson": np.corrcoef(first, second)[0, 1]}
    assert {name: found["margins"][name] for name in want} == pytest.approx(want)
    assert called(capsys, "diff", one, one)[1]["kendall_tau"] == pytest.approx(1.0)


# calibration


def test_teachers_are_calibrated_each_by_its_rule(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stores = [pair_store(tmp_path / name, name, lists) for name, lists in (("a", A), ("b", B))]
    line = ("ensemble", *stores, "--method", "mean")
    cases = {
        "z-score": {d: (standard(A["q"])[d] + standard(B["q"])[d]) / 2 for d in "abc"},
        "min-max": {"a": (0 + 0.75) / 2, "b": (0.2 + 1) / 2, "c": 0.5},
        "rank": {"a": (0 + 0.5) / 2, "b": (0.5 + 1) / 2, "c": 0.5},
        "rank,none": {"a": (0 + 3.0) / 2, "b": (0.5 + 4.0) / 2, "c": (1 + 0.0) / 2},
    }
    for rule, want in cases.items():
        out = tmp_path / rule.replace(",", "-")
        assert called(capsys, *line, "--calibrate", rule, "--out", out)[0] == 0  # from the stores: no teacher is there
        store = scores.open(out)
        np.testing.assert_allclose(store.lookup(["q"] * 3, list("abc")), [want[d] for d in "abc"], atol=2e-3)
        assert store.spec.extra["calibrate"] == (rule.split(",") if "," in rule else [rule] * 2)
    for rule, message in (("z", "expected one of none, z-score"), ("rank,rank,rank", "3 calibrations for 2 stores"),
                          ("isotonic", "name their --collection")):  # fmt: skip
        assert run(["scores", *map(str, line), "--calibrate", rule, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
    same = called(capsys, "ensemble", *stores, "--method", "reciprocal-rank", "--out", tmp_path / "rr")
    assert same[0] == 0
    assert scores.open(tmp_path / "rr").spec.extra["ensemble"] == "rrf"


def test_isotonic_is_fitted_to_the_judgements(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from sklearn.isotonic import IsotonicRegression

    from structkd.scores.calibrate import isotonic

    rng = np.random.default_rng(0)
    xs, grades = rng.integers(0, 50, 200).astype(float), rng.integers(0, 4, 200).astype(float)
    grades += xs > 25
    ours = isotonic(xs, grades)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(xs, grades)
    points = np.linspace(-5, 55, 200)
    np.testing.assert_allclose(ours(points), theirs.predict(points), atol=1e-9)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("".join(f'{{"_id": "{d}", "text": "{d}"}}\n' for d in "abc"))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "q"}\n')
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t0\nq\tb\t2\nq\tc\t1\n")
    stores = [pair_store(tmp_path / name, name, lists) for name, lists in (("a", A), ("b", B))]
    line = ("ensemble", *stores, "--calibrate", "isotonic", "--collection", folder, "--out", tmp_path / "out")
    assert called(capsys, *line)[0] == 0
    got = scores.open(tmp_path / "out").lookup(["q"] * 3, list("abc"))
    # a: scores 1, 2, 6 of grades 0, 2, 1 pool to 0, 1.5, 1.5; b: 3, 4, 0 of 0, 2, 1 pool to .5, 2, .5
    np.testing.assert_allclose(got, [0.25, 1.75, 1.0], atol=2e-3)


# the scale doctor


def test_the_doctor_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from structkd.scores.doctor import temperature

    rng = np.random.default_rng(0)
    sound = {f"q{q}": {f"d{d}": float(v) for d, v in enumerate(rng.normal(0, 1.2, 30))} for q in range(40)}
    found = called(capsys, "show", pair_store(tmp_path / "sound", "t", sound))[1]["doctor"]
    assert found["warnings"] == []
    assert found["lists"] == 40
    hot = temperature([np.array(list(own.values())) for own in sound.values()])
    assert found["suggested_temperature"] == pytest.approx(hot, rel=1e-2)
    shares = [np.exp((v := np.array(list(own.values()))) / hot) / np.exp(v / hot).sum() for own in sound.values()]
    assert np.median([np.exp(-(p * np.log(p)).sum()) for p in shares]) == pytest.approx(4, rel=1e-3)
    cases = {
        "ranks": ({q: {d: -float(i) for i, d in enumerate(own)} for q, own in sound.items()}, "only the order counts"),
        "collapsed": (sound | {f"c{i}": {"d0": 1.0, "d1": 1.0} for i in range(9)}, "have one value for every document"),
        "rounded": ({q: {d: round(v * 2) / 2 for d, v in own.items()} for q, own in sound.items()}, "are tied"),
        "sigmoid": (
            {q: {d: 1 / (1 + np.exp(-9 * v)) for d, v in own.items()} for q, own in sound.items()},
            "at an end of their range",
        ),
        "sharp": ({q: {d: 90 * v for d, v in own.items()} for q, own in sound.items()}, "takes all"),
    }
    for name, (lists, message) in cases.items():
        warnings = called(capsys, "show", pair_store(tmp_path / name, "t", lists))[1]["doctor"]["warnings"]
        assert any(message in warning for warning in warnings), (name, warnings)


def test_the_doctor_tells_scores_of_another_system(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r").write_text("q Q0 a 1 1.0 t\nq Q0 b 2 3.5 t\nq Q0 c 3 2.0 t\n")  # the rank column disagrees
    assert called(capsys, "import", tmp_path / "r", "--out", tmp_path / "s")[0] == 0
    warnings = called(capsys, "show", tmp_path / "s")[1]["doctor"]["warnings"]
    assert any("the rank column disagrees with the scores" in warning for warning in warnings)


def test_the_doctor_examines_logits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sharp = np.eye(7)[np.arange(60) % 7] * 40
    scores.write_nodes(tmp_path / "n", TeacherSpec("gnn", kind="rows"), sharp, "g")
    found = called(capsys, "show", tmp_path / "n")[1]["doctor"]
    assert found["top_probability"] > 0.99
    assert any("logits are near one-hot" in warning for warning in found["warnings"])
    assert 5 < found["suggested_temperature"] < 40


def test_nodes_from_npz(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", logits=logits, graph_fingerprint="g")
    status, found = called(capsys, "import", tmp_path / "x.npz", "--out", tmp_path / "s")
    assert (status, found["kind"], found["rows"], found["dtype"]) == (0, "rows", 6, "float32")
    np.testing.assert_array_equal(scores.open(tmp_path / "s").logits, logits)
    assert called(capsys, "export", tmp_path / "s", "--format", "node-npz", "--out", tmp_path / "y.npz")[0] == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["logits"], logits)
    status, found = called(capsys, "diff", tmp_path / "s", tmp_path / "s")
    assert (found["max_difference"], found["same_best"], found["same_graph"]) == (0.0, 1.0, True)
    assert run(["scores", "ensemble", str(tmp_path / "s"), str(tmp_path / "s"), "--out", str(tmp_path / "e")]) == 2


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["scores", "verify", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "expected a folder of teacher scores" in err


def test_checking_files_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, structkd.cli.scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_margin_file_of_2020(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = pair_store(tmp_path / "s", "t", {"7": {"12": 9.5, "40": -1.25}, "8": {"12": 0.5, "9": 2.0}})
    (tmp_path / "triples").write_text("8\t9\t12\n7\t12\t40\n7\t12\t40\n")
    line = ("export", store, "--format", "margin-tsv-ids", "--triples", tmp_path / "triples", "--out", tmp_path / "m")
    status, found = called(capsys, *line)
    assert (status, found["rows"]) == (0, 3)
    want = ["2.0\t0.5\t8\t9\t12", "9.5\t-1.25\t7\t12\t40", "9.5\t-1.25\t7\t12\t40"]
    assert (tmp_path / "m").read_text().splitlines() == want
    assert called(capsys, "import", tmp_path / "m", "--out", tmp_path / "again")[1]["format"] == "margin-tsv-ids"
    for text, message in (("7\t12\n", "triples:1: found 2 columns"), ("7\t12\t9\n", "1 missing")):
        (tmp_path / "triples").write_text(text)
        assert run(["scores", *map(str, line)]) == 1
        assert message in capsys.readouterr().err
    assert run(["scores", *map(str, (*line[:3], "beir-run", *line[4:]))]) == 2
