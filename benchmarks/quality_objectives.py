"""Every objective and policy against the default, graph half and ranking half, with paired tests.

    python benchmarks/quality_objectives.py graph --data DIR --work DIR [--seeds 5]
    python benchmarks/quality_objectives.py ranking --data DIR --work DIR [--seeds 5]
    python benchmarks/quality_objectives.py table --work DIR

One JSON per (dataset, seed, piece) in WORK; a killed run goes on where it stopped; `table` gathers what is there into
results/objectives_*.json, docs/objectives-results.md and docs/objectives-acquisition.svg. Each piece runs at its
reference default, nothing is tuned per dataset, all pieces of a seed share teacher scores, and budgets are equal:
graph students of 2 layers, width 64, at most 200 epochs; ranking students of static vectors, 4 passes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import RESULTS, commit, machine
from quality_objectives_ranking import COLLECTIONS, mean_per_query, run_of
from scipy import stats

DOCS = Path(__file__).parent.parent / "docs"

BUDGETS = (0.1, 0.25, 0.5)

# piece -> (method, policies, rule that fuses several teachers)
Piece = tuple[str, dict[str, Any], str]
GRAPH: dict[str, Piece] = {
    "ff-g2m": ("ff-g2m", {}, ""),
    "mlp (labels alone)": ("mlp", {}, ""),
    **{
        f"ff-g2m + {name}": ("ff-g2m", {"objective": name}, "")
        for name in (
            "kl", "reverse-kl", "jensen-shannon", "jeffreys", "plackett-luce", "listmle", "margin-mse", "ranknet",
            "pointwise-mse",
        )
    },
    **{
        f"ff-g2m + kl, {t}": ("ff-g2m", {"target": t}, "")
        for t in ("taid", "truncate:3", "standardise", "mixup", "lelp:2")
    },
    **{
        f"ff-g2m + kl, {w}": ("ff-g2m", {"sample_weight": w, "objective": "kl"}, "")
        for w in ("bd-kd", "confidence", "tgeo")
    },
    **{
        f"ff-g2m + {r}": ("ff-g2m", {"representation": r}, "")
        for r in ("mi-alpha", "infonce", "similarity-preserving", "affinity-kl")
    },
    "ff-g2m, dual head": ("ff-g2m", {"head": "dual"}, ""),
    "ff-g2m + kl, ddk by degree": ("ff-g2m", {"domains": "degree"}, ""),
    "ff-g2m, agreement filter": ("ff-g2m", {"keep": "agreement"}, ""),
    **{
        f"ff-g2m, gcn and sage by {rule}": ("ff-g2m", {}, rule)
        for rule in ("mean", "reciprocal-rank", "confidence", "router", "set-attention")
    },
    **{f"{name} alone": ("mlp", {"objective": name}, "") for name in ("kl", "plackett-luce", "margin-mse")},
    "kl alone, taid": ("mlp", {"target": "taid"}, ""),
    "kl alone, bd-kd": ("mlp", {"sample_weight": "bd-kd", "objective": "kl"}, ""),
    "dual head alone": ("mlp", {"head": "dual"}, ""),
}  # fmt: skip
LELP: dict[str, Piece] = {
    **{name: GRAPH[name] for name in ("ff-g2m", "ff-g2m + kl", "ff-g2m + kl, lelp:2", "kl alone")},
    "kl alone, lelp:2": ("mlp", {"target": "lelp:2"}, ""),
    "kl alone, lelp:4": ("mlp", {"target": "lelp:4"}, ""),
}
ASKED: dict[str, Piece] = {
    f"{policy} {budget:g}": ("mlp", {"objective": "kl", "acquire": policy, "budget": budget}, "")
    for policy in ("random", "margin", "rad")
    for budget in BUDGETS
}
HALVED = ", two classes"
GRAPHS: dict[str, dict[str, Piece]] = {
    "planetoid:Cora": {**GRAPH, **ASKED},
    "heterophilous:chameleon_filtered": {**GRAPH, **ASKED},
    "planetoid:CiteSeer": {**GRAPH, **ASKED},
    f"heterophilous:chameleon_filtered{HALVED}": LELP,
    f"planetoid:Cora{HALVED}": LELP,
    "heterophilous:minesweeper": LELP,
}


def graph_half(options: argparse.Namespace) -> None:
    """Every piece on every graph; a seed's teachers are trained once."""
    from structkd import graph
    from structkd.graph.models.embeddings import embed_nodes
    from structkd.graph.policies.flags import Policies
    from structkd.graph.storage import load_teacher, save_teacher
    from structkd.graph.targets.fusing import fuse

    config = graph.DistillConfig(hidden=64, layers=2, epochs=200, patience=50)
    for dataset in options.only or GRAPHS:
        for seed in range(options.seed, options.seed + options.seeds):
            task = graph.load(dataset.removesuffix(HALVED), root=str(Path(options.data) / "graph"), seed=seed)
            if dataset.endswith(HALVED):  # the first half of the labels against the others: subclasses exist
                task = replace(task, y=(task.y >= (task.classes + 1) // 2).long(), classes=2)

            def teacher_of(model: str, task=task, dataset=dataset, seed=seed) -> Any:
                folder = Path(options.work) / "teachers" / f"{slug(dataset)}-{model}-{seed}"
                if not (folder / "model.json").is_file():
                    chosen = graph.TeacherConfig(model=model, layers=2, hidden=128, epochs=200)
                    save_teacher(graph.train_teacher(task, chosen), folder)
                return load_teacher(folder, task)

            gcn = teacher_of("gcn")

            def run(piece: Piece, task=task, gcn=gcn, teacher_of=teacher_of) -> dict[str, float]:
                method, policies, rule = piece
                teacher: Any = gcn
                if rule:
                    both, seen = (gcn, teacher_of("sage")), task.observed
                    inside = [embed_nodes(one, seen) for one in both]
                    teacher = fuse(seen, [one.logits(seen) for one in both], rule, task.seed, inside)
                result = graph.distill(task, teacher, replace(config, method=method), policies=Policies(**policies))
                return {**result.metrics, "teacher": gcn.metrics["test"]}

            each(options, "graph", dataset, seed, GRAPHS[dataset], run)


def ranking_half(options: argparse.Namespace) -> None:
    """Every piece on every collection."""
    for dataset in options.only or COLLECTIONS:
        of_seed = run_of(options, dataset)
        for block in COLLECTIONS[dataset]:  # objectives first, then policies, then acquisition: whole tables early
            for name, piece in block.items():
                for seed in range(options.seed, options.seed + options.seeds):
                    each(options, "ranking", dataset, seed, {name: piece}, of_seed(seed))


def each(
    options: argparse.Namespace, half: str, dataset: str, seed: int, pieces: dict[str, Any], run: Callable[[Any], dict]
) -> None:
    """Run what has no result file yet."""
    for name, piece in pieces.items():
        path = Path(options.work) / "runs" / f"{half}-{slug(dataset)}-{seed}-{slug(name)}.json"
        if path.is_file():
            continue
        started = time.process_time()
        found = run(piece)
        seconds = time.process_time() - started
        row = {"half": half, "dataset": dataset, "seed": seed, "piece": name, "seconds": seconds, **found}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(row), encoding="utf-8")
        draft.replace(path)
        print(f"{dataset} {seed} {name}: {found['test']:.4f} ({seconds:.1f} s)", flush=True)


def slug(text: str) -> str:
    """A file name."""
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in text.lower())


def table(options: argparse.Namespace) -> None:
    """Gather the finished runs: results JSON, a page of tables, the acquisition curve."""
    paths = sorted((Path(options.work) / "runs").glob("*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.stat().st_size]
    page = [
        "# Objectives and policies, measured",
        "",
        "Generated by `benchmarks/quality_objectives.py table`. Every piece at its reference default, nothing tuned",
        "per dataset; one shared teacher per seed, equal budgets. Difference and p-value (two-sided paired t-test,",
        "over seeds for graphs, over queries of seed means for ranking; Holm's correction within a table) are",
        "against the first row. **bold**: significant at 0.05 after the correction. Pieces that the script declares",
        "and a table lacks have not been run with every seed at its commit; the correction covers what is shown.",
        "",
    ]
    path = RESULTS / "objectives_and_policies.json"
    before = json.loads(path.read_text(encoding="utf-8"))  # tables that WORK has nothing for stay, with their commit
    declared = [*GRAPHS, *COLLECTIONS]
    kept: dict[str, list[dict[str, Any]]] = {name: rows for name, rows in before["tables"].items() if name in declared}
    commits: dict[str, str] = before["commits"]
    revision = options.commit or commit()
    for half, default in (("graph", "ff-g2m"), ("ranking", "kl")):
        for dataset in dict.fromkeys(run["dataset"] for run in runs if run["half"] == half):
            if rows := _rows([run for run in runs if run["dataset"] == dataset], default, options.seeds):
                kept[dataset], commits[dataset] = rows, revision
    kept = {name: kept[name] for name in declared if name in kept}
    commits = {name: commits[name] for name in kept}
    for dataset, rows in kept.items():
        page += _table(dataset, rows, commits[dataset])
    value = {
        "command": "python benchmarks/quality_objectives.py graph|ranking --data DATA --work WORK",
        "commits": commits, "machine": machine(), "python": sys.version.split()[0],
        "tables": kept,
    }  # fmt: skip
    path.write_text(json.dumps(value, indent=1).replace("NaN", "null") + "\n", encoding="utf-8")
    curves = {name: rows for name, rows in kept.items() if any(row["piece"].startswith("random ") for row in rows)}
    if curves:
        (DOCS / "objectives-acquisition.svg").write_text(_curves(curves), encoding="utf-8")
        page += ["![Quality against the share of teacher calls](objectives-acquisition.svg)", ""]
    (DOCS / "objectives-results.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    print("\n".join(page))


def _rows(runs: list[dict[str, Any]], default: str, seeds: int) -> list[dict[str, Any]]:
    """One row per piece that has every seed, the default first, with paired tests against it."""
    by_piece: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_piece.setdefault(run["piece"], {})[run["seed"]] = run
    full = {name: [found[seed] for seed in sorted(found)] for name, found in by_piece.items() if len(found) >= seeds}
    if default not in full:
        return []
    base, rows = full[default], []
    for name, found in full.items():
        tests = [run["test"] for run in found]
        row = {
            "piece": name, "test_mean": float(np.mean(tests)), "test_std": float(np.std(tests, ddof=1)), "test": tests,
            "difference": float(np.mean(tests) - np.mean([run["test"] for run in base])),
            "teacher": float(np.mean([run["teacher"] for run in found])),
            "before": float(np.mean([run.get("before", np.nan) for run in found])),
            "seconds": float(np.median([run["seconds"] for run in found])), "p": None,
        }  # fmt: skip
        if name != default:
            row["p"] = _p_value(found, base)
        rows.append(row)
    _holm([row for row in rows if row["p"] is not None])
    return sorted(rows, key=lambda row: (row["piece"] != default, -row["test_mean"]))


def _p_value(found: list[dict[str, Any]], base: list[dict[str, Any]]) -> float:
    """Paired t-test over seeds, or over queries of seed means where runs keep them; 1 where nothing differs."""
    if "per_query" in found[0]:
        left, right = (list(mean_per_query(side).values()) for side in (found, base))
    else:
        left, right = ([run["test"] for run in side] for side in (found, base))
    difference = np.subtract(left, right)
    return 1.0 if np.ptp(difference) == 0 and not difference[0] else float(stats.ttest_rel(left, right).pvalue)


def _holm(rows: list[dict[str, Any]]) -> None:
    """Holm's correction, in place."""
    highest = 0.0
    for rank, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        highest = max(highest, min(1.0, (len(rows) - rank) * row["p"]))
        row["p_holm"] = highest


def _table(dataset: str, rows: list[dict[str, Any]], commit: str) -> list[str]:
    before = rows[0]["before"]  # none for graphs
    ranking = before is not None and not np.isnan(before)
    measure, side = ("nDCG@10", "first stage") if ranking else ("test", "teacher")
    start = f" Students before training: {before:.4f}." if ranking else ""
    seeds = len(rows[0]["test"])
    lines = [f"## {dataset}", "", f"{seeds} seeds, {side} {rows[0]['teacher']:.4f}.{start} Commit {commit}.", ""]
    lines += [f"| piece | {measure} | std | difference | p | p, Holm | CPU seconds |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        p = "" if row["p"] is None else f"{row['p']:.3f} | {row['p_holm']:.3f}"
        policy, _, share = row["piece"].partition(" ")
        asked = policy in ("random", "margin", "rad") and share.replace(".", "").isdigit()
        shown = f"kl alone, {float(share):.0%} of the calls, {policy}" if asked else row["piece"]
        name = f"**{shown}**" if row["p"] is not None and row["p_holm"] < 0.05 else shown
        cells = f"{row['test_mean']:.4f} | {row['test_std']:.4f} | {row['difference']:+.4f}"
        lines.append(f"| {name} | {cells} | {p or ' | '} | {row['seconds']:.1f} |")
    return [*lines, ""]


def _curves(tables: dict[str, list[dict[str, Any]]]) -> str:
    """One panel per dataset: quality against the share of teacher calls."""
    import io

    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6.4))
    panels = panels.ravel()
    for panel, (dataset, rows) in zip(panels, tables.items(), strict=False):
        found = {row["piece"]: row for row in rows}
        whole = found.get("kl alone") or found.get("kl")
        for place, policy in enumerate(("random", "margin", "rad")):
            points = [(b, found[f"{policy} {b:g}"]) for b in BUDGETS if f"{policy} {b:g}" in found]
            points += [(1.0, whole)] if whole else []
            x = [100 * b + 1.5 * (place - 1) * (b < 1) for b, _ in points]  # apart, so that all bars are seen
            y, e = [r["test_mean"] for _, r in points], [r["test_std"] for _, r in points]
            panel.errorbar(x, y, e, marker="o", capsize=3, label=policy)
        panel.set_title(dataset)
        panel.set_xlabel("% of the teacher calls")
        panel.set_xticks([10, 25, 50, 100])
        panel.set_ylabel("test accuracy" if dataset in GRAPHS else "nDCG@10")
    for panel in panels[len(tables) :]:
        panel.axis("off")
    panels[len(tables)].legend(*panels[0].get_legend_handles_labels(), loc="center", title="asked by, mean and std")
    figure.tight_layout()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["graph", "ranking", "table"])
    parser.add_argument("--data", default=None)
    parser.add_argument("--work", required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="the first, for seeds in processes of their own")
    parser.add_argument("--commit", default="", help="of the code that made the runs; that of HEAD by default")
    parser.add_argument("--init", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or hub id (ranking)")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"graph": graph_half, "ranking": ranking_half, "table": table}[arguments.what](arguments)
