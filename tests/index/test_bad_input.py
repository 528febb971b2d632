"""All that can be wrong with what comes in, from the command line: exit status 1 (2: usage) and one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest

from structkd.cli.app import run

RNG = np.random.default_rng(0)
GOOD = RNG.standard_normal((20, 6)).astype(np.float32)


def altered(row: int, value: float) -> np.ndarray:
    out = GOOD.copy()
    out[row] = value
    return out


@pytest.fixture
def built(tmp_path: Path) -> Path:
    np.save(tmp_path / "v.npy", GOOD)
    line = ["index", "build", "--vectors", str(tmp_path / "v.npy"), "--encoder", "abc", "--out", str(tmp_path / "i")]
    assert run(line) == 0
    return tmp_path / "i"


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (altered(3, np.nan), None, "document at row 3: the vector holds a value that is not finite (1 such rows)"),
        (
            altered(4, np.inf),
            [f"n{n}" for n in range(20)],
            "document 'n4': the vector holds a value that is not finite",
        ),
        (altered(5, 0.0), None, "document at row 5: the vector is zero, and cosine has no value there"),
        (np.empty((0, 6), np.float32), None, "found no vectors; an index needs at least one"),
        (np.empty((3, 0), np.float32), None, "found no vectors; an index needs at least one"),
        (GOOD[0], None, "found shape [6], expected two dimensions [rows, dim]"),
        (GOOD, ["a"] * 20, "document id 'a' occurs twice; ids must be distinct"),
        (GOOD, ["a", "b"], "found 2 ids for 20 vectors; give one id per vector"),
        (GOOD.astype(complex), None, "found values of type complex128, expected real numbers"),
    ],
)
def test_vectors_that_are_refused(
    vectors: np.ndarray, ids: list[str] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "bad.npy", vectors)
    line = ["index", "build", "--vectors", str(tmp_path / "bad.npy"), "--out", str(tmp_path / "out")]
    if ids is not None:
        (tmp_path / "ids").write_text("".join(f"{name}\n" for name in ids))
        line += ["--ids", str(tmp_path / "ids")]
    assert run(line) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("queries", "flags", "status", "message"),
    [
        (GOOD[:, :5], (), 1, "queries: found 5 dimensions, expected 6 as in the index. Was it another encoder?"),
        (altered(1, np.nan)[:3], (), 1, "query at row 1: the vector holds a value that is not finite"),
        (altered(0, 0.0)[:3], (), 1, "query at row 0: the vector is zero, and cosine has no value there"),
        (GOOD, ("--encoder", "xyz"), 1, "the vectors come from encoder abc, expected xyz"),
        (GOOD, ("--k", "0"), 2, "k is 0; expected a whole number of at least 1"),
        (GOOD, ("--device", "tpu"), 2, "device 'tpu' is unknown; expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_searches_that_are_refused(
    queries: np.ndarray,
    flags: tuple[str, ...],
    status: int,
    message: str,
    built: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "q.npy", queries)
    capsys.readouterr()
    line = ["index", "search", str(built), "--queries", str(tmp_path / "q.npy"), "--out", str(tmp_path / "r"), *flags]
    assert run(line) == status
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_more_places_than_documents_is_no_error(built: Path, tmp_path: Path) -> None:
    line = ["index", "search", str(built), "--queries", str(tmp_path / "v.npy"), "--out", str(tmp_path / "r")]
    assert run([*line, "--k", "100", "--encoder", "abc"]) == 0
    assert len((tmp_path / "r").read_text().splitlines()) == 20 * 20


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["flat", "faiss-flat", "ivf-sq8", "hnsw"])
@pytest.mark.parametrize(
    ("damage", "opens", "message"), [(cut, False, "bytes, expected"), (flip, True, "bytes differ from the checksum")]
)
def test_damaged_files_are_found(
    kind: str, damage: object, opens: bool, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut file is refused when the index is opened; a flipped bit, which faiss itself loads, by verify."""
    np.save(tmp_path / "v.npy", GOOD)
    line = ["index", "build", "--vectors", str(tmp_path / "v.npy"), "--kind", kind, "--out", str(tmp_path / "i")]
    assert run(line) == 0
    files = [path for path in (tmp_path / "i").iterdir() if path.name != "index.json"]
    for path in files:
        good = path.read_bytes()
        damage(path)  # type: ignore[operator]
        capsys.readouterr()
        assert run(["index", "verify", str(tmp_path / "i"), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert [problem["path"] for problem in found["problems"]] == [path.name]
        assert message in found["problems"][0]["problem"]
        search = ["index", "search", str(tmp_path / "i"), "--queries", str(tmp_path / "v.npy"), "--k", "1"]
        if not opens:
            assert run([*search, "--out", str(tmp_path / "r")]) == 1
            assert path.name in capsys.readouterr().err
        path.write_bytes(good)
    assert run(["index", "verify", str(tmp_path / "i")]) == 0


def test_another_version(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads((built / "index.json").read_text())
    (built / "index.json").write_text(json.dumps(body | {"version": 99}))
    capsys.readouterr()
    assert run(["index", "show", str(built)]) == 1
    assert "found format version 99, expected 2. Build the index again" in capsys.readouterr().err
