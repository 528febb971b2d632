"""Published folders in an object store (fsspec's in-memory one)."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

from structkd import scores
from structkd.errors import CorruptFileError, DataError, MissingExtraError
from structkd.scores import TeacherSpec
from structkd.scores.remote import download, is_remote, upload


@pytest.fixture
def published(tmp_path: Path) -> Path:
    scores.write_pairs(tmp_path / "s", TeacherSpec("t"), ["q", "q"], ["a", "b"], np.array([1.0, 2.0]))
    scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    return tmp_path / "p"


def test_there_and_back(published: Path, tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/teacher"
    upload(published, uri)
    download(uri, tmp_path / "copy")
    assert scores.verify(tmp_path / "copy").ok
    assert scores.open(tmp_path / "copy").lookup(["q"], ["b"]) == 2.0
    with pytest.raises(DataError, match="holds a published folder already"):
        upload(published, uri)
    memory = fsspec.filesystem("memory")
    path = f"/{tmp_path.name}/teacher/data/scores-00000.parquet"
    good = memory.cat_file(path)
    memory.pipe_file(path, good[:-1] + b"x")
    download(uri, tmp_path / "copy")  # what is there and sound is not fetched again
    with pytest.raises(CorruptFileError, match="differs from the manifest's checksum"):
        download(uri, tmp_path / "fresh")
    assert not (tmp_path / "fresh" / "manifest.json").exists()
    memory.pipe_file(path, good)
    download(uri, tmp_path / "fresh")  # continues
    assert scores.verify(tmp_path / "fresh").ok


def test_what_is_no_published_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json there"):
        download(f"memory://{tmp_path.name}/nothing", tmp_path / "x")
    with pytest.raises(DataError, match="publish the store first"):
        upload(tmp_path, "memory://x")
    with pytest.raises((MissingExtraError, DataError), match="nope"):
        download("nope://bucket/x", tmp_path / "x")
    assert is_remote("s3://bucket/x")
    assert not is_remote("out/teacher")


def trained_from(address: str, tmp_path: Path) -> None:
    """A student distilled by command from a published folder at an address; no teacher is named anywhere."""
    import json

    from structkd.cli.app import run

    folder = tmp_path / "c"
    folder.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    documents = [" ".join(words[(i + j) % 8] for j in range(3 + i % 4)) for i in range(24)]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(documents))
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": words[i]}) + "\n" for i in range(8))
    )
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(8)))
    queries = [f"q{i}" for i in range(8) for _ in range(24)]
    names = [f"d{i}" for _ in range(8) for i in range(24)]
    values = np.array([float(words[int(q[1:])] in documents[int(d[1:])]) for q, d in zip(queries, names, strict=True)])
    scores.write_pairs(tmp_path / "store", TeacherSpec("absent-teacher"), queries, names, values * 5)
    scores.publish(tmp_path / "store", to=tmp_path / "published", license="CC0-1.0")
    upload(tmp_path / "published", address)
    line = ["ranking", "distill", "--collection", folder, "--scores", address, "--student", "static"]
    assert run([str(part) for part in (*line, "--epochs", 1, "--out", tmp_path / "run", "--json")]) == 0


def test_a_student_trains_from_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import json

    monkeypatch.setenv("STRUCTKD_CACHE", str(tmp_path / "cache"))
    uri = f"memory://{tmp_path.name}/teacher"
    trained_from(uri, tmp_path)
    found = json.loads(capsys.readouterr().out)
    assert (found["asked"], found["steps"] > 0) == (0, True)
    assert scores.open(uri).lookup(["q0"], ["d0"]) == 5.0
    assert scores.open(Path(uri)).folder == scores.open(uri).folder  # a command line's path drops a slash
    (mirror,) = (tmp_path / "cache" / "scores").iterdir()
    assert scores.verify(mirror).ok


@pytest.mark.filterwarnings("ignore")
def test_a_student_trains_from_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import json

    pytest.importorskip("s3fs", reason='needs the extra "remote"')
    moto = pytest.importorskip("moto.server", reason="a local S3 server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "STRUCTKD_CACHE": str(tmp_path / "cache"),
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fsspec.config.conf.setdefault("s3", {})["endpoint_url"] = f"http://{host}:{port}"
        fsspec.filesystem("s3").mkdir("bucket")
        trained_from("s3://bucket/teacher", tmp_path)
        assert json.loads(capsys.readouterr().out)["asked"] == 0
        assert scores.open("s3://bucket/teacher").lookup(["q0"], ["d0"]) == 5.0
    finally:
        server.stop()
        fsspec.config.conf.pop("s3", None)


@pytest.mark.parametrize("evil", ["../outside.parquet", "/tmp/outside.parquet", "data/../../outside"])
def test_a_remote_manifest_cannot_name_files_outside(published: Path, tmp_path: Path, evil: str) -> None:
    import json

    from structkd.files import write_json
    from structkd.scores.manifest import sealed

    value = json.loads((published / "manifest.json").read_text())
    value.pop("json_sha256")
    value["files"][0]["path"] = evil
    write_json(published / "manifest.json", sealed(value))
    with pytest.raises(DataError, match="outside its folder"):
        scores.open(published)
    assert any("outside its folder" in problem.problem for problem in scores.verify(published).problems)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{tmp_path.name}/evil/manifest.json", (published / "manifest.json").read_bytes())
    with pytest.raises(DataError, match="outside its folder"):
        download(f"memory://{tmp_path.name}/evil", tmp_path / "copy")
    assert not (tmp_path / "outside.parquet").exists()
