"""Index folders: reopening, checksums, cut and flipped files, other versions, killed builds, streams, memory maps."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structkd import index
from structkd.cli.app import run
from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.ids import Ids, Texts
from structkd.index.flat import FlatIndex
from structkd.index.folder import storage
from structkd.index.folder.manifest import seal

VECTORS = np.random.default_rng(0).standard_normal((200, 12), np.float32)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    index.build(VECTORS, [f"d{n}" for n in range(200)], kind="flat", out=tmp_path / "i", encoder="abc")
    return tmp_path / "i"


def change(folder: Path, **values: Any) -> None:
    """Another manifest that is whole in itself."""
    path = folder / "index.json"
    path.write_text(seal(json.dumps(json.loads(path.read_text()) | values | {"sha256": "0" * 64})))


@pytest.mark.parametrize("kind", ["flat", "faiss-flat", "ivf-sq8", "ivf-pq", "hnsw"])
def test_reopened_is_the_same(kind: str, tmp_path: Path) -> None:
    ids = [f"dok-{n}-é" for n in range(200)]
    first = index.build(VECTORS, ids, kind=kind, out=tmp_path, encoder="abc", recall=0.5)
    second = index.open_vectors(tmp_path, expect_encoder="abc")
    assert list(second.ids) == ids
    assert (second.kind, second.metric, second.dim, len(second)) == (kind, "cosine", 12, 200)
    np.testing.assert_array_equal(first.search(VECTORS, 9).rows, second.search(VECTORS, 9).rows)
    assert index.verify(tmp_path).ok


def test_vectors_are_stored_normalised_under_cosine_and_as_they_are_otherwise(tmp_path: Path) -> None:
    for metric in ("cosine", "ip"):
        stored = index.build(VECTORS, kind="flat", metric=metric, out=tmp_path / metric)
        assert isinstance(stored, FlatIndex)
        expected = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True) if metric == "cosine" else VECTORS
        np.testing.assert_allclose(stored.vectors.numpy(), expected, rtol=1e-6)
        assert stored.vectors.data_ptr() % 64 == 0


@pytest.mark.parametrize("stem", ["vectors", "ids"])
def test_every_flipped_byte_is_found(built: Path, stem: str) -> None:
    path = next(built.glob(f"{stem}-*"))
    good = path.read_bytes()
    for place in np.linspace(0, len(good) - 1, 40).astype(int):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bytes(bad))
        report = index.verify(built)
        assert not report.ok
        assert report.problems == ((path.name, "bytes differ from the checksum in the manifest"),)
    path.write_bytes(good)
    assert index.verify(built).ok
    assert index.verify(built).files == 3


@pytest.mark.parametrize("kind", ["flat", "ivf-pq"])
def test_every_flipped_byte_of_the_manifest_is_found(kind: str, tmp_path: Path) -> None:
    index.build(VECTORS, kind=kind, out=tmp_path)
    path = tmp_path / "index.json"
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        report = index.verify(tmp_path)
        assert [name for name, _ in report.problems] == ["index.json"], (place, good[place : place + 20])
        with pytest.raises(DataError):
            index.open(tmp_path)
    path.write_bytes(good)
    assert index.verify(tmp_path).ok


def test_a_cut_or_missing_file_is_refused_at_once(built: Path) -> None:
    path = next(built.glob("vectors-*"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match=r"vectors-.*: found \d+ bytes, expected \d+"):
        index.open(built)
    assert "bytes, expected" in index.verify(built).problems[0][1]
    path.unlink()
    with pytest.raises(CorruptFileError, match="the file is missing"):
        index.open(built)
    assert index.verify(built).problems == ((path.name, "missing"),)


def test_a_broken_header_is_one_clear_error(built: Path) -> None:
    path = next(built.glob("vectors-*"))
    data = bytearray(path.read_bytes())
    data[8:20] = b"\0" * 12
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match="cannot be read"):
        index.open_vectors(built).search(VECTORS, 1)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"version": 1}, DataError, "found format version 1, expected 2. Build the index again"),
        ({"format": "other"}, DataError, "found format 'other', expected 'structkd-index'"),
        ({"kind": "kd-tree"}, DataError, "found kind 'kd-tree', expected one of flat"),
        ({"files": [{"path": "../x"}]}, CorruptFileError, "the manifest is incomplete"),
        ({"files": [{"path": "../x", "bytes": 1, "sha256": ""}]}, DataError, "a path outside its folder"),
        ({"count": 201}, CorruptFileError, "found shape [200, 12], expected [201, 12]"),
    ],
)
def test_a_strange_manifest_is_refused(built: Path, values: Any, error: type, message: str) -> None:
    change(built, **values)
    with pytest.raises(error) as caught:
        index.open_vectors(built).search(VECTORS, 1)
    assert message in str(caught.value)


def test_a_manifest_that_is_no_json(built: Path) -> None:
    (built / "index.json").write_text('{"format": "structkd-index", ')
    with pytest.raises(CorruptFileError, match=r"index\.json:1: not valid JSON"):
        index.open(built)
    (built / "index.json").unlink()
    with pytest.raises(DataError, match=r"no index\.json there"):
        index.open(built)


def test_another_encoder_is_refused(built: Path) -> None:
    with pytest.raises(DataError, match="the vectors come from encoder abc, expected xyz"):
        index.open(built, expect_encoder="xyz")


def test_texts_and_vectors_are_not_confused(built: Path, tmp_path: Path) -> None:
    index.build_text(Texts(Ids(["a"]), ["one text"]), out=tmp_path / "t")
    with pytest.raises(DataError, match="found a bm25 index, which holds texts"):
        index.open_vectors(tmp_path / "t")
    with pytest.raises(DataError, match="found a flat index, which holds vectors"):
        index.open_text(built)


def test_a_new_build_replaces_the_old_one(built: Path) -> None:
    before = index.open_vectors(built)
    expected = before.search(VECTORS[:3], 4)
    index.build(VECTORS[:50] * -1, kind="flat", out=built)
    assert len(index.open_vectors(built)) == 50
    assert len(list(built.iterdir())) == 3
    np.testing.assert_array_equal(before.search(VECTORS[:3], 4).rows, expected.rows)  # the open one lives on


def test_a_failed_build_leaves_the_old_index(built: Path) -> None:
    before = sorted(path.name for path in built.iterdir())
    with pytest.raises(DataError):
        index.build(np.full((20_000, 3), np.nan), out=built)
    with pytest.raises(DataError, match="found 2 ids for 200 vectors"):
        index.build(VECTORS, ["a", "b"], out=built)
    assert sorted(path.name for path in built.iterdir()) == before
    assert len(index.open_vectors(built)) == 200
    assert index.verify(built).ok


KILLED = """
import sys, os, numpy as np
from structkd import index
from structkd.index.folder import draft, manifest
stop, kind = sys.argv[2:]
def hang(*_, **__):
    print("here", flush=True)
    import time; time.sleep(60)
def blocks():
    for n in range(6):
        if stop == "vectors" and n == 3: hang()
        yield np.random.default_rng(n).standard_normal((1000, 12))
if stop == "ids": draft.Draft.ids = hang
if stop == "commit": manifest.write_text = hang
if stop == "engine":
    import faiss
    faiss.write_index = hang
index.build(blocks(), kind=kind, out=sys.argv[1])
"""


@pytest.mark.parametrize(
    ("stop", "kind"),
    [("vectors", "flat"), ("ids", "flat"), ("commit", "flat"), ("engine", "hnsw"), ("commit", "ivf-sq8")],
)
def test_a_killed_build_leaves_the_old_index(built: Path, stop: str, kind: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(built), stop, kind], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(list(built.iterdir())) > 3  # it had written something
    old = index.open_vectors(built, expect_encoder="abc")
    assert len(old) == 200
    assert old.search(VECTORS[:5], 1).document_ids() == [[f"d{n}"] for n in range(5)]
    assert index.verify(built).ok
    index.build(VECTORS, kind="flat", out=built)
    assert len(list(built.iterdir())) == 3  # the next build clears what the killed one left


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(("kind", "room"), [("flat", 100), ("hnsw", 300)])
def test_a_file_that_cannot_be_written_is_named_and_the_old_index_stays(
    built: Path, kind: str, room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vectors take 192 kB, HNSW's file 1.3 MB; beyond `room` kB writing fails, there in faiss's own words."""
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((4000, 12), np.float32))
    before = sorted(path.name for path in built.iterdir())
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room << 10, limits[1]))
    try:
        status = run(["index", "build", "--vectors", str(tmp_path / "v.npy"), "--kind", kind, "--out", str(built)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    said = capsys.readouterr().err
    assert status == 1
    assert "File too large" in said
    assert str(built) in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in built.iterdir()) == before
    assert index.verify(built).ok


def test_a_folder_with_other_files_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"holds other files \(thesis\.tex\), expected an empty folder or an index"):
        index.build(VECTORS, out=tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(UsageError, match="is a file; give a folder"):
        index.build(VECTORS, out=tmp_path / "thesis.tex")


def test_streams_and_files_equal_arrays(tmp_path: Path) -> None:
    expected = index.build(VECTORS, kind="flat").search(VECTORS[:20], 7)
    blocks = (VECTORS[start : start + 33] for start in range(0, 200, 33))
    np.testing.assert_array_equal(index.build(blocks, kind="flat").search(VECTORS[:20], 7).rows, expected.rows)
    np.save(tmp_path / "v.npy", VECTORS)
    from_file = index.build(tmp_path / "v.npy", kind="flat").search(VECTORS[:20], 7)
    np.testing.assert_array_equal(from_file.scores, expected.scores)
    np.save(tmp_path / "f.npy", np.asfortranarray(VECTORS))
    np.save(tmp_path / "b.npy", VECTORS.astype(">f8"))
    for name in ("f.npy", "b.npy"):
        other = index.build(tmp_path / name, kind="flat").search(VECTORS[:20], 7)
        np.testing.assert_array_equal(other.rows, expected.rows)


def test_blocks_of_different_width_are_refused() -> None:
    with pytest.raises(DataError, match="vectors from row 2: found 4 dimensions, expected 3"):
        index.build(iter([np.ones((2, 3)), np.ones((2, 4))]), kind="flat")


def test_a_bad_block_in_a_stream_is_named_by_its_row() -> None:
    good, bad = np.ones((9000, 3)), np.ones((5, 3))
    bad[2, 1] = np.inf
    with pytest.raises(DataError, match="document at row 9002: the vector holds a value that is not finite"):
        index.build(iter([good, bad]), kind="flat")


def test_npy_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    with pytest.raises(DataError, match=r"x\.npy: cannot be read as a \.npy array"):
        index.build(tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.asarray([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"o\.npy: cannot be read as a \.npy array"):
        index.build(tmp_path / "o.npy")
    with pytest.raises(DataError, match="no such file"):
        index.build(tmp_path / "absent.npy")


OPENED = """
import sys, time
from structkd import index
seconds = []
for _ in range(5):
    began = time.perf_counter()
    opened = index.open_vectors(sys.argv[1])
    seconds.append(time.perf_counter() - began)
assert "ids" not in vars(opened._stored), vars(opened._stored).keys()
print(min(seconds))
"""


def test_open_maps_the_vectors_and_leaves_the_ids(tmp_path: Path) -> None:
    """Milliseconds whatever the size (in a process of its own: the shape checker of the tests reads attributes)."""
    index.build(np.random.default_rng(0).standard_normal((100_000, 32), np.float32), kind="flat", out=tmp_path)
    done = subprocess.run([sys.executable, "-c", OPENED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.01


def test_temporary_indexes_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    built = index.build(VECTORS, kind="flat")
    assert len(list(tmp_path.iterdir())) == 1
    del built
    with pytest.raises(DataError):
        index.build(np.full((2, 2), np.nan))
    assert list(tmp_path.iterdir()) == []


def test_pages_given_back_while_building_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(1).standard_normal((3000, 16), np.float32)
    plain = index.build(vectors, kind="ivf-pq", recall=0.8)
    given_back: list[int] = []
    forget = storage.Stored.forget

    def counted(stored: storage.Stored, rows: int) -> None:
        given_back.append(rows)
        forget(stored, rows)

    monkeypatch.setattr(storage, "_FORGET_BYTES", 0)
    monkeypatch.setattr(storage.Stored, "forget", counted)
    frugal = index.build(vectors, kind="ivf-pq", recall=0.8)
    assert sum(given_back) > 3000
    np.testing.assert_array_equal(plain.search(vectors[:50], 10).rows, frugal.search(vectors[:50], 10).rows)


BOUNDED = """
import sys, threading, time
import numpy as np, torch
from structkd import index
from structkd.index.approximate import faiss_index
from structkd.index.folder import storage
torch.set_num_threads(1)
storage._FORGET_BYTES, faiss_index._BLOCK_BYTES = 1 << 21, 1 << 20

def mapped():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) << 10

def build(count):
    blocks = (np.random.default_rng(n).standard_normal((1000, 256), np.float32) for n in range(count // 1000))
    index.build(blocks, kind="ivf-pq", recall=0.05, out=sys.argv[1])

build(1000)  # libraries are loaded
least, most, ended = mapped(), [0], threading.Event()

def watch():
    while not ended.wait(0.005):
        most[0] = max(most[0], mapped())

thread = threading.Thread(target=watch)
thread.start()
build(20_000)
ended.set()
thread.join()
print(most[0] - least)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's process status")
def test_a_build_keeps_little_of_the_vectors_mapped(tmp_path: Path) -> None:
    """20 MB of vectors are read again and again, in order and here and there; pages are given back every 2 MB."""
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10 << 20
