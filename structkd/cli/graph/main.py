"""structkd graph: teach, score, distill, bench, evaluate, spectrum; export and latency stand in serving."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from cyclopts import App, Parameter

from structkd import graph
from structkd.cli.graph.links import links
from structkd.cli.output import Common, Output, Table
from structkd.errors import UsageError
from structkd.graph.distillation import method_named
from structkd.graph.figures import training_figure
from structkd.graph.storage import load_teacher, save_student, save_teacher
from structkd.report import finish
from structkd.runs import Run
from structkd.scores import NodeScores

app = App(name="graph", help="Node classifiers: graph teachers to MLP students.")
app.command(links)
app.command("structkd.cli.graph.serving:export", name="export")
app.command("structkd.cli.graph.serving:latency", name="latency")

Setting = Literal["transductive", "inductive", "production"]
TeacherFlags = Annotated[graph.TeacherConfig, Parameter(name="*")]
StudentFlags = Annotated[graph.DistillConfig, Parameter(name="*")]
PolicyFlags = Annotated[graph.Policies, Parameter(name="*")]
DatasetFlags = Annotated[graph.DatasetConfig, Parameter(name="*")]


@app.command
def teach(
    *, data: DatasetFlags, out: Path, config: TeacherFlags = graph.TeacherConfig(), common: Common = Common()
) -> Output:
    """Train a graph teacher and keep its weights.

    Parameters
    ----------
    out: run folder.
    """
    task = data.load(common.seed)
    teacher = graph.train_teacher(task, config, common.seed)
    run = Run.create(out, "graph teach", {**vars(data), **teacher.config.identity()}, common.seed, anew=True)
    save_teacher(teacher, out)
    for line in teacher.fit.history if teacher.fit is not None else ():
        run.log(**line)
    if teacher.fit is not None:
        run.write_figure("training", training_figure(teacher.fit.history))
    finish(run, teacher.metrics)
    value = {"run": str(out), "teacher": teacher.config.model, "metrics": teacher.metrics}
    return Output(value, [Table(f"{task.name}, {task.split} split", [teacher.metrics])])


@app.command
def score(*, data: DatasetFlags, teacher: Path, out: Path, common: Common = Common()) -> Output:
    """Write a trained teacher's logits of every node into a score cache.

    Parameters
    ----------
    teacher: folder that `graph teach` wrote.
    out: folder of the score cache.
    """
    task = data.load(common.seed)
    found = graph.score_nodes(load_teacher(teacher, task), task, out)
    nodes, classes = found.logits.shape
    value = {"store": str(out), "nodes": int(nodes), "classes": int(classes), "fingerprint": found.spec.fingerprint}
    return Output(value, lines=[f"{nodes} nodes x {classes} classes in {out}"])


@app.command
def distill(
    *,
    data: DatasetFlags,
    scores: tuple[Path, ...] = (),
    weights: Path | None = None,
    fuse: str = "mean",
    out: Path,
    config: StudentFlags = graph.DistillConfig(watch_every=10),
    policies: PolicyFlags = graph.Policies(),
    common: Common = Common(),
) -> Output:
    """Train an MLP student from cached logits.

    Parameters
    ----------
    scores: score cache of a teacher (not needed for --method mlp); repeat it for several.
    fuse: how several teachers become one: mean, median, z-mean, reciprocal-rank, confidence, router, set-attention.
    weights: folder that `graph teach` wrote, in place of --scores, for methods that look inside the teacher: krd,
        nosmog, tined, g2mlp.
    out: run folder; the student is kept there.
    """
    task, method = data.load(common.seed), method_named(config.method)
    if not scores and weights is None and method.needs != "nothing":
        raise UsageError(f"--method {config.method} needs --scores DIR, a cache that `structkd graph score` wrote.")
    if len(scores) > 1 and weights is None:
        stores = [torch.from_numpy(np.array(graph.read_scores(store, task).logits)) for store in scores]
        teacher: NodeScores | graph.Teacher | torch.Tensor | None = graph.fuse(task.observed, stores, fuse, common.seed)
    else:
        teacher = _teacher(task, scores[0] if scores else None, weights)
    chosen = {**vars(data), **vars(config.resolved(task)), **vars(policies), "fuse": fuse}
    run = Run.create(out, "graph distill", chosen, common.seed, anew=True)
    result = graph.distill(task, teacher, config, common.seed, run, policies=policies)
    save_student(result.student, result.config, out, result.inputs)
    value = {"run": str(out), "method": config.method, "input_class": result.input_class, "target": result.target}
    return Output(value | {"metrics": result.metrics}, [Table(f"{task.name}: {config.method}", [result.metrics])])


@app.command
def bench(
    *,
    data: DatasetFlags,
    teacher: str = "gcn",
    methods: str = "mlp,glnn,ff-g2m",
    seeds: int = 1,
    select: Literal["loss", "metric"] = "loss",
    fuse: str = "mean",
    out: Path | None = None,
    policies: PolicyFlags = graph.Policies(),
    common: Common = Common(),
) -> Output:
    """Compare methods over seeds with one shared teacher per seed; continues where it was interrupted.

    Parameters
    ----------
    teacher: gcn, sage, gat, appnp, gcnii, or scores:DIR or scores:FILE (npz, safetensors, parquet) for logits made
        elsewhere.
        A comma list is several teachers, fused.
    methods: comma list of methods.
    seeds: how many seeds, counted from --seed.
    select: which epoch of a teacher is kept: lowest validation cross-entropy, or best validation metric (published).
    fuse: how several teachers become one: mean, median, z-mean, reciprocal-rank, confidence, router, set-attention.
    out: run folder; by default a cache folder derived from the dataset and protocol.
    """
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected 1 or more.")
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    chosen = tuple(range(common.seed, common.seed + seeds))
    first, *others = [teacher] if teacher.startswith("scores:") else [name.strip() for name in teacher.split(",")]
    config = graph.BenchConfig(
        data.dataset, data.data_root, data.split, data.setting, teacher=first, methods=names, seeds=chosen,
        teacher_config=graph.TeacherConfig(select=select), policies=policies, others=tuple(others), fuse=fuse,
    )  # fmt: skip
    value = graph.bench(config, out)
    title = f"{value['dataset']}, {value['split']} split, {value['setting']}, teacher {teacher}, {seeds} seeds"
    shown = [{key: item for key, item in row.items() if key not in ("test", "teacher")} for row in value["rows"]]
    return Output(value, [Table(title, shown)])


@app.command
def evaluate(*, data: DatasetFlags, model: Path, common: Common = Common()) -> Output:
    """Accuracy of a saved student (or teacher) on the test nodes of its task.

    Parameters
    ----------
    model: folder that `graph distill` or `graph teach` wrote.
    """
    task = data.load(common.seed)
    metrics = graph.evaluate_saved(model, task)
    value = {"dataset": task.name, "split": task.split, "setting": task.setting, "model": str(model), **metrics}
    return Output(value, [Table(f"{task.name}, {task.split} split", [metrics])])


@app.command
def spectrum(
    *,
    data: DatasetFlags,
    scores: Path | None = None,
    weights: Path | None = None,
    methods: str = "glnn,ff-g2m",
    every: int = 5,
    out: Path,
    common: Common = Common(),
) -> Output:
    """How far each band of the teacher reaches the student, epoch by epoch, with plots for `structkd report`.

    Parameters
    ----------
    scores: score cache of a teacher.
    weights: folder that `graph teach` wrote, in place of --scores, for methods that look inside the teacher.
    methods: comma list of methods.
    every: epochs between two points of a curve.
    out: run folder.
    """
    task = data.load(common.seed)
    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    teacher = _teacher(task, scores, weights)
    if teacher is None:
        raise UsageError(
            "graph spectrum needs --scores DIR, a cache that `structkd graph score` wrote, or --weights DIR."
        )
    found = graph.spectrum(task, teacher, names, every=every, seed=common.seed)
    run = Run.create(out, "graph spectrum", {**vars(data), "methods": methods, "every": every}, common.seed, anew=True)
    for name, figure in found.figures().items():
        run.write_figure(name, figure)
    rows = [{"method": name, **metrics} for name, metrics in found.metrics.items()]
    run.write_table("bands", "Agreement with the teacher per band", rows)
    finish(run, {"rows": rows})
    value = {"run": str(out), "curves": found.curves, "energies": found.energies, "rows": rows}
    return Output(value, [Table(f"{task.name}: agreement with the teacher", rows)])


def _teacher(task: graph.GraphTask, store: Path | None, weights: Path | None) -> NodeScores | graph.Teacher | None:
    """The teacher that two flags name: cached logits, or the model itself."""
    if store is not None and weights is not None:
        raise UsageError("give --scores or --weights, not both: the weights make their own logits.")
    if weights is not None:
        return load_teacher(weights, task)
    return graph.read_scores(store, task) if store is not None else None
