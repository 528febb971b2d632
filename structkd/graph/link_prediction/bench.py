"""Compare link predictors over seeds; each finished seed is kept, so the same line continues where it stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from structkd.errors import UsageError
from structkd.files import read_json, write_json
from structkd.graph.data.datasets import load
from structkd.graph.figures import seed_figure
from structkd.graph.link_prediction.distillation import LINK_METHODS, LinkConfig, links
from structkd.ids import fingerprint_json
from structkd.progress import note, track
from structkd.report import finish
from structkd.runs import Run, source_version

INPUT = {"sage": "graph_at_inference", "mlp": "graph_free", "llp": "graph_free"}


@dataclass(frozen=True)
class LinkBenchConfig:
    """One dataset, several methods, several seeds; the teacher is GraphSAGE."""

    dataset: str
    data_root: str | None = None
    methods: tuple[str, ...] = LINK_METHODS
    seeds: tuple[int, ...] = (0,)
    config: LinkConfig = field(default_factory=LinkConfig)


def bench_links(config: LinkBenchConfig, out: str | Path) -> dict[str, Any]:
    """Run every seed that is not finished.

    Returns:
        dataset, seeds, rows: method, input_class, auc, auc_mean, auc_std, hits@K_mean, mrr_mean, valid_mean,
        cpu_seconds; at best validation AUC only, fractions.

    Raises:
        UsageError: no seed, or an unknown method.
        DataError: bad data.
    """
    if not config.seeds:
        raise UsageError("a comparison needs one seed or more.")
    folder = Path(out)
    run = Run.create(folder, "graph links", config)
    done = [_finished(config, folder, seed) for seed in track(list(config.seeds), "seeds")]
    rows = [_row(method, [one[method] for one in done]) for method in ("sage", *config.methods)]
    summary = {"dataset": config.dataset, "seeds": list(config.seeds), "rows": rows}
    run.write_table("links", f"{config.dataset}: links held out", rows)
    values = {row["method"]: row["auc"] for row in rows}
    run.write_figure("auc", seed_figure(f"{config.dataset}: held-out links at best validation", "AUC", values))
    finish(run, summary)
    return summary


def _finished(config: LinkBenchConfig, folder: Path, seed: int) -> Mapping[str, Mapping[str, float]]:
    task = load(config.dataset, config.data_root, seed=seed)
    sources = source_version(Path(__file__).parents[1])
    identity = [task.fingerprint, asdict(config.config.resolved(task.name)), list(config.methods), seed, sources]
    path = folder / "results" / f"{fingerprint_json(identity)[:20]}.json"
    if path.is_file():
        found: dict[str, dict[str, float]] = read_json(path)["metrics"]
        return found
    metrics = links(task, config.methods, config.config, seed).metrics
    write_json(path, {"metrics": metrics})
    note(f"seed {seed}: " + ", ".join(f"{name} AUC {values['auc']:.4f}" for name, values in metrics.items()))
    return metrics


def _row(method: str, done: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    aucs = [one["auc"] for one in done]
    row: dict[str, Any] = {"method": method, "input_class": INPUT[method], "auc_mean": float(np.mean(aucs))}
    row |= {"auc_std": float(np.std(aucs)), "auc": aucs}
    for key in ("hits@10", "hits@20", "hits@50", "mrr", "valid"):
        row[f"{key}_mean"] = float(np.mean([one[key] for one in done]))
    return row | {"cpu_seconds": float(np.mean([one["cpu_seconds"] for one in done]))}
