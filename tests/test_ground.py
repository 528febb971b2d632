"""The ground layer: identity, files, order, TREC runs, run folders."""

import gzip
import json
import os
import threading
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from structkd import errors, files, ids, ordering, progress, runs, trec


def test_error_tree_is_as_drawn() -> None:
    assert issubclass(errors.CorruptFileError, errors.DataError)
    assert issubclass(errors.DataError, errors.StructKDError)
    assert issubclass(errors.MissingExtraError, ImportError)
    error = errors.MissingScoreError(5, ["a", "b", "c", "d"], "store X", "Score them first.")
    assert error.count == 5
    assert str(error) == "store X: 5 missing, for example a, b, c. Score them first."
    mismatch = errors.TeacherMismatchError("cache", {"max_length": (128, 512)})
    assert "max_length: found 128, expected 512" in str(mismatch)
    assert "pip install 'structkd[ray]'" in str(errors.MissingExtraError("ray", "ray", "Scoring on Ray"))


# ---- identity


def test_ids_map_both_ways_and_refuse_unknown_and_invalid() -> None:
    table = ids.Ids(["b", "a", "c"])
    assert table.rows(["c", "b"]).tolist() == [2, 0]
    assert table.find(["x", "a"]).tolist() == [-1, 1]
    assert table.strings([1, 2]) == ["a", "c"]
    assert "a" in table
    assert table == ids.Ids(["b", "a", "c"])
    with pytest.raises(errors.DataError, match=r"2 of 3 ids are unknown, for example 'x', 'y'; 3 ids are known"):
        table.rows(["x", "a", "y"])
    with pytest.raises(errors.DataError, match="row -1 is outside"):
        table.strings([-1])
    with pytest.raises(errors.DataError, match="'a' occurs twice"):
        ids.Ids(["a", "b", "a"])
    with pytest.raises(errors.DataError, match="non-empty string"):
        ids.Ids(["a", ""])


def test_pairs_keep_each_text_once() -> None:
    queries = ids.Texts(ids.Ids(["q1", "q2"]), ["first", "second"])
    documents = ids.Texts(ids.Ids(["d1"]), ["text"])
    pairs = ids.Pairs(queries, documents, np.array([1, 0]), np.array([0, 0]))
    assert pairs.query_ids == ["q2", "q1"]
    assert pairs.query_texts == ["second", "first"]
    assert pairs.document_texts == ["text", "text"]
    assert pairs.document_ids == ["d1", "d1"]
    assert len(pairs.take(np.array([True, False]))) == 1
    with pytest.raises(errors.DataError, match=r"document_rows must be a vector of rows in \[0, 1\)"):
        ids.Pairs(queries, documents, np.array([0]), np.array([1]))
    with pytest.raises(errors.DataError, match="2 query rows but 1 document rows"):
        ids.Pairs(queries, documents, np.array([0, 1]), np.array([0]))
    with pytest.raises(errors.DataError, match="1 ids but 2 texts"):
        ids.Texts(ids.Ids(["d1"]), ["a", "b"])


def test_fingerprints_separate_what_a_join_would_merge() -> None:
    assert ids.fingerprint_fields(["ab", "c"]) != ids.fingerprint_fields(["a", "bc"])
    assert ids.fingerprint_json({"a": 1, "b": 2}) == ids.fingerprint_json({"b": 2, "a": 1})
    one = np.arange(6, dtype=np.int64)
    assert ids.fingerprint_arrays(a=one) != ids.fingerprint_arrays(a=one.reshape(2, 3))
    assert ids.fingerprint_arrays(a=one) != ids.fingerprint_arrays(a=one.astype(np.int32))
    assert ids.fingerprint_arrays(a=one) == ids.fingerprint_arrays(a=one[::1].copy())
    assert len(ids.text_hash("é")) == 16


# ---- order


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.text("abc", min_size=1, max_size=3)), min_size=1, unique_by=lambda t: t[1]
    ),
    st.integers(0, 12),
)
def test_top_k_is_the_sorted_list_cut(items: list[tuple[int, str]], k: int) -> None:
    scores = np.array([score for score, _ in items], dtype=np.float32)
    names = [name for _, name in items]
    expected = sorted(range(len(items)), key=lambda i: (-scores[i], names[i]))
    assert ordering.order_ids(scores, names).tolist() == expected
    assert ordering.top_k(scores, k, ordering.tie_rank(names)).tolist() == expected[:k]


def test_order_takes_infinities_and_refuses_nan() -> None:
    ties = np.arange(3)
    assert ordering.order(np.array([-np.inf, 0.0, np.inf]), ties).tolist() == [2, 1, 0]
    with pytest.raises(errors.DataError, match="1 of 3 scores are not numbers"):
        ordering.order(np.array([0.0, np.nan, 1.0]), ties)


# ---- files


def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "a" / "x.json"
    files.write_json(target, {"v": 1})

    def fail() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert files.read_json(target) == {"v": 1}
    assert [path.name for path in target.parent.iterdir()] == ["x.json"]


def test_only_one_of_many_racing_writers_creates_a_file(tmp_path: Path) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        source = tmp_path / f"s{number}"
        source.write_text(str(number))
        barrier.wait()
        if files.create_exclusive(source, tmp_path / "target"):
            wins.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert (tmp_path / "target").read_text() == str(wins[0])
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "a\\b"])
def test_paths_from_manifests_cannot_leave_the_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(errors.DataError, match="outside its folder"):
        files.inside(tmp_path, path)


def test_a_link_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.symlink("/etc", tmp_path / "in" / "l")
    with pytest.raises(errors.DataError, match="link that leaves"):
        files.inside(tmp_path / "in", "l/passwd")
    assert files.inside(tmp_path, "in/x.txt") == tmp_path / "in" / "x.txt"


def test_bad_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"a": 1,\n"b"')
    with pytest.raises(errors.CorruptFileError, match=r"m\.json:2: not valid JSON"):
        files.read_json(path)
    with pytest.raises(errors.DataError, match="no such file"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(path, {"x": float("nan")})


# ---- TREC


def test_run_round_trip_and_tie_rule(tmp_path: Path) -> None:
    run = trec.run_of(["q", "q", "q", "p"], ["b", "a", "c", "x"], np.array([1.5, 1.5, 2.25, -3e6]))
    assert run.lists["q"][0] == ["c", "a", "b"]
    trec.write_run(tmp_path / "r", run)
    again = trec.read_run(tmp_path / "r")
    assert again.lists["q"][0] == ["c", "a", "b"]
    assert again.lists["p"][1].tolist() == [-3e6]
    assert len(again) == 4
    assert again.cut(1).lists["q"][0] == ["c"]
    queries, documents, scores = again.pairs()
    assert (queries, documents, scores.tolist()) == (["q", "q", "q", "p"], ["c", "a", "b", "x"], [2.25, 1.5, 1.5, -3e6])
    parsed = list(ir_measures.read_trec_run(str(tmp_path / "r")))  # an independent reader agrees
    assert [(row.query_id, row.doc_id) for row in parsed] == list(zip(queries, documents, strict=True))


def test_ids_that_a_run_cannot_hold_are_refused(tmp_path: Path) -> None:
    for lists, message in (
        ({"q": (["a b"], np.ones(1))}, r"r: document id 'a b' holds white space"),
        ({"q\t1": (["a"], np.ones(1))}, r"r: query id 'q\\t1' holds white space"),
    ):
        with pytest.raises(errors.DataError, match=message):
            trec.write_run(tmp_path / "r", trec.Run(lists))
    assert list(tmp_path.iterdir()) == []


def test_run_reader_takes_four_columns_gzip_bom_crlf_and_ranks(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "r.gz", "wb") as handle:
        handle.write("\ufeffq\td1\t2\t0.5\r\nq\td2\t1\t0.5\r\n\r\n".encode())
    assert trec.read_run(tmp_path / "r.gz").lists["q"][0] == ["d1", "d2"]
    assert trec.read_run(tmp_path / "r.gz", by_rank=True).lists["q"][0] == ["d2", "d1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q\td\t1\n", r"r:1: found 3 columns, expected 6 .* or 4"),
        ("q d 1 2\nq d 1\n", r"r:2: found 3 columns, expected 4"),
        ("q d 1 x\n", r"r:1: rank '1' and score 'x' must be numbers"),
        ("q d 1 nan\n", r"r:1: score 'nan' is not finite"),
        ("q d 1 2\nq d 2 1\n", r"r:2: query 'q' lists document 'd' twice"),
    ],
)
def test_bad_runs_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r").write_text(text)
    with pytest.raises(errors.DataError, match=message):
        trec.read_run(tmp_path / "r")


def test_unreadable_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="no such file"):
        trec.read_run(tmp_path / "none")
    (tmp_path / "b").write_bytes(b"q d 1 2\n\xff\xfe q 1 2\n")
    with pytest.raises(errors.DataError, match=r"b:\d: cannot be read as UTF-8"):
        trec.read_run(tmp_path / "b")
    whole = gzip.compress(b"".join(b"q d%d 1 2\n" % i for i in range(5000)))
    (tmp_path / "cut.gz").write_bytes(whole[:-10])
    with pytest.raises(errors.DataError, match="cannot be read"):
        trec.read_run(tmp_path / "cut.gz")
    with pytest.raises(errors.DataError, match="twice"):
        trec.run_of(["q", "q"], ["d", "d"], np.array([1.0, 2.0]))


def test_real_runs_are_read(real_data: Path) -> None:
    for path in sorted((real_data / "ranking" / "msmarco-dl19" / "runs").glob("*.tsv")):
        run = trec.read_run(path)
        assert len(run.lists) == 43, path.name
        for documents, scores in run.lists.values():
            assert len(set(documents)) == len(documents)
            assert (np.diff(scores) <= 0).all()


# ---- run folder, progress


def test_run_folder_round_trip(tmp_path: Path) -> None:
    run = runs.Run.create(tmp_path / "run", "graph bench", {"epochs": 3, "none": None, "root": tmp_path}, seed=7)
    run.log(step=1, loss=np.float32(0.5))
    run.log(step=2, loss=0.25)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 3, "lo')  # a crash in the middle of a line
    run.write_table("main", "Main", [{"a": 1}, {"a": 2, "b": "x"}])
    figure = runs.Figure("lines", "t", "x", "y", [runs.Series("s", [1, 2], [0.1, 0.2], [0.0, 0.1])])
    run.write_figure("curve", figure)
    run.finish({"accuracy": np.float64(0.5)})
    again = runs.Run.open(tmp_path / "run")
    assert again.config() == {"epochs": 3, "root": str(tmp_path)}
    assert again.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert again.tables()["main"]["columns"] == ["a", "b"]
    assert again.figures()["curve"] == figure
    assert again.info["seed"] == 7
    assert again.info["summary"] == {"accuracy": 0.5}
    assert "torch" in again.info["versions"]
    with pytest.raises(errors.DataError, match=r"no run\.json"):
        runs.Run.open(tmp_path)


def test_no_bar_when_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(3), "counting")) == [0, 1, 2]
    progress.note("3 cached")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "3 cached\n"
    assert json.loads(json.dumps(runs.plain({"a": (1, {2}), "p": Path("x")}))) == {"a": [1, [2]], "p": "x"}
