import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import graph_losses as slow
from torch.nn.functional import cross_entropy, one_hot

from structkd import graph, scores
from structkd.errors import DataError, MissingScoreError, TeacherMismatchError, UsageError
from structkd.graph.distillation import predict
from structkd.graph.evaluate import accuracy, report, roc_auc
from structkd.graph.methods.lesson import Lesson, Teaching
from structkd.graph.methods.table import METHODS
from structkd.graph.published import FF_G2M, recipe
from structkd.graph.serving.latency import NeighbourhoodTeacher
from structkd.graph.storage import evaluate_saved, load_student, load_teacher, save_student, save_teacher

store_module = importlib.import_module("structkd.scores.store")
bench_module = importlib.import_module("structkd.graph.bench")  # the name graph.bench is the function
DATASET = "sbm:nodes=400,classes=3,degree=6,signal=0.7"
TEACHER = graph.TeacherConfig(hidden=32, epochs=60)
STUDENT = graph.DistillConfig(hidden=32, epochs=60)


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load(DATASET)


@pytest.fixture(scope="module")
def teacher(task) -> graph.Teacher:
    return graph.train_teacher(task, TEACHER)


@pytest.fixture
def store(task, teacher, tmp_path) -> scores.NodeScores:
    return graph.score_nodes(teacher, task, tmp_path / "store")


@pytest.mark.parametrize("method", ["mlp", "glnn", "lfd", "hfd", "ff-g2m"])
def test_each_method_is_its_published_formula(task, teacher, method):
    logits = teacher.logits(task)
    config = replace(STUDENT, method=method, label_weight=0.3, temperature=1.4).resolved(task)
    teaching = METHODS[method].teach(Lesson(task.observed, logits, config, 0))
    student = teaching.student.eval()
    z, rows = predict(student, task.x).double(), logits.double()
    edges = [(int(i), int(j)) for i, j in task.edge_index.T]
    labels = float(cross_entropy(z[task.train], task.y[task.train]))
    parts = {
        "glnn": lambda: slow.node_divergence(z.tolist(), rows.tolist()),
        "lfd": lambda: slow.low_frequency(z.tolist(), rows.tolist(), edges, task.num_nodes),
        "hfd": lambda: slow.high_frequency(z.tolist(), rows.tolist(), edges, 1.4),
    }
    parts["ff-g2m"] = lambda: parts["lfd"]() + parts["hfd"]()
    expected = labels if method == "mlp" else 0.3 * labels + 0.7 * parts[method]()
    loss = teaching.loss_of(1).detach()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_a_distilled_student_beats_plain_mlp(task, store):
    plain = graph.distill(task, store, replace(STUDENT, method="mlp"))
    ours = graph.distill(task, store, replace(STUDENT, method="ff-g2m"))
    assert ours.metrics["test"] > plain.metrics["test"] + 0.03
    assert ours.metrics["cos_low"] > plain.metrics["cos_low"]
    assert ours.input_class == "graph_free"
    logits = ours.student(task.x)
    assert ours.metrics["test"] == accuracy(logits, task.y, task.test)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_rival_that_validation_clearly_prefers_takes_the_place(task, store, monkeypatch, tmp_path, swapped):
    """The default method falls back on GLNN or FF-G2M where its own student is clearly worse on validation nodes."""
    own, good = METHODS["structkd"], METHODS["ff-g2m"]
    names = ("untaught", "ff-g2m") if not swapped else ("ff-g2m", "untaught")

    def untaught(lesson):
        student = lesson.student()
        return Teaching(student, lambda _: 0 * sum(p.sum() for p in student.parameters()))

    monkeypatch.setitem(METHODS, "untaught", replace(good, teach=untaught))
    monkeypatch.setitem(METHODS, "structkd", replace(own, teach=METHODS[names[0]].teach, rivals=(names[1],)))
    found = graph.distill(task, store, replace(STUDENT, method="structkd", hidden=24))
    best = graph.distill(task, store, replace(STUDENT, method="ff-g2m", hidden=24))
    assert found.metrics["valid"] == (
        pytest.approx(best.metrics["valid"], abs=0.05) if swapped else best.metrics["valid"]
    )
    assert found.target == ("ff-g2m on validation" if not swapped else "teacher")
    assert found.metrics["cpu_seconds"] > 0
    assert found.config.method == "structkd"
    save_student(found.student, found.config, tmp_path / "kept", found.inputs)
    again = load_student(tmp_path / "kept")
    torch.testing.assert_close(predict(again, task.x), predict(found.student, task.x))


def test_rivals_are_compared_with_the_answers_that_the_method_says(task, store, monkeypatch):
    """Class shares cost validation accuracy where the validation set is drawn by class: they are taken out first."""
    labels = one_hot(task.observed.y.clamp_min(0), task.classes).float()

    def untaught(lesson):
        student = lesson.student()
        nothing = lambda _: 0 * sum(p.sum() for p in student.parameters())  # noqa: E731
        return Teaching(student, nothing, comparable=lambda _: labels)

    monkeypatch.setitem(METHODS, "structkd", replace(METHODS["structkd"], teach=untaught, rivals=("ff-g2m",)))
    assert graph.distill(task, store, replace(STUDENT, method="structkd")).target == "teacher"


def test_same_seed_same_student(task, store):
    one, two, three = (graph.distill(task, store, replace(STUDENT, epochs=5), seed) for seed in (0, 0, 1))
    assert torch.equal(one.student(task.x), two.student(task.x))
    assert not torch.equal(one.student(task.x), three.student(task.x))


def test_no_figure_but_the_one_at_best_validation(task, store):
    result = graph.distill(task, store, replace(STUDENT, epochs=5))
    assert set(result.metrics) == {
        "valid", "test", "cos_low", "cos_high", "error_low", "error_high", "agreement", "epochs", "cpu_seconds"
    }  # fmt: skip
    assert all(set(line) == {"step", "loss", "valid"} for line in result.history)


@pytest.mark.parametrize("setting", ["inductive", "production"])
def test_hidden_content_cannot_change_training(setting):
    """Rewrite every hidden feature, edge and test label: teacher, targets and student stay bit for bit the same."""
    task = graph.load(DATASET, setting=setting)
    x = task.x.clone()
    x[task.hidden] = 99.0
    touched = task.hidden[task.edge_index].any(dim=0)
    y = torch.where(task.test, (task.y + 1) % 3, task.y)
    poisoned = replace(task, x=x, y=y, edge_index=task.edge_index[:, ~touched])
    teachers = [graph.train_teacher(one, TEACHER) for one in (task, poisoned)]
    logits = [one.logits(t.observed) for one, t in zip(teachers, (task, poisoned), strict=True)]
    assert torch.equal(*logits)
    students = [graph.distill(t, logits[0], replace(STUDENT, epochs=10)).student for t in (task, poisoned)]
    probe = task.observed.x
    assert torch.equal(students[0](probe), students[1](probe))
    assert teachers[0].metrics["test"] != teachers[1].metrics["test"]  # the poison does show where it may


def test_production_is_a_fifth_inductive():
    task = graph.load(DATASET, setting="production")
    logits = torch.randn(task.num_nodes, 3, generator=torch.Generator().manual_seed(0))
    found = report(task, logits)
    assert found["prod"] == pytest.approx(0.2 * found["ind"] + 0.8 * found["tran"])
    assert found["ind"] == accuracy(logits, task.y, task.hidden)
    assert set(report(graph.load(DATASET), logits)) == {"test"}
    assert set(report(graph.load(DATASET, setting="inductive"), logits)) == {"test", "ind"}


def test_roc_auc_equals_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 5, (200, 2), generator=generator).float()  # many ties
    labels = torch.randint(0, 2, (200,), generator=generator)
    mask = torch.rand(200, generator=generator) < 0.7
    expected = roc_auc_score(labels[mask], (logits[:, 1] - logits[:, 0])[mask])
    assert roc_auc(logits, labels, mask) == pytest.approx(expected)
    with pytest.raises(DataError, match=r"needs 2 classes; found 3"):
        roc_auc(torch.ones(3, 3), torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"nodes of one class"):
        roc_auc(torch.ones(3, 2), torch.tensor([1, 1, 1]), torch.ones(3, dtype=torch.bool))


def test_scores_come_back_as_written(task, teacher, store, tmp_path):
    again = graph.score_nodes(teacher, task, tmp_path / "store")
    np.testing.assert_array_equal(np.asarray(again.logits), teacher.logits(task).numpy())
    assert store.graph_fingerprint == task.fingerprint


def test_another_teacher_is_refused(task, teacher, store, tmp_path):
    other = replace(teacher, seed=5)
    with pytest.raises(TeacherMismatchError, match=r"extra\.seed"):
        graph.score_nodes(other, task, tmp_path / "store")
    with pytest.raises(TeacherMismatchError, match=r"split"):
        graph.score_nodes(teacher, graph.load("sbm:nodes=400", seed=3), tmp_path / "other")


def test_another_node_order_is_refused(task, store):
    from structkd.graph.data.task import subgraph

    order = torch.arange(task.num_nodes).flip(0)
    with pytest.raises(DataError, match=r"other edges, features or node order"):
        graph.distill(subgraph(task, order), store, STUDENT)


def test_a_wrong_number_of_nodes_is_refused(store):
    with pytest.raises(DataError, match=r"cached logits have shape \(400, 3\); .* has 300 observed nodes"):
        graph.distill(graph.load("sbm:nodes=300,classes=3"), store, STUDENT)


def test_usage_errors(task):
    with pytest.raises(UsageError, match=r"method 'magic': expected one of mlp, glnn"):
        graph.distill(task, None, replace(STUDENT, method="magic"))
    with pytest.raises(UsageError, match=r"method glnn needs teacher scores"):
        graph.distill(task, None, replace(STUDENT, method="glnn"))
    with pytest.raises(UsageError, match=r"teacher logits of shape \(3, 3\)"):
        graph.distill(task, torch.ones(3, 3), STUDENT)
    with pytest.raises(UsageError, match=r"one is named twice"):
        graph.BenchConfig(DATASET, methods=("mlp", "mlp"))


def test_published_rows():
    assert recipe("planetoid:Cora", "public", "gcn") == FF_G2M["cora", "gcn"]
    row = FF_G2M["cora", "sage"]
    assert (row.layers, row.hidden, row.teacher_dropout, row.student_dropout) == (3, 512, 0.3, 0.4)
    assert (row.temperature, row.label_weight) == (1.3, 0.5)
    assert FF_G2M["photo", "gcn"].learning_rate == 0.001
    assert FF_G2M["photo", "gcn"].teacher_learning_rate == 0.01
    assert recipe("npz:cora", "cpf", "sage").weight_decay == 0.005


def config(**changes) -> graph.BenchConfig:
    values = {"methods": ("mlp", "ff-g2m"), "seeds": (0, 1), "teacher_config": TEACHER, "distill_config": STUDENT}
    return graph.BenchConfig(DATASET, **(values | changes))


ROW = {
    "method", "teacher", "input_class", "test_mean", "test_std", "test", "valid_mean", "teacher_test_mean", "cos_low",
    "cos_high", "agreement", "cpu_seconds", "peak_rss_bytes",
}  # fmt: skip


def test_bench_keeps_the_contract_and_asks_no_teacher_twice(tmp_path, monkeypatch):
    first = graph.bench(config(), tmp_path)
    assert {"dataset", "split", "setting", "seeds", "rows"} <= set(first)
    assert [row["method"] for row in first["rows"]] == ["mlp", "ff-g2m"]
    for row in first["rows"]:
        assert set(row) == ROW
        assert row["test_mean"] == pytest.approx(np.mean(row["test"]))
        assert row["test_std"] == pytest.approx(np.std(row["test"]))
        assert len(row["test"]) == 2
    assert first["asked"] == 2
    json.dumps(first, allow_nan=False)

    def refuse(*_):
        raise AssertionError("a teacher was asked")

    monkeypatch.setattr(bench_module, "train_teacher", refuse)
    again = graph.bench(config(), tmp_path)
    assert again["rows"] == first["rows"]
    assert again["asked"] == 0
    more = graph.bench(config(methods=("mlp", "glnn")), tmp_path)  # a new method reads the cached logits
    assert more["rows"][0] == first["rows"][0]
    assert more["asked"] == 0


def test_bench_continues_after_an_interruption(tmp_path, monkeypatch):
    whole = graph.bench(config(), tmp_path / "whole")
    real, calls = bench_module.distill, []

    def breaking(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(bench_module, "distill", breaking)
    with pytest.raises(KeyboardInterrupt):
        graph.bench(config(), tmp_path / "cut")
    rows = graph.bench(config(), tmp_path / "cut")["rows"]
    assert len(calls) == 5  # two finished before the cut, one cut, two after
    assert [row["test"] for row in rows] == [row["test"] for row in whole["rows"]]


@pytest.mark.parametrize("kept", [0, 1], ids=["nothing", "the first block"])
def test_a_cache_that_a_kill_left_half_written_is_completed(task, teacher, tmp_path, monkeypatch, kept):
    """kill -9 between a store's birth and its last block: the same line runs again as if nothing had happened."""
    spec, logits = graph.teacher_spec(task, teacher.config, teacher.seed), teacher.logits(task).numpy()
    monkeypatch.setattr(store_module, "NODE_UNIT_ROWS", 64)
    log = store_module.RowLog.open(tmp_path, spec, task.observed.fingerprint, *logits.shape)
    for low, high in log.plan(64)[:kept]:
        log.commit(low, logits[low:high], None)
    with pytest.raises(MissingScoreError):
        graph.read_scores(tmp_path, task, spec)
    found = graph.score_nodes(teacher, task, tmp_path)
    np.testing.assert_array_equal(np.array(found.logits), logits)


def test_bench_refuses_a_foreign_cache(tmp_path):
    graph.bench(config(seeds=(0,)), tmp_path)
    (cache,) = [path for path in (tmp_path / "teachers").iterdir() if path.is_dir()]
    other = graph.load(DATASET, seed=8)
    wrong = graph.train_teacher(other, TEACHER)
    import shutil

    shutil.rmtree(cache)
    graph.score_nodes(wrong, other, cache)
    with pytest.raises(TeacherMismatchError, match=r"extra\."):
        graph.bench(config(seeds=(0,), methods=("lfd",)), tmp_path)


def test_bench_in_production_adds_three_means(tmp_path):
    found = graph.bench(config(setting="production", seeds=(0,)), tmp_path)
    row = found["rows"][1]
    assert set(row) == ROW | {"ind_mean", "tran_mean", "prod_mean"}
    assert row["prod_mean"] == pytest.approx(0.2 * row["ind_mean"] + 0.8 * row["tran_mean"])


def test_bench_with_logits_made_elsewhere(task, store, tmp_path):
    found = graph.bench(config(seeds=(0,), teacher=f"scores:{store.folder}"), tmp_path / "out")
    assert found["asked"] == 0
    expected = accuracy(torch.from_numpy(np.array(store.logits)), task.y, task.test)
    assert found["rows"][0]["teacher_test_mean"] == pytest.approx(expected)


@pytest.mark.parametrize("model", ["gcn", "gat", "appnp"])
def test_a_teacher_answers_from_the_neighbourhood_as_from_the_whole(task, model):
    trained = graph.train_teacher(task, replace(TEACHER, model=model, epochs=3))
    rows = torch.tensor([7, 3, 250])
    near = NeighbourhoodTeacher(trained, task)
    torch.testing.assert_close(near.logits(rows), trained.logits(task)[rows], atol=1e-5, rtol=1e-4)


def test_latency_rows(task, teacher):
    student = graph.distill(task, None, replace(STUDENT, method="mlp", epochs=2)).student
    found = graph.latency(task, teacher, student, (1, 5), repeats=4)
    assert [(row["model"], row["batch"]) for row in found.rows] == [("gcn", 1), ("mlp", 1), ("gcn", 5), ("mlp", 5)]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in found.rows)
    assert found.speedup == pytest.approx(found.rows[2]["p50_ms"] / found.rows[3]["p50_ms"])
    assert found.rows[3]["nodes_per_second"] == pytest.approx(5 / found.rows[3]["p50_ms"] * 1e3)
    with pytest.raises(UsageError, match=r"batches \(0,\)"):
        graph.latency(task, teacher, student, (0,))


def test_spectrum_curves(task, store, tmp_path):
    found = graph.spectrum(task, store, ("glnn", "ff-g2m"), STUDENT, every=10)
    for curve in found.curves.values():
        assert curve["step"][:2] == [1, 10]
        assert curve["cos_low"][-1] > curve["cos_low"][0]
    assert set(found.energies) == {"teacher", "glnn", "ff-g2m"}
    assert all(sum(shares) == pytest.approx(1, abs=0.02) for shares in found.energies.values())
    assert set(found.figures()) == {"band-agreement", "band-energy"}
    with pytest.raises(UsageError, match=r"spectrum of 0 methods"):
        graph.spectrum(task, store, ())


def test_saved_models_answer_the_same(task, teacher, store, tmp_path):
    save_teacher(teacher, tmp_path / "t")
    again = load_teacher(tmp_path / "t", task)
    assert torch.equal(again.logits(task), teacher.logits(task))
    assert (again.config, again.seed) == (teacher.config, teacher.seed)
    result = graph.distill(task, store, replace(STUDENT, epochs=3))
    save_student(result.student, result.config, tmp_path / "s")
    assert torch.equal(load_student(tmp_path / "s")(task.x), result.student(task.x))
    assert evaluate_saved(tmp_path / "s", task) == {"test": result.metrics["test"]}
    assert evaluate_saved(tmp_path / "t", task)["test"] == teacher.metrics["test"]
    with pytest.raises(DataError, match=r"holds a teacher; expected a student"):
        load_student(tmp_path / "t")
    with pytest.raises(DataError, match=r"the weights do not fit"):
        load_teacher(tmp_path / "t", graph.load("digits"))
    with pytest.raises(DataError, match=r"a student of 32 features and 3 classes; digits has 64 and 10"):
        evaluate_saved(tmp_path / "s", graph.load("digits"))
    (tmp_path / "s" / "weights.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"not whole weights"):
        load_student(tmp_path / "s")


def test_run_folder_keeps_the_curves(task, store, tmp_path):
    from structkd.runs import Run

    run = Run.create(tmp_path / "run", "graph distill", seed=0)
    result = graph.distill(task, store, replace(STUDENT, epochs=4, watch_every=2), run=run)
    lines = Run.open(tmp_path / "run").metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "cos_high" in lines[1]
    assert Run.open(tmp_path / "run").info["summary"]["test"] == result.metrics["test"]


def test_cora_smoke(real_data, tmp_path):
    """Few epochs on real data: the order MLP < FF-G2M already shows."""
    small = replace(STUDENT, hidden=64, layers=2, epochs=30)
    found = graph.bench(
        graph.BenchConfig(
            "planetoid:Cora", str(real_data / "graph"), teacher_config=replace(TEACHER, hidden=64, layers=2, epochs=40),
            distill_config=small, methods=("mlp", "ff-g2m"),
        ),
        tmp_path,
    )  # fmt: skip
    mlp, ours = found["rows"]
    assert mlp["teacher_test_mean"] > 0.75
    assert ours["test_mean"] > mlp["test_mean"] + 0.05
    assert not list(Path(real_data / "graph" / "Planetoid" / "Cora").glob("processed"))
