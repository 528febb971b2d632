import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from structkd import graph
from structkd.errors import CorruptFileError, DataError, UsageError
from structkd.scores.formats.node_files import read_node_file

NAME = "sbm:nodes=60,classes=3,degree=5,labels=4,valid=15"


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load(NAME)


@pytest.fixture(scope="module")
def logits(task) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)


def write(path, logits, fingerprint=""):
    """The same logits in the format of the file's ending."""
    if path.suffix == ".npz":
        np.savez(path, logits=logits, **({"graph_fingerprint": fingerprint} if fingerprint else {}))
    elif path.suffix == ".safetensors":
        save_file({"logits": logits}, path, {"graph_fingerprint": fingerprint} if fingerprint else None)
    else:
        table = pa.table({"node": np.arange(len(logits)), "logits": list(logits)})
        meta = {"graph_fingerprint": fingerprint} if fingerprint else None
        pq.write_table(table.replace_schema_metadata(meta), path)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".parquet"])
def test_any_framework_can_be_the_teacher(task, logits, tmp_path, ending):
    path = tmp_path / f"teacher{ending}"
    write(path, logits, task.observed.fingerprint)
    found = graph.read_scores(path, task)
    np.testing.assert_array_equal(found.logits, logits)
    config = graph.DistillConfig(method="glnn", hidden=8, epochs=2)
    one = graph.distill(task, found, config).student(task.x)
    assert torch.equal(one, graph.distill(task, torch.from_numpy(logits), config).student(task.x))
    bench = graph.BenchConfig(NAME, teacher=f"scores:{path}", methods=("glnn",), distill_config=config)
    assert graph.bench(bench, tmp_path / "out")["asked"] == 0


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".parquet"])
def test_another_node_order_is_refused(task, logits, tmp_path, ending):
    path = tmp_path / f"teacher{ending}"
    write(path, logits, graph.load(NAME, seed=5).observed.fingerprint)
    with pytest.raises(DataError, match=r"other edges, features or node order"):
        graph.read_scores(path, task)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".parquet"])
def test_a_file_without_a_fingerprint_is_checked_by_size_and_says_so(task, logits, tmp_path, ending, capsys):
    path = tmp_path / f"teacher{ending}"
    write(path, logits)
    graph.read_scores(path, task)
    assert "names no graph; only its numbers of nodes and classes are checked" in capsys.readouterr().err
    write(path, logits[:50])
    with pytest.raises(DataError, match=r"cached logits have shape \(50, 3\); .* has 60 observed nodes"):
        graph.read_scores(path, task)


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".parquet"])
def test_a_cut_file_is_named(logits, tmp_path, ending):
    path = tmp_path / f"teacher{ending}"
    write(path, logits)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"teacher\{ending}: not a"):
        read_node_file(path)


def test_one_column_per_class(logits, tmp_path):
    path = tmp_path / "wide.parquet"
    pq.write_table(pa.table({f"class_{c}": logits[:, c] for c in range(3)}), path)
    np.testing.assert_array_equal(read_node_file(path).logits, logits)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"node": [1, 0], "logits": [[0.0, 1.0], [1.0, 0.0]]}, r"column node must count 0, 1, 2"),
        ({"logits": [[0.0, 1.0], [1.0]]}, r"rows of \[1, 2\] logits"),
        ({"name": ["a", "b"], "score": [0.0, 1.0]}, r"expected `logits`, or one float column per class"),
        ({"logits": [[0.0, float("nan")]]}, r"1 logits are not finite"),
    ],
)
def test_bad_parquet(tmp_path, columns, message):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=message):
        read_node_file(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"expected a score cache folder, or a file ending in \.npz"):
        read_node_file(tmp_path / "logits.pt")
    np.savez(tmp_path / "objects.npz", logits=np.array([[1], None], dtype=object))
    with pytest.raises(DataError, match=r"its arrays are Python objects, which are not read"):
        read_node_file(tmp_path / "objects.npz")
    save_file({"weights": np.ones((2, 2))}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"tensors \['weights'\]; expected one of"):
        read_node_file(tmp_path / "w.safetensors")
    save_file({"logits": np.ones(4)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"logits of shape \(4,\)"):
        read_node_file(tmp_path / "w.safetensors")
    assert issubclass(CorruptFileError, DataError)
