"""The information-drowning curve on Cora: how far each band of the teacher reaches the student, epoch by epoch.

python benchmarks/graph_spectrum.py --data-root DATA

Public split, GCN teacher of the published rule, published hyper-parameters, one seed: agreement every 5 epochs of MLP,
GLNN and FF-G2M. Writes results/graph_spectrum.json and docs/graph-spectrum.svg; about two minutes of one core.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from origin import RESULTS, commit, machine

from structkd import graph

DOCS = RESULTS.parent.parent / "docs"
METHODS = ("mlp", "glnn", "ff-g2m")
COLOURS = {"mlp": "#9a6700", "glnn": "#1f6feb", "ff-g2m": "#1a7f37"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    task = graph.load("planetoid:Cora", arguments.data_root, "public", seed=arguments.seed)
    teacher = graph.train_teacher(task, graph.TeacherConfig("gcn", select="metric"))
    found = graph.spectrum(task, teacher.logits(task), METHODS, every=5)
    shown = {name: {key: [round(v, 4) for v in values] for key, values in curve.items()}
             for name, curve in found.curves.items()}  # fmt: skip
    value = {
        "what": "mean cosine and relative Frobenius error of student and teacher probabilities per band; low S p, high "
        "(I - S) p; share of energy in equal intervals of [0, 2]; finished students at best validation",
        "command": f"python benchmarks/graph_spectrum.py --data-root DATA --seed {arguments.seed}",
        "commit": commit(), "machine": f"{machine()}, one thread", "dataset": "planetoid:Cora",
        "split": "public", "setting": "transductive", "teacher": "gcn", "seed": arguments.seed,
        "teacher_test": teacher.metrics["test"], "curves": shown,
        "energies": {name: [round(share, 6) for share in shares] for name, shares in found.energies.items()},
        "finished": {name: {key: round(v, 4) for key, v in metrics.items()} for name, metrics in found.metrics.items()},
    }  # fmt: skip
    (RESULTS / "graph_spectrum.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draw(shown, DOCS / "graph-spectrum.svg")


def draw(curves: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Low band solid, high band dashed; the teacher is 1 by definition."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "structkd"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, curve in curves.items():
        for band, style in (("low", "-"), ("high", "--")):
            axes.plot(curve["step"], curve[f"cos_{band}"], style, color=COLOURS[name], label=f"{name}, {band} band")
    axes.set(xlabel="epoch", ylabel="mean cosine to the teacher", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
