"""Datasets by name: readers of published files, the digits graph, and generated block-model graphs."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from sklearn.datasets import load_digits
from torch_geometric import datasets as pyg

from structkd.errors import DataError, UsageError, did_you_mean
from structkd.graph.data.readers import RawGraph, csr_npz, heterophilous_npz, ogb_csv, planetoid
from structkd.graph.data.splits import Split, cpf_split, mask_split, random_split
from structkd.graph.data.task import GraphTask, Metric, Setting

IntArray = NDArray[np.int64]
SPLITS = ("public", "random", "cpf", "masks", "ogb")


def load(
    name: str,
    root: str | Path | None = None,
    split: str | None = None,
    setting: Setting = "transductive",
    seed: int = 0,
) -> GraphTask:
    """A dataset as a task under one protocol.

    Args:
        name: planetoid:NAME, amazon:NAME, coauthor:NAME, heterophilous:NAME, ogbn:NAME, npz:FILE, digits, or
            sbm:KEY=VALUE,...
        root: folder with torch_geometric's raw layouts; what is missing there is downloaded.
        split: public, random, cpf, masks or ogb; by default the one that the dataset ships, else random.
        setting: transductive, inductive or production.
        seed: draws the split and the hidden nodes.

    Raises:
        UsageError: an unknown name, split or setting.
        DataError: missing or malformed files.
    """
    kind, _, rest = name.partition(":")
    if kind not in DATASETS:
        known = f"expected one of {', '.join(sorted(DATASETS))}, as in planetoid:Cora."
        raise UsageError(f"dataset {name!r}: {known}{did_you_mean(kind, DATASETS)}")
    if setting not in ("transductive", "inductive", "production"):
        raise UsageError(f"setting {setting!r}: expected transductive, inductive or production.")
    raw = DATASETS[kind](rest, Path(root) if root is not None else default_root(), seed)
    chosen = split or _default_split(raw, kind)
    if chosen not in SPLITS:
        raise UsageError(f"split {chosen!r}: expected one of {', '.join(SPLITS)}.{did_you_mean(chosen, SPLITS)}")
    if chosen == "cpf":
        raw = largest_component(raw)
    rows = _rows(raw, chosen, seed, name)
    shown = f"npz:{Path(rest).stem}" if kind == "npz" else name
    metric: Metric = "roc_auc" if shown == "heterophilous:minesweeper" else "accuracy"
    classes = int(raw.y.max()) + 1
    return GraphTask.create(
        raw.x, raw.edges, raw.y, rows.train, rows.valid, rows.test,
        classes=classes, name=shown, split=chosen, setting=setting, seed=seed, metric=metric,
    )  # fmt: skip


@dataclass(frozen=True)
class DatasetConfig:
    """Which problem, under which protocol."""

    dataset: str
    "planetoid:NAME, amazon:NAME, coauthor:NAME, heterophilous:NAME, ogbn:NAME, npz:FILE, digits or sbm:KEY=VALUE,..."

    data_root: str | None = None
    "Folder with torch_geometric's raw layouts; what is missing there is downloaded."

    split: str | None = None
    "public, random, cpf, masks or ogb; by default the one the dataset ships, else random."

    setting: Setting = "transductive"
    "transductive, inductive or production."

    def load(self, seed: int) -> GraphTask:
        """The task of one seed."""
        return load(self.dataset, self.data_root, self.split, self.setting, seed)


def default_root() -> Path:
    """Where datasets are downloaded when no root is given: $STRUCTKD_DATA, else the user's cache folder."""
    given = os.environ.get("STRUCTKD_DATA")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "structkd" / "data"


def largest_component(raw: RawGraph) -> RawGraph:
    """The largest connected component, nodes kept in order (the CPF protocol); published splits fall away."""
    nodes = len(raw.y)
    graph = sp.coo_array((np.ones(raw.edges.shape[1]), (raw.edges[0], raw.edges[1])), shape=(nodes, nodes))
    _, part = connected_components(graph, directed=False)
    kept = np.flatnonzero(part == np.bincount(part).argmax())
    new = np.full(nodes, -1)
    new[kept] = np.arange(len(kept))
    edges = new[raw.edges]
    return RawGraph(raw.x[kept], edges[:, (edges >= 0).all(axis=0)], raw.y[kept])


def nearest_neighbours(x: IntArray, k: int) -> IntArray:
    """Edges [2, nodes * k] to the k nearest other rows by squared distance in int64; ties go to the lower row."""
    squares = (x * x).sum(axis=1)
    distances = squares[:, None] + squares[None, :] - 2 * (x @ x.T)
    np.fill_diagonal(distances, np.iinfo(np.int64).max)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.stack([np.repeat(np.arange(len(x)), k), nearest.ravel()])


def _digits(rest: str, root: Path, seed: int) -> RawGraph:
    """scikit-learn's 1797 images of handwritten digits, joined to their 5 nearest; 4 labels a class are public."""
    if rest:
        raise UsageError(f"dataset digits:{rest}: digits takes no further name.")
    pixels, y = load_digits(return_X_y=True)
    whole = pixels.astype(np.int64)
    public = random_split(y, 0, "digits", each=4, valid=200, test=None)
    return RawGraph((whole / 16).astype(np.float32), nearest_neighbours(whole, 5), y.astype(np.int64), public=public)


_SBM = {
    "nodes": 600, "classes": 4, "degree": 8.0, "homophily": 0.8, "features": 32, "signal": 1.0, "labels": 10,
    "valid": 100,
}  # fmt: skip


def _sbm(rest: str, root: Path, seed: int) -> RawGraph:
    """A stochastic block model with tunable homophily and Gaussian features; the seed draws graph and split."""
    given = dict(_SBM)
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in given:
            raise UsageError(f"dataset sbm: unknown key {key!r}; expected {', '.join(_SBM)}.")
        try:
            given[key] = type(_SBM[key])(value)
        except ValueError:
            raise UsageError(f"dataset sbm: {key}={value!r} is no number.") from None
    raw = block_model(given, seed)
    public = random_split(raw.y, seed, "sbm", each=int(given["labels"]), valid=int(given["valid"]), test=None)
    return RawGraph(raw.x, raw.edges, raw.y, public=public)


def block_model(settings: Mapping[str, float], seed: int) -> RawGraph:
    """Edges drawn so that a share `homophily` of them joins equal classes; features = class centre + noise."""
    generator = np.random.default_rng(seed)
    nodes, classes = int(settings["nodes"]), int(settings["classes"])
    least = {"degree": 0, "signal": 0, "features": 1, "labels": 1, "valid": 1}
    if nodes < 2 * classes or classes < 2:
        raise UsageError(f"dataset sbm: {nodes} nodes in {classes} classes; expected 2 or more classes of 2 or more.")
    if not 0 <= settings["homophily"] <= 1:
        raise UsageError(f"dataset sbm: homophily={settings['homophily']}; expected a share between 0 and 1.")
    for key in ("degree", "signal", "features", "labels", "valid"):
        if not least[key] <= settings[key] < math.inf:
            raise UsageError(f"dataset sbm: {key}={settings[key]}; expected {least[key]} or more.")
    y = generator.permutation(np.arange(nodes) % classes)
    count = round(nodes * settings["degree"] / 2)
    rows = generator.integers(nodes, size=count)
    label = np.where(
        generator.random(count) < settings["homophily"],
        y[rows],
        (y[rows] + generator.integers(1, classes, size=count)) % classes,
    )
    members = [np.flatnonzero(y == c) for c in range(classes)]
    columns = np.array(
        [members[c][i % len(members[c])] for c, i in zip(label, generator.integers(nodes, size=count), strict=True)]
    )
    centres = generator.normal(size=(classes, int(settings["features"])))
    x = settings["signal"] * centres[y] / np.sqrt(settings["features"])
    noise = generator.normal(size=x.shape) / np.sqrt(settings["features"]) * 2
    return RawGraph((x + noise).astype(np.float32), np.stack([rows, columns]), y.astype(np.int64))


def _planetoid(rest: str, root: Path, seed: int) -> RawGraph:
    name = _known(rest, ("Cora", "CiteSeer", "PubMed"), "planetoid")
    folder = root / "Planetoid" / name / "raw"
    _fetch(folder, f"ind.{name.lower()}.x", lambda: pyg.Planetoid(str(root / "Planetoid"), name))
    return planetoid(folder, name.lower())


def _amazon(rest: str, root: Path, seed: int) -> RawGraph:
    name = _known(rest, ("Photo", "Computers"), "amazon")
    folder, file = root / "Amazon" / name / "raw", f"amazon_electronics_{name.lower()}.npz"
    _fetch(folder, file, lambda: pyg.Amazon(str(root / "Amazon"), name))
    return csr_npz(folder / file)


def _coauthor(rest: str, root: Path, seed: int) -> RawGraph:
    name = _known(rest, ("CS", "Physics"), "coauthor")
    folder = root / "Coauthor" / name / "raw"
    file = {"CS": "ms_academic_cs.npz", "Physics": "ms_academic_phy.npz"}[name]
    _fetch(folder, file, lambda: pyg.Coauthor(str(root / "Coauthor"), name))
    return csr_npz(folder / file)


def _heterophilous(rest: str, root: Path, seed: int) -> RawGraph:
    if not rest or "/" in rest:
        raise UsageError(f"dataset heterophilous:{rest}: expected a name, as in heterophilous:minesweeper.")
    name = rest.lower().replace("-", "_")
    folder = root / "HeterophilousGraph" / name / "raw"
    _fetch(folder, f"{name}.npz", lambda: pyg.HeterophilousGraphDataset(str(root / "HeterophilousGraph"), name))
    return heterophilous_npz(folder / f"{name}.npz")


def _ogbn(rest: str, root: Path, seed: int) -> RawGraph:
    name = _known(rest, ("arxiv", "products"), "ogbn")
    folder = root / f"ogbn_{name}"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected the unpacked archive of ogbn-{name} (raw/ and split/). "
            "Download it from the Open Graph Benchmark and unpack it there."
        )
    return ogb_csv(folder)


def _npz(rest: str, root: Path, seed: int) -> RawGraph:
    if not rest:
        raise UsageError("dataset npz: expected a file, as in npz:graph.npz.")
    return csr_npz(Path(rest))


DATASETS: dict[str, Callable[[str, Path, int], RawGraph]] = {
    "planetoid": _planetoid,
    "amazon": _amazon,
    "coauthor": _coauthor,
    "heterophilous": _heterophilous,
    "ogbn": _ogbn,
    "npz": _npz,
    "digits": _digits,
    "sbm": _sbm,
}


def _known(name: str, names: tuple[str, ...], kind: str) -> str:
    for known in names:
        if name.lower() == known.lower():
            return known
    raise UsageError(f"dataset {kind}:{name}: expected {kind}:{' or :'.join(names)}.{did_you_mean(name, names)}")


def _fetch(folder: Path, file: str, download: Callable[[], object]) -> None:
    """Download through torch_geometric when `file` is not there yet."""
    if (folder / file).is_file():
        return
    try:
        download()
    except Exception as error:  # whatever the network or the host does wrong, the cure is the same
        raise DataError(
            f"{folder / file}: not there, and the download failed ({type(error).__name__}: {error}). "
            "Give --data-root the folder that holds it, or connect to the network."
        ) from None


def _default_split(raw: RawGraph, kind: str) -> str:
    if raw.public is not None:
        return "ogb" if kind == "ogbn" else "public"
    return "masks" if raw.masks is not None else "random"


def _rows(raw: RawGraph, split: str, seed: int, name: str) -> Split:
    if split in ("public", "ogb"):
        if raw.public is None:
            raise DataError(f"{name}: ships no {split} split; use --split random, cpf or masks.")
        return raw.public
    if split == "masks":
        return mask_split(raw.masks, seed, name)
    return random_split(raw.y, seed, name) if split == "random" else cpf_split(raw.y, seed, name)
