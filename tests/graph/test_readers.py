import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd.errors import CorruptFileError, DataError
from structkd.graph.data.datasets import load
from structkd.graph.data.readers import csr_npz, heterophilous_npz, planetoid

# nodes, undirected edges, features, classes, edge homophily, isolated: printed by the datasets' authors
FACTS = {
    "planetoid:Cora": (2708, 5278, 1433, 7, 0.810, 0),
    "planetoid:CiteSeer": (3327, 4552, 3703, 6, 0.736, 48),
    "amazon:Photo": (7650, 119081, 745, 8, 0.827, 115),
    "heterophilous:minesweeper": (10000, 39402, 7, 2, 0.683, 0),
    "heterophilous:chameleon_filtered": (890, 8854, 2325, 5, 0.236, 0),
}


@pytest.mark.parametrize("name", FACTS)
def test_real_datasets_are_what_their_authors_count(name, real_data):
    nodes, edges, features, classes, homophily, isolated = FACTS[name]
    task = load(name, real_data / "graph")
    assert (task.num_nodes, task.edge_index.shape[1] // 2) == (nodes, edges)
    assert (task.num_features, task.classes) == (features, classes)
    known = (task.y[task.edge_index] >= 0).all(dim=0)
    i, j = task.edge_index[:, known]
    assert float((task.y[i] == task.y[j]).float().mean()) == pytest.approx(
        homophily, abs=2e-3
    )  # loaders call CiteSeer's unlabelled nodes class 0
    assert int((task.degrees == 0).sum()) == isolated


def test_planetoid_equals_torch_geometric(real_data, tmp_path):
    from torch_geometric.datasets import Planetoid

    shutil.copytree(real_data / "graph" / "Planetoid" / "CiteSeer", tmp_path / "CiteSeer")
    data = Planetoid(str(tmp_path), "CiteSeer")[0]
    ours = load("planetoid:CiteSeer", real_data / "graph")
    assert torch.equal(ours.train, data.train_mask)
    assert torch.equal(ours.valid, data.val_mask)
    assert torch.equal(ours.test, data.test_mask)
    labelled = ours.y >= 0
    assert int((~labelled).sum()) == 15
    assert torch.equal(ours.y[labelled], data.y[labelled])
    rows = data.x / data.x.sum(dim=1, keepdim=True).clamp_min(1e-12)
    torch.testing.assert_close(ours.x.dense(), rows)
    assert set(map(tuple, ours.edge_index.T.tolist())) == {(i, j) for i, j in data.edge_index.T.tolist() if i != j}


def test_unlabelled_citeseer_nodes_stay_out_of_random_splits(real_data):
    for seed in range(3):
        task = load("planetoid:CiteSeer", real_data / "graph", "random", seed=seed)
        assert (int(task.train.sum()), int(task.valid.sum()), int(task.test.sum())) == (120, 500, 1000)
        assert not bool((task.y < 0)[task.train | task.valid | task.test].any())


def test_cpf_components_are_the_published_ones(real_data):
    for name, facts in {"cora": (2485, 5069, 140, 210, 2135), "citeseer": (2110, 3668, 120, 180, 1810)}.items():
        task = load(f"npz:{real_data}/graph/cpf/{name}.npz", split="cpf")
        masks = [int(mask.sum()) for mask in (task.train, task.valid, task.test)]
        assert (task.num_nodes, task.edge_index.shape[1] // 2, *masks) == facts


def test_a_read_only_folder_is_enough(real_data, tmp_path):
    before = sorted(path.name for path in (real_data / "graph" / "Planetoid" / "Cora").iterdir())
    load("planetoid:Cora", real_data / "graph")
    assert sorted(path.name for path in (real_data / "graph" / "Planetoid" / "Cora").iterdir()) == before


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/structkd-was-here"),))


def test_a_hostile_pickle_is_refused(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "ind.cora.x").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(DataError, match=r"ind\.cora\.x: the pickle asks for .*touch"):
        planetoid(folder, "cora")
    assert not Path("/tmp/structkd-was-here").exists()


def test_a_cut_pickle_is_named(tmp_path):
    (tmp_path / "ind.cora.x").write_bytes(pickle.dumps([1, 2, 3])[:-4])
    with pytest.raises(CorruptFileError, match=r"ind\.cora\.x: not a whole pickle"):
        planetoid(tmp_path, "cora")


def test_a_missing_dataset_without_network_is_one_error(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("structkd.graph.data.datasets.pyg.Planetoid", offline)
    with pytest.raises(DataError, match=r"ind\.cora\.x: not there, and the download failed .*Give --data-root"):
        load("planetoid:Cora", tmp_path)
    with pytest.raises(DataError, match=r"ogbn_arxiv: no such folder"):
        load("ogbn:arxiv", tmp_path)


def arrays(**changes):
    values = {
        "adj_data": np.ones(4, dtype=np.float32),
        "adj_indices": np.array([1, 0, 2, 1]),
        "adj_indptr": np.array([0, 1, 3, 4]),
        "adj_shape": np.array([3, 3]),
        "attr_data": np.ones(2, dtype=np.float32),
        "attr_indices": np.array([0, 1]),
        "attr_indptr": np.array([0, 1, 2, 2]),
        "attr_shape": np.array([3, 2]),
        "labels": np.array([0, 1, 1]),
    }
    values.update(changes)
    return {key: value for key, value in values.items() if value is not None}


def test_csr_npz_round_trip(tmp_path):
    np.savez(tmp_path / "g.npz", **arrays())
    raw = csr_npz(tmp_path / "g.npz")
    assert raw.edges.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert raw.x.toarray().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert raw.y.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"no array 'labels'"),
        ({"labels": np.array([0, 1])}, r"adj_indptr has 4 entries up to 4, but there are 2 labels"),
        ({"attr_data": None}, r"no array 'attr_data'"),
        ({"attr_indptr": np.array([0, 9, 2, 2])}, r"attr_\* arrays do not fit together"),
        ({"attr_shape": np.array([4, 2]), "attr_indptr": np.array([0, 1, 2, 2, 2])}, r"4 feature rows but 3 labels"),
        ({"labels": np.array([0, "x", None], dtype=object)}, r"an array is a pickled object"),
        ({"labels": np.array([0, 1.5, 1])}, r"labels holds 1\.5 at 1; expected whole numbers"),
        ({"labels": np.array([0, 1, np.nan])}, r"labels holds nan at 2; expected whole numbers"),
        ({"labels": np.array(["a", "b", "c"])}, r"labels holds a at 0; expected whole numbers"),
        ({"labels": np.eye(3)}, r"labels has shape \(3, 3\); expected 1 dimension"),
        ({"adj_data": np.ones(3)}, r"3 adj_data for 4 adj_indices"),
        ({"attr_matrix": np.full((3, 2), "a")}, r"attr_matrix is of type <U1; expected real numbers"),
        ({"attr_matrix": np.ones((3, 2), dtype=np.complex64)}, r"attr_matrix is of type complex64; expected real"),
        ({"train_masks": np.eye(1, 3, dtype=bool)}, r"no array 'val_masks'; fixed masks are train_masks, val_masks"),
        (
            {
                part: np.eye(2, 3 - (part == "val_masks"), dtype=bool)
                for part in ("train_masks", "val_masks", "test_masks")
            },
            r"val_masks has shape \(2, 2\); expected \(2, 3\)",
        ),
        (
            {
                part: np.eye(2 + (part == "test_masks"), 3, dtype=bool)
                for part in ("train_masks", "val_masks", "test_masks")
            },
            r"test_masks has shape \(3, 3\); expected \(2, 3\), as many splits as train_masks has",
        ),
    ],
)
def test_bad_npz_files(tmp_path, changes, message):
    np.savez(tmp_path / "g.npz", **arrays(**changes))
    with pytest.raises(DataError, match=message):
        csr_npz(tmp_path / "g.npz")


def test_a_bare_array_is_no_npz(tmp_path):
    with open(tmp_path / "g.npz", "wb") as handle:
        np.save(handle, np.ones(3))
    with pytest.raises(DataError, match=r"g\.npz: one bare array \(npy\); expected an npz with adj_indices"):
        csr_npz(tmp_path / "g.npz")


def test_a_cut_npz_is_named(tmp_path):
    np.savez(tmp_path / "g.npz", **arrays())
    (tmp_path / "g.npz").write_bytes((tmp_path / "g.npz").read_bytes()[:-200])
    with pytest.raises(CorruptFileError, match=r"g\.npz: not a whole npz file"):
        csr_npz(tmp_path / "g.npz")


def test_heterophilous_layout(tmp_path):
    masks = {f"{part}_masks": np.eye(3, 4, k, dtype=bool) for k, part in enumerate(("train", "val", "test"))}
    np.savez(
        tmp_path / "h.npz", node_features=np.ones((4, 2)), node_labels=np.array([0, 1, 0, 1]),
        edges=np.array([[0, 1], [2, 3]]), **masks,
    )  # fmt: skip
    raw = heterophilous_npz(tmp_path / "h.npz")
    assert raw.edges.tolist() == [[0, 2], [1, 3]]
    assert raw.masks[0].shape == (3, 4)
    np.savez(
        tmp_path / "h.npz",
        node_features=np.ones((4, 2)),
        node_labels=np.array([0, 1, 0, 0.5]),
        edges=raw.edges.T,
        **masks,
    )
    with pytest.raises(DataError, match=r"node_labels holds 0\.5 at 3"):
        heterophilous_npz(tmp_path / "h.npz")
