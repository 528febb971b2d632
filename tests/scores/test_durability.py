"""What a crash, a bad disk and a second process can do: SIGKILL, torn and flipped bytes, races, full disks."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from structkd import scores
from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.files import write_json
from structkd.scores import PairScores, TeacherSpec
from structkd.scores.compaction.compact import compact
from structkd.scores.layout import id_table, log
from structkd.scores.layout.log import PairLog
from structkd.scores.layout.part_list import PartList
from structkd.scores.layout.parts import read_pair_part
from structkd.scores.layout.sealed import sealed_bytes
from structkd.scores.layout.snapshot import latest, snapshot_numbers
from structkd.scores.manifest import ScoreManifest, sealed

SPEC = TeacherSpec("teacher", max_length=512)
UNITS, UNIT_ROWS = 240, 25

# forks two writers a round; each commits units in an order of its own and writes a name after its commit; both are
# killed at a random moment. One interpreter start serves all rounds: it costs more than the rounds themselves.
DRIVER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[4])
from test_durability import SPEC, plan, value
from structkd.scores.layout.log import PairLog
folder, rounds, seed, names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[5]
rng = random.Random(seed)
for number in range(rounds):
    pids = []
    ready, told = os.pipe()
    for writer in range(2):
        pid = os.fork()
        if pid == 0:
            store = PairLog.open(folder, SPEC)
            units = store.pending(plan(store))
            random.Random(seed + 100 * number + writer).shuffle(units)
            os.write(told, b"r")
            said = os.open(names, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for unit in units:
                store.commit(unit, value(unit.query_rows, unit.document_rows))
                os.write(said, (unit.name + "\\n").encode())
            time.sleep(60)
            os._exit(0)
        pids.append(pid)
    for _ in pids:
        os.read(ready, 1)
    time.sleep(rng.uniform(0.0, 0.3))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    print(sum(os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL for pid in pids), flush=True)
"""


def value(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The teacher: a function of the pair."""
    return (np.sin(queries * 1000.0 + documents) * 10).astype(np.float32)


def plan(store: PairLog) -> list[log.Unit]:
    count = UNITS * UNIT_ROWS
    queries = store.queries.extend([f"q{i}" for i in range(60)], [None] * 60)
    documents = store.documents.extend([f"d{i}" for i in range(count // 60)], [None] * (count // 60))
    rows = np.repeat(queries, len(documents)), np.tile(documents, len(queries))
    return store.plan(*rows, lambda q, d: np.zeros(len(q), np.bool_), unit_rows=UNIT_ROWS)


def kill_rounds(folder: Path, rounds: int, seed: int) -> tuple[set[str], int]:
    """Run the rounds; returns what the writers said was committed, and the number of kills."""
    names = folder.parent / f"{folder.name}.said"
    arguments = [str(folder), str(rounds), str(seed), str(Path(__file__).parent), str(names)]
    result = subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = names.read_text().split("\n")[:-1] if names.exists() else []
    return set(said), sum(map(int, result.stdout.split()))


def check_after_kills(folder: Path, said: set[str], reference: Path) -> None:
    """No committed unit lost, none torn; finished and compacted, the content equals an undisturbed store's."""
    store = PairLog.open(folder, SPEC)
    units = {unit.name: unit for unit in plan(store)}
    committed = store.units()
    assert said <= committed
    assert committed <= set(units)
    for name in committed:
        sealed_bytes(folder / "parts" / f"{name}.parquet")
        part = read_pair_part(folder, name)
        np.testing.assert_array_equal(part.scores, value(units[name].query_rows, units[name].document_rows))
    assert scores.verify(folder).ok
    for unit in store.pending(plan(store)):
        assert store.commit(unit, value(unit.query_rows, unit.document_rows))
    compact(folder, dtype="float32")
    (data,) = (folder / "data").iterdir()
    (expected,) = (reference / "data").iterdir()
    assert data.read_bytes() == expected.read_bytes()
    assert scores.verify(folder).ok


def reference_store(folder: Path) -> Path:
    store = PairLog.open(folder, SPEC)
    for unit in plan(store):
        store.commit(unit, value(unit.query_rows, unit.document_rows))
    compact(folder, dtype="float32")
    return folder


def test_ten_rounds_of_sigkill_with_two_writers(tmp_path: Path) -> None:
    reference = reference_store(tmp_path / "reference")
    said, kills = kill_rounds(tmp_path / "killed", rounds=10, seed=1)
    assert kills == 20
    assert len(said) > 20
    check_after_kills(tmp_path / "killed", said, reference)


@pytest.mark.slow
def test_fifty_rounds_of_sigkill_with_two_writers(tmp_path: Path) -> None:
    reference = reference_store(tmp_path / "reference")
    lost_rounds = 0
    for attempt in range(5):  # a store is full after some ten rounds; then the next one
        folder = tmp_path / f"killed-{attempt}"
        said, kills = kill_rounds(folder, rounds=10, seed=10 + attempt)
        lost_rounds += kills
        check_after_kills(folder, said, reference)
    assert lost_rounds == 100


# bytes


def small_store(folder: Path, *, compacted: bool = True) -> Path:
    store = PairLog.open(folder, SPEC)
    q = store.queries.extend(["a", "b"], [b"t" * 16, None])
    d = store.documents.extend(["1", "2", "3"], [b"x" * 16, None, b"y" * 16])
    for documents in (d[:2], d[2:]):
        unit = store.unit(np.repeat(q, len(documents)), np.tile(documents, 2))
        store.commit(unit, value(unit.query_rows, unit.document_rows))
    if compacted:
        compact(folder)
    return folder


def node_store(folder: Path) -> Path:
    logits = np.random.default_rng(0).normal(size=(50, 3))
    scores.write_nodes(folder, TeacherSpec("gnn", kind="rows"), logits, "graph")
    return folder


def data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".arrow", ".safetensors"))


@pytest.mark.parametrize("kind", ["log", "snapshot", "published", "nodes", "published nodes"])
def test_every_flipped_byte_is_found(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "store"
    make = node_store if "nodes" in kind else small_store
    make(folder, **({"compacted": False} if kind == "log" else {}))
    if "published" in kind:
        scores.publish(folder, to=tmp_path / "out", license="CC0-1.0")
        folder = tmp_path / "out"
    assert scores.verify(folder).ok
    files = [*data_files(folder), *folder.rglob("*.json")]
    rng = random.Random(0)
    for path in files:
        data = path.read_bytes()
        places = range(len(data)) if len(data) < 200 else sorted(rng.sample(range(len(data)), 25))
        for place in places:
            broken = bytearray(data)
            broken[place] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            report = scores.verify(folder)
            assert not report.ok, f"{path.name}: byte {place} of {len(data)}"
            if path.suffix != ".json":
                assert path.name in {problem.path.split("/")[-1] for problem in report.problems}
        path.write_bytes(data)
    assert scores.verify(folder).ok


@pytest.mark.parametrize("kind", ["log", "snapshot", "published", "nodes"])
def test_cut_absent_and_foreign_files_are_found(tmp_path: Path, kind: str) -> None:
    original = tmp_path / "original"
    (node_store if kind == "nodes" else small_store)(original, **({"compacted": False} if kind == "log" else {}))
    if kind == "published":
        scores.publish(original, to=tmp_path / "out", license="CC0-1.0")
        original = tmp_path / "out"
    for relative in [path.relative_to(original) for path in data_files(original)]:
        for damage in ("cut", "absent"):
            folder = tmp_path / "copy"
            shutil.copytree(original, folder)
            path = folder / relative
            if damage == "cut":
                path.write_bytes(path.read_bytes()[:-7])
            else:
                path.unlink()
            if not (kind == "log" and damage == "absent" and relative.parts[0] == "parts"):  # not yet promised
                report = scores.verify(folder)
                assert not report.ok, (relative, damage)
            shutil.rmtree(folder)
    (original / "notes.parquet").write_bytes(b"x")
    report = scores.verify(original)
    assert [problem.path for problem in report.problems] == ["notes.parquet"]


def test_a_damaged_part_is_refused_when_read(tmp_path: Path) -> None:
    folder = small_store(tmp_path, compacted=False)
    path = next((folder / "parts").iterdir())
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    for call in (scores.open, compact):
        with pytest.raises(CorruptFileError, match="bytes differ from its checksum"):
            call(folder)
    path.write_bytes(data[:100])
    with pytest.raises(CorruptFileError, match="cut short"):
        scores.open(folder)


def test_open_notices_sizes_and_on_request_every_byte(tmp_path: Path) -> None:
    folder = small_store(tmp_path)
    (path,) = (folder / "data").iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptFileError, match="the manifest says"):
        scores.open(folder)
    place = data.index(np.array([0, 1, 2], dtype=np.uint16).tobytes())  # a list of document rows
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    scores.open(folder)
    with pytest.raises(CorruptFileError, match="checksum"):
        scores.open(folder, verify="sha256")
    path.unlink()
    with pytest.raises(DataError, match="absent"):
        scores.open(folder)


def test_compaction_replaces_a_damaged_file_of_the_same_name(tmp_path: Path) -> None:
    folder = small_store(tmp_path)
    (path,) = (folder / "data").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    for manifest in (folder / "snapshots").iterdir():
        manifest.unlink()
    compact(folder)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("evil", ["../secret.arrow", "/etc/passwd", "data/../../x", "data\\..\\x"])
def test_a_manifest_cannot_name_files_outside(tmp_path: Path, evil: str) -> None:
    folder = small_store(tmp_path / "store")
    path = folder / "snapshots" / "00000000.json"
    value = json.loads(path.read_text())
    value.pop("json_sha256")
    value["files"][0]["path"] = evil
    write_json(path, sealed(value))
    with pytest.raises(DataError, match="outside its folder"):
        scores.open(folder)
    report = scores.verify(folder)
    assert any("outside its folder" in problem.problem for problem in report.problems)


def test_a_part_of_another_teacher_is_found(tmp_path: Path) -> None:
    mine, other = small_store(tmp_path / "a", compacted=False), tmp_path / "b"
    store = PairLog.open(other, TeacherSpec("other"))
    unit = store.unit(store.queries.extend(["a"], [None]), store.documents.extend(["1"], [None]))
    store.commit(unit, np.array([1.0]))
    shutil.copy(other / "parts" / f"{unit.name}.parquet", mine / "parts")
    report = scores.verify(mine)
    assert ["teacher_fp is" in problem.problem for problem in report.problems] == [True]


def test_verify_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither cache\.json nor manifest\.json"):
        scores.verify(tmp_path)


# other processes


def test_two_writers_intern_ids_at_once(tmp_path: Path) -> None:
    first, second = PairLog.open(tmp_path, SPEC), PairLog.open(tmp_path, SPEC)
    one = first.queries.extend(["a", "b"], [None, None])
    two = second.queries.extend(["b", "c", "a"], [None] * 3)  # has not seen the first writer's segment
    assert one.tolist() == [0, 1]
    assert two.tolist() == [1, 2, 0]
    assert first.queries.extend(["c"], [None]).tolist() == [2]
    assert PairLog.open(tmp_path, SPEC).queries.ids == ["a", "b", "c"]


def test_a_gap_in_the_id_table_is_refused(tmp_path: Path) -> None:
    store = PairLog.open(tmp_path, SPEC)
    store.queries.extend(["a"], [None])
    store.queries.extend(["b"], [None])
    os.replace(tmp_path / "ids" / "queries-00001.parquet", tmp_path / "ids" / "queries-00000.parquet")
    with pytest.raises(CorruptFileError, match="starts at row 1, expected 0"):
        PairLog.open(tmp_path, SPEC)


def test_readers_during_compaction(tmp_path: Path) -> None:
    folder = small_store(tmp_path)
    stop, failures, reads = threading.Event(), [], [0, 0]

    def read(number: int) -> None:
        while not stop.is_set():
            try:
                store = PairScores.open(folder)
                got = store.lookup(["a", "b"], ["1", "3"])
                np.testing.assert_allclose(got, value(np.array([0, 1]), np.array([0, 2])), atol=0.01)
                reads[number] += 1
            except Exception as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    store = PairLog.open(folder, SPEC)
    for i in range(12):
        unit = store.unit(store.queries.extend([f"n{i}"], [None]), store.documents.find(["1"]))
        store.commit(unit, np.array([float(i)]))
        compact(folder, dtype="float32" if i % 2 else "float16")
        scores.gc(folder, keep=1, ttl_seconds=0)
    while min(reads) < 3 and not failures:
        time.sleep(0.01)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(snapshot_numbers(folder)) == 1


def test_a_lost_race_for_a_snapshot_number_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from structkd.scores.compaction import compact as compaction

    folder = small_store(tmp_path, compacted=False)
    real, raced = compaction.compact_pairs, []

    def slow(*arguments):
        draft = real(*arguments)
        if not raced:
            raced.append(True)
            compact(folder)  # another process is faster
        return draft

    monkeypatch.setattr(compaction, "compact_pairs", slow)
    assert compact(folder).snapshot == 0
    assert snapshot_numbers(folder) == [0]
    assert not list(folder.rglob(".tmp-*"))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_store(tmp_path)
    store = PairLog.open(folder, SPEC)
    unit = store.unit(store.queries.extend(["z"], [None]), store.documents.find(["1"]))
    before = sorted(folder.rglob("*"))
    real = log.write_sealed

    def full(table, path, footer, **options):
        real(table, path, footer, **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for module in (log, id_table):
        monkeypatch.setattr(module, "write_sealed", full)
    with pytest.raises(OSError, match="No space left"):
        store.commit(unit, np.array([1.0]))
    with pytest.raises(OSError, match="No space left"):
        store.queries.extend(["y"], [None])
    assert sorted(folder.rglob("*")) == before
    monkeypatch.undo()
    assert scores.verify(folder).ok
    assert store.commit(unit, np.array([1.0]))


def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    folder = small_store(tmp_path / "store", compacted=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(scores.open(folder)) == 6
        assert scores.verify(folder).ok
        scores.publish(folder, to=tmp_path / "out", license="CC0-1.0")
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# gc


def test_gc_removes_leftovers_and_old_snapshots(tmp_path: Path) -> None:
    folder = small_store(tmp_path)
    for dtype in ("float32", "float16", "float32"):
        compact(folder, dtype=dtype)
    assert snapshot_numbers(folder) == [0, 1, 2, 3]
    torn = folder / "parts" / ".tmp-host-1-2"
    torn.write_bytes(b"half a part")
    stray = folder / "data" / "csr-00000-0123456789abcdef.arrow"
    stray.write_bytes(b"of a crash")
    removed = scores.gc(folder)
    assert [path.partition("-")[0] for path in removed] == [
        "snapshots/00000000.json", "snapshots/00000000", "snapshots/00000001.json", "snapshots/00000001"
    ]  # fmt: skip
    assert torn.exists()  # young: perhaps another process is writing it
    os.utime(torn, (0, 0))
    os.utime(stray, (0, 0))
    assert scores.gc(folder) == ["data/csr-00000-0123456789abcdef.arrow", "parts/.tmp-host-1-2"]
    assert scores.verify(folder).ok
    assert len(scores.gc(folder, keep=1, ttl_seconds=0)) == 3  # manifest, list of its parts, data
    assert latest(folder).snapshot == 3
    assert scores.verify(folder).ok
    assert len(scores.open(folder)) == 6
    assert compact(folder, dtype="float16").snapshot == 4
    with pytest.raises(UsageError, match="at least the newest"):
        scores.gc(folder, keep=0)


def test_manifest_says_what_went_in(tmp_path: Path) -> None:
    folder = small_store(tmp_path)
    manifest = ScoreManifest.read(folder / "snapshots" / "00000000.json")
    assert manifest.counts == {"rows": 6, "queries": 2, "duplicates_dropped": 0, "failed": 0}
    assert PartList.read(folder, manifest.parts).units == {p.stem for p in (folder / "parts").iterdir()}
    values = np.array([value(np.array([q]), np.array([d]))[0] for q in range(2) for d in range(3)])
    assert manifest.stats["mean"] == pytest.approx(values.mean())
    assert manifest.stats["std"] == pytest.approx(values.std(), rel=1e-5)
    margins = np.concatenate([np.delete(row.max() - row, row.argmax()) for row in values.reshape(2, 3)])
    assert manifest.stats["margin"]["mean"] == pytest.approx(margins.mean(), rel=1e-5)
    assert manifest.stats["quantiles"]["0.5"] == pytest.approx(np.median(values))


# disks, clocks, copies


@pytest.mark.parametrize("how", ["limit", "tmpfs"])
def test_a_really_full_disk(tmp_path: Path, how: str) -> None:
    """The kernel refuses the write: a file-size limit, and a file system of 100 kB where one may be mounted."""
    import resource

    folder = tmp_path / "disk"
    folder.mkdir()
    if how == "tmpfs":
        line = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(line, check=False, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs privileges")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        store = small_store(folder / "store", compacted=False)
        log_ = PairLog.open(store, SPEC)
        rng = np.random.default_rng(0)
        queries = log_.queries.extend([f"n{i}" for i in range(50)], [None] * 50)
        documents = log_.documents.extend([f"m{i}" for i in range(400)], [None] * 400)
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        committed, refused = [], []
        for start in range(0, 50, 25):
            unit = log_.unit(np.repeat(queries[start : start + 25], 400), np.tile(documents, 25))
            try:
                log_.commit(unit, rng.normal(size=len(unit)))
                committed.append(unit.name)
            except OSError as error:
                refused.append((unit, error))
        assert refused
        assert all(isinstance(error, OSError) and str(error) for _, error in refused)
        for _ in range(2):  # what is there stays readable, again and again
            assert log_.units() >= set(committed)
            assert scores.verify(store).ok
            assert len(scores.open(store)) == 6 + 10_000 * len(committed)
        assert not list(store.rglob(".tmp-*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if how == "limit":
            assert log_.commit(refused[0][0], rng.normal(size=len(refused[0][0])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if how == "tmpfs":
            subprocess.run(["umount", str(folder)], check=True)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from structkd.scores.compaction import compact as compaction

    folder = small_store(tmp_path)
    before = scores.open(folder).lookup(["a"], ["1"])
    store = PairLog.open(folder, SPEC)
    unit = store.unit(store.queries.extend(["late"], [None]), store.documents.find(["1"]))
    store.commit(unit, np.array([7.0]))
    for path in folder.rglob("*"):
        os.utime(path, (0, 0) if "late" in path.name or unit.name in path.name else (2**33, 2**33))
    monkeypatch.setattr(compaction, "now", lambda: "1970-01-01T00:00:00+00:00")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert compact(folder).snapshot == 1  # the number counts, never a time
    assert scores.gc(folder) == []  # everything is from the future: nothing is old
    found = scores.open(folder)
    assert found.manifest.snapshot == 1
    assert found.lookup(["late"], ["1"]) == 7.0
    np.testing.assert_array_equal(found.lookup(["a"], ["1"]), before)
    assert scores.verify(folder).ok


def test_a_half_copied_snapshot(tmp_path: Path) -> None:
    original = small_store(tmp_path / "original")

    def copied(name: str) -> Path:
        return Path(shutil.copytree(original, tmp_path / name))

    without_manifest = copied("a")
    shutil.rmtree(without_manifest / "snapshots")
    assert len(scores.open(without_manifest)) == 6  # from the parts
    assert compact(without_manifest).counts["rows"] == 6
    cut = copied("b")
    (path,) = (cut / "data").iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CorruptFileError, match=r"bytes, the manifest says"):
        scores.open(cut)
    (cut / "snapshots" / "00000000.json").unlink()
    assert compact(cut).counts["rows"] == 6
    assert scores.verify(cut).ok
    half_manifest = copied("c")
    path = half_manifest / "snapshots" / "00000000.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptFileError, match=r"00000000\.json.*not valid JSON.*cut short"):
        scores.open(half_manifest)
    no_ids = copied("d")
    shutil.rmtree(no_ids / "ids")
    assert not scores.verify(no_ids).ok
    no_data = copied("e")
    shutil.rmtree(no_data / "data")
    with pytest.raises(DataError, match=r"absent.*Restore it, or delete the manifest"):
        scores.open(no_data)


def test_no_pickle_is_loaded_outside_the_restricted_reader() -> None:
    import ast

    root = Path(scores.__file__).parents[1]
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            owner, name = ast.unparse(node.func.value), node.func.attr
            unsafe = (
                (owner in ("pickle", "dill", "cloudpickle", "joblib", "marshal") and name in ("load", "loads"))
                or (name == "load" and options.get("allow_pickle", "False") != "False")
                or (owner == "torch" and name == "load" and options.get("weights_only") != "True")
                or name == "read_pickle"
            )
            if unsafe:
                found.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert found == []
