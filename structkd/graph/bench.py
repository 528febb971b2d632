"""Compare methods over seeds with one shared teacher per seed, its logits read from the score cache by every method.

A folder holds `teachers/KEY` (score caches), `weights/KEY` (the teachers themselves), `results/KEY.json` (one finished
seed of one method) and, beside them, the run's own files. Keys are fingerprints of everything that decides the
content, so another configuration never reads this one's results, and an interrupted comparison continues where it
stopped.
"""

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from structkd import scores
from structkd.errors import UsageError, did_you_mean
from structkd.files import read_json, write_json
from structkd.graph.data.datasets import load
from structkd.graph.data.task import GraphTask, Setting
from structkd.graph.distillation import METHODS, DistillConfig, config_fields, distill, teacher_logits
from structkd.graph.evaluate import metric_of
from structkd.graph.models.embeddings import embed_nodes, embeds
from structkd.graph.models.teacher import (
    Teacher,
    TeacherConfig,
    open_scores,
    read_scores,
    score_nodes,
    teacher_spec,
    train_teacher,
)
from structkd.graph.policies.flags import NO_POLICIES, Policies
from structkd.graph.shown import shown, write_figures
from structkd.graph.storage import load_teacher, save_teacher
from structkd.graph.targets.fusing import FUSE, fuse
from structkd.ids import fingerprint_json
from structkd.progress import note, track
from structkd.report import finish
from structkd.runs import Run, source_version
from structkd.scores.provenance import keep_teachers, teacher_row

_OFF = asdict(NO_POLICIES)
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class BenchConfig:
    """A comparison: one dataset under one protocol, one teacher, several methods, several seeds."""

    dataset: str
    data_root: str | None = None
    split: str | None = None
    setting: Setting = "transductive"
    teacher: str = "gcn"
    methods: tuple[str, ...] = ("mlp", "glnn", "ff-g2m")
    seeds: tuple[int, ...] = (0,)
    teacher_config: TeacherConfig = field(default_factory=TeacherConfig)
    distill_config: DistillConfig = field(default_factory=lambda: DistillConfig(watch_every=10))
    policies: Policies = NO_POLICIES
    others: tuple[str, ...] = ()
    fuse: str = "mean"

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            known = f"expected some of {', '.join(METHODS)}."
            raise UsageError(f"method {unknown[0]!r}: {known}{did_you_mean(unknown[0], METHODS)}")
        if not self.methods or not self.seeds:
            raise UsageError("a comparison needs one method and one seed or more.")
        if len(set(self.methods)) != len(self.methods):
            raise UsageError(f"methods {', '.join(self.methods)}: one is named twice.")
        self.policies.check()
        if self.fuse not in FUSE:
            raise UsageError(f"--fuse {self.fuse!r}: expected one of {', '.join(FUSE)}.")
        inside = [name for name in self.methods if METHODS[name].needs == "model"]
        if inside and self.teacher.startswith("scores:"):
            raise UsageError(
                f"method {inside[0]} looks inside the teacher, and {self.teacher} has logits alone; take a teacher "
                "that is trained here, as gcn, or methods that need logits alone."
            )


def bench(config: BenchConfig, out: str | Path | None = None) -> dict[str, Any]:
    """Run every (seed, method) that is not finished yet.

    Returns:
        dataset, split, setting, seeds, rows (the contract's keys; accuracy as a fraction, at best validation only),
        and asked: how many teachers were trained by this call.

    Raises:
        UsageError: unknown names.
        DataError, TeacherMismatchError: bad data, or a cache of another graph or teacher.
    """
    folder = Path(out) if out is not None else default_folder(config)
    run = Run.create(folder, "graph bench", config)
    asked, done, teachers = 0, [], []
    for seed in track(list(config.seeds), "seeds"):
        task = load(config.dataset, config.data_root, config.split, config.setting, seed)
        teacher = _TeacherOfSeed(task, config, folder, seed)
        others = [_TeacherOfSeed(task, replace(config, teacher=name), folder, seed) for name in config.others]
        done += [_finished(task, teacher, others, method, config, folder) for method in config.methods]
        asked += sum(one.asked for one in (teacher, *others))
        teachers += [teacher, *others]
    rows = [_row(method, config, [one for one in done if one["method"] == method]) for method in config.methods]
    summary: dict[str, Any] = {
        "dataset": config.dataset,
        "split": task.split,
        "setting": config.setting,
        "seeds": list(config.seeds),
        "rows": rows,
        "asked": asked,
        "out": str(folder),
    }
    run.write_table("methods", f"{config.dataset}, {task.split} split, {config.setting}", rows)
    keep_teachers(run, [one.row() for one in teachers])
    write_figures(run, config.dataset, task.metric.replace("_", " "), rows[0]["teacher"], done)
    finish(run, summary)
    return summary


def default_folder(config: BenchConfig) -> Path:
    """A cache folder of the user's, derived from the dataset and protocol: the same line continues, or is answered."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "structkd" / "bench"
    name = "".join(letter if letter.isalnum() else "-" for letter in config.dataset)[-40:]
    key = fingerprint_json([config.dataset, config.data_root, config.split, config.setting, config.teacher])
    return base / f"{name}-{key[:12]}"


class _TeacherOfSeed:
    """The teacher of one seed: trained on first need, otherwise read back from its score cache."""

    def __init__(self, task: GraphTask, config: BenchConfig, folder: Path, seed: int) -> None:
        self.task, self.seed, self.asked, self.reads = task, seed, 0, 0
        self.given = config.teacher.removeprefix("scores:") if config.teacher.startswith("scores:") else None
        self.config = replace(config.teacher_config, model=config.teacher)
        self._scores: scores.NodeScores | None = None
        self._metrics: dict[str, float] = {}
        if self.given is None:
            self.spec = teacher_spec(task, self.config, seed)
            self.key = fingerprint_json([self.spec.fields(), source_version(_HERE)])
            self.folder = folder / "teachers" / self.key[:16]
            self.weights = folder / "weights" / self.key[:16]
        else:
            self.key = open_scores(self.given).spec.fingerprint

    @property
    def logits(self) -> scores.NodeScores:
        """The cached logits."""
        if self._scores is None:
            self._scores, self._metrics = self._given() if self.given is not None else self._cached()
        return self._scores

    @property
    def metrics(self) -> dict[str, float]:
        """valid and test of the teacher."""
        self.logits  # noqa: B018 (fills the metrics)
        return self._metrics

    @property
    def model(self) -> Teacher:
        """The trained teacher itself, for methods that look inside it."""
        self.logits  # noqa: B018 (trains it when it was not yet)
        return load_teacher(self.weights, self.task)

    def row(self) -> dict[str, Any]:
        """For the report: who it is, and how often its cache answered in its place."""
        spec = self.spec if self.given is None else open_scores(self.given).spec
        seconds = self._metrics.get("cpu_seconds", 0.0) * self.asked
        return teacher_row(spec, self.asked, max(0, self.reads - self.asked), seconds, unit="graphs")

    def _given(self) -> tuple[scores.NodeScores, dict[str, float]]:
        assert self.given is not None
        found = read_scores(self.given, self.task)
        seen = self.task.observed
        logits = torch.from_numpy(np.array(found.logits, dtype=np.float32))
        metrics = {"valid": metric_of(logits, seen.y, seen.valid, seen.metric)}
        judged = self.task.test[self.task.observed_rows]  # hidden nodes have no cached logits
        if bool(judged.any()):
            truth = self.task.y[self.task.observed_rows]
            metrics["test"] = metric_of(logits, truth, judged, self.task.metric)
        return found, metrics

    def _cached(self) -> tuple[scores.NodeScores, dict[str, float]]:
        notes = self.folder.with_suffix(".json")
        if not notes.is_file():
            teacher = train_teacher(self.task, self.config, self.seed)
            self.asked += 1
            score_nodes(teacher, self.task, self.folder)
            save_teacher(teacher, self.weights)
            write_json(notes, teacher.metrics)
        return read_scores(self.folder, self.task, self.spec), read_json(notes)


def _finished(
    task: GraphTask,
    teacher: _TeacherOfSeed,
    others: Sequence[_TeacherOfSeed],
    method: str,
    config: BenchConfig,
    folder: Path,
) -> dict[str, Any]:
    """The result of one method on one seed, from its file or computed now."""
    teacher_name = config.teacher if teacher.given is None else "gcn"
    student = replace(config.distill_config, method=method, teacher=teacher_name)
    identity = [
        config_fields(student.resolved(task)), teacher.key, task.seed, task.split_fingerprint, task.fingerprint,
        task.setting, source_version(_HERE), asdict(config.policies), [other.key for other in others], config.fuse,
    ]  # fmt: skip
    path = folder / "results" / f"{fingerprint_json(identity)[:20]}.json"
    if path.is_file():
        found: dict[str, Any] = read_json(path)
        return found
    for one in (teacher, *others):
        one.reads += 1
    inside = METHODS[method].needs == "model" or (config.policies.active and teacher.given is None)
    source = _fused(task, teacher, others, config) if others else teacher.model if inside else teacher.logits
    result = distill(task, source, student, task.seed, policies=config.policies)
    model = teacher.model if teacher.given is None else None
    value = {
        "method": method,
        "seed": task.seed,
        "shown": shown(task, model, teacher.logits, result) if task.seed == config.seeds[0] else {},
        "input_class": result.input_class,
        "target": result.target,
        "metrics": result.metrics,
        "teacher": teacher.metrics,
        "peak_rss_bytes": peak_rss_bytes(),
        "history": [dict(line) for line in result.history],
    }
    write_json(path, value)
    note(f"seed {task.seed} {method}: valid {result.metrics['valid']:.4f} test {result.metrics['test']:.4f}")
    return value


def _fused(
    task: GraphTask, teacher: _TeacherOfSeed, others: Sequence[_TeacherOfSeed], config: BenchConfig
) -> torch.Tensor:
    """Several teachers' logits as one; an aggregator reads their embeddings where all have some of one width."""
    every = (teacher, *others)
    members = [teacher_logits(task, one.logits) for one in every]
    inside: list[torch.Tensor] = []
    if config.fuse == "set-attention" and all(one.given is None and embeds(one.model) for one in every):
        inside = [embed_nodes(one.model, task.observed) for one in every]
        inside = inside if len({found.shape for found in inside}) == 1 else []
    return fuse(task.observed, [member for member in members if member is not None], config.fuse, task.seed, inside)


def _row(method: str, config: BenchConfig, done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the contract: population standard deviation, as the papers print it."""
    tests = [one["metrics"]["test"] for one in done]
    row: dict[str, Any] = {
        "method": method,
        "teacher": ",".join((config.teacher, *config.others)),
        "input_class": done[0]["input_class"],
        "test_mean": float(np.mean(tests)),
        "test_std": float(np.std(tests)),
        "test": tests,
        "valid_mean": _mean(done, "metrics", "valid"),
        "teacher_test_mean": _mean(done, "teacher", "test"),
        "cos_low": _mean(done, "metrics", "cos_low"),
        "cos_high": _mean(done, "metrics", "cos_high"),
        "agreement": _mean(done, "metrics", "agreement"),
        "cpu_seconds": _mean(done, "metrics", "cpu_seconds"),
        "peak_rss_bytes": max(int(one["peak_rss_bytes"]) for one in done),
    }
    if config.policies.active:
        row["policies"] = {key: value for key, value in asdict(config.policies).items() if value != _OFF[key]}
    if METHODS[method].chosen:
        row["target"] = [one["target"] for one in done]
    for key in ("ind", "tran", "prod"):
        if key in done[0]["metrics"]:
            row[f"{key}_mean"] = _mean(done, "metrics", key)
    return row


def _mean(done: Sequence[Mapping[str, Any]], part: str, key: str) -> float | None:
    values = [one[part][key] for one in done if key in one[part]]
    return float(np.mean(values)) if values else None


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
