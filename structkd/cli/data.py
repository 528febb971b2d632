"""`structkd data`: list, make, check."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import App

from structkd import graph
from structkd.cli.output import Common, Output, Table
from structkd.errors import StructKDError, UsageError
from structkd.graph.data.readers import write_csr_npz
from structkd.ranking.data import datasets
from structkd.ranking.data.check import check_folder

app = App(name="data", help="Built-in datasets: list, make, check.")

_SHOWN = 20  # problems of one kind of file that are printed; all are counted


@app.command(name="list")
def list_(*, common: Common = Common()) -> Output:
    """List the datasets that structkd knows: name, kind, size, licence (and, with --json, the source)."""
    rows = manifest()
    shown = [{key: row[key] for key in ("name", "kind", "size", "licence")} for row in rows]
    return Output({"datasets": rows}, tables=[Table("datasets", shown)])


@app.command
def make(name: str, *, out: Path, common: Common = Common()) -> Output:
    """Write a built-in dataset as plain files that the other commands read again.

    Parameters
    ----------
    name
        digits (or sbm:KEY=VALUE,...): OUT/graph.npz, for --dataset npz:OUT/graph.npz. pydocs: a folder in BEIR layout
        with the splits train and test, for --collection OUT.
    out
        Folder; files of the same names are replaced.
    """
    if name in datasets.DATASETS:
        parts = {split: datasets.load(name, split) for split in datasets.splits(name)}
        whole = datasets.load(name, "all")
        datasets.write(whole, out, parts)
        judgements = sum(len(judged) for part in parts.values() for judged in part.qrels.values())
        found: dict[str, Any] = {
            "name": whole.name,
            "path": str(out),
            "documents": len(whole.documents),
            "queries": len(whole.queries),
            "judgements": judgements,
        }
        return Output(found, lines=[f"{out}: {_counts(found)}. Use it with --collection {out}"])
    if name.partition(":")[0] not in ("digits", "sbm"):
        built_in = ", ".join(["digits", "sbm:KEY=VALUE,...", *datasets.DATASETS])
        raise UsageError(
            f"dataset {name!r} cannot be made; expected one of {built_in}. Others are read where they lie."
        )
    task = graph.load(name, seed=common.seed)
    path = out / "graph.npz"
    assert isinstance(task.x, torch.Tensor)  # both sets that can be made are dense
    write_csr_npz(path, task.x.numpy(), task.edge_index.numpy(), task.y.numpy(), _masks(task))
    found = {"name": name, "path": str(path), "nodes": len(task.y), "edges": task.edge_index.shape[1] // 2}
    return Output(found, lines=[f"{path}: {_counts(found)}. Use it with --dataset npz:{path} --split masks"])


@app.command
def check(path: Path, *, common: Common = Common()) -> Output:
    """Check a collection (a folder in BEIR layout) or a graph (an npz file); exit status 1 when something is wrong.

    Parameters
    ----------
    path
        The folder or file.
    """
    if path.is_dir():
        report = check_folder(path)
        problems, notes, counts = report.problems, report.notes, report.counts
    else:
        problems, notes, counts = _check_graph(path)
    data = {
        "ok": not problems,
        "path": str(path),
        "counts": counts,
        "problems": [{"path": where, "problem": what} for where, what in problems],
        "notes": [{"path": where, "note": what} for where, what in notes],
    }
    lines = [f"{where}: {what}" for where, what in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"... and {len(problems) - _SHOWN} problems more (--json lists all)")
    lines += [f"note: {where}: {what}" for where, what in notes]
    lines.append(f"{path}: {_counts(counts)}; " + (f"{len(problems)} problems" if problems else "no problem found"))
    return Output(data, lines=lines, ok=not problems)


def manifest() -> list[dict[str, Any]]:
    """Rows of the manifest that comes with the package."""
    text = resources.files("structkd").joinpath("data_manifest.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)["dataset"]
    return rows


def _masks(task: graph.GraphTask) -> dict[str, Any]:
    """The task's split as the one fixed split of the file."""
    parts = {"train": task.train, "val": task.valid, "test": task.test}
    return {f"{name}_masks": mask.numpy()[None] for name, mask in parts.items()}


def _check_graph(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]], dict[str, int]]:
    """Problems, notes and counts of an npz graph, as `--dataset npz:FILE` would read it."""
    try:
        task = graph.load(f"npz:{path}", split=None)
    except StructKDError as error:
        return [(str(path), str(error).removeprefix(f"{path}: "))], [], {}
    counts = {"nodes": len(task.y), "edges": task.edge_index.shape[1] // 2, "classes": task.classes}
    notes = []
    alone = len(task.y) - len(np.unique(task.edge_index[0].numpy()))
    if alone:
        notes.append((str(path), f"{alone} nodes have no edge"))
    unknown = int((task.y < 0).sum())
    if unknown:
        notes.append((str(path), f"{unknown} nodes have no label"))
    return [], notes, counts


def _counts(found: dict[str, Any]) -> str:
    return ", ".join(f"{value} {key}" for key, value in found.items() if isinstance(value, int)) or "unreadable"
