"""Every policy of the graph half: its limit, its budget, what is saved, and what it refuses."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from structkd import graph, objectives
from structkd.cli.app import run
from structkd.errors import UsageError
from structkd.graph.data.task import subgraph
from structkd.graph.methods.lesson import Lesson
from structkd.graph.methods.table import METHODS
from structkd.graph.models.embeddings import embed_nodes
from structkd.graph.models.heads import HeadedMlp
from structkd.graph.models.networks import Mlp
from structkd.graph.policies.flags import Policies
from structkd.graph.policies.lesson import PolicyLesson
from structkd.graph.storage import load_student, save_student
from structkd.graph.targets import fusing
from structkd.graph.targets.fusing import FUSE, fuse

DATASET = "sbm:nodes=250,classes=3,degree=6,signal=0.9"
STUDENT = graph.DistillConfig(hidden=16, layers=2, dropout=0.0, epochs=4, label_weight=0.3)

EVERY = [
    Policies(objective="kl:1.0,plackett-luce:0.5"),
    Policies(target="taid"),
    Policies(target="truncate:2"),
    Policies(target="mixup"),
    Policies(target="lelp:2"),
    Policies(target="rank"),
    Policies(target="standardise", objective_temperature=2.0),
    *[Policies(sample_weight=name) for name in ("confidence", "certainty", "margin", "bd-kd", "tgeo")],
    *[
        Policies(representation=name)
        for name in ("mi-alpha", "mi-alpha:0.5", "infonce", "similarity-preserving", "affinity-kl", "feature-mse")
    ],
    Policies(head="dual"),
    Policies(head="dual", objective="reverse-kl", acquire="margin", budget=0.5),
    *[Policies(acquire=name, budget=0.25) for name in ("random", "margin", "rad")],
    Policies(keep="agreement:0.4"),
    Policies(domains="degree:3"),
    Policies(domains="class"),
]


@pytest.fixture(scope="module")
def task() -> graph.GraphTask:
    return graph.load(DATASET)


@pytest.fixture(scope="module")
def teacher(task) -> graph.Teacher:
    return graph.train_teacher(task, graph.TeacherConfig(hidden=16, epochs=60))


def policy(task, teacher, policies: Policies, method: str = "ff-g2m", **changes) -> PolicyLesson:
    config = replace(STUDENT, method=method, **changes).resolved(task)
    return PolicyLesson(Lesson(task.observed, teacher.logits(task), config, 0, teacher), METHODS[method], policies)


@pytest.mark.parametrize("policies", EVERY, ids=range(len(EVERY)))
def test_each_is_one_flag_and_trains(task, teacher, policies):
    for method in ("ff-g2m", "mlp"):
        result = graph.distill(task, teacher, replace(STUDENT, method=method), policies=policies)
        assert np.isfinite([line["loss"] for line in result.history]).all()
    again = graph.distill(task, teacher, replace(STUDENT, method="mlp"), policies=policies)
    assert torch.equal(result.student(task.x), again.student(task.x))


def test_students_learn_what_the_policies_ask_for(task, teacher):
    long = replace(STUDENT, method="mlp", epochs=60)
    plain = graph.distill(task, teacher, long).metrics["test"]
    for policies in (
        Policies(target="taid"),
        Policies(head="dual"),
        Policies(target="lelp:2"),
        Policies(domains="class"),
    ):
        assert graph.distill(task, teacher, long, policies=policies).metrics["test"] > plain


def test_objective_stands_beside_the_methods_terms(task, teacher):
    """loss = lambda CE + (1 - lambda) (method's terms + objective), without dropout to the last digit."""
    own, plain = (
        policy(task, teacher, Policies(objective="reverse-kl")),
        policy(task, teacher, Policies(objective="kl")),
    )
    with torch.no_grad():
        scores, logits = own.student(task.x), teacher.logits(task)
        expected = {name: 0.7 * objectives.OBJECTIVES[name](scores, logits) for name in ("kl", "reverse-kl")}
        torch.testing.assert_close(
            own.loss(1) - plain.loss(1), expected["reverse-kl"] - expected["kl"], rtol=1e-4, atol=1e-5
        )
        alone = policy(task, teacher, Policies(objective="kl"), method="mlp")
        labels = torch.nn.functional.cross_entropy(scores[task.train], task.y[task.train])
        torch.testing.assert_close(alone.loss(1), 0.3 * labels + expected["kl"], rtol=1e-4, atol=1e-5)


def test_kl_alone_is_glnn(task, teacher):
    alone = policy(task, teacher, Policies(objective="kl"), method="mlp")
    glnn = METHODS["glnn"].teach(alone.lesson)
    with torch.no_grad():
        torch.testing.assert_close(alone.loss(1), glnn.loss_of(1), rtol=1e-5, atol=1e-6)


def test_taid_at_its_end_is_kl_and_at_zero_asks_for_nothing(task, teacher):
    at_end = policy(task, teacher, Policies(target="taid:1"), method="mlp")
    plain = policy(task, teacher, Policies(objective="kl"), method="mlp")
    at_zero = policy(task, teacher, Policies(target="taid:0"), method="mlp", label_weight=0.0)
    with torch.no_grad():
        torch.testing.assert_close(at_end.loss(1), plain.loss(1))
    at_zero.loss(1).backward()
    assert all(float(p.grad.abs().max()) < 1e-6 for p in at_zero.student.parameters())


@pytest.mark.parametrize("name", ["random", "margin", "rad"])
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
def test_the_budget_is_kept_to_the_node(task, teacher, name, budget):
    found = policy(task, teacher, Policies(acquire=name, budget=budget))
    assert len(found.asked) == round(budget * task.num_nodes)
    assert len(set(found.asked.tolist())) == len(found.asked)


def test_answers_that_were_not_asked_for_are_never_read(task, teacher):
    """Other logits at the nodes left out change nothing: not the loss, not its gradient."""
    logits = teacher.logits(task)
    config = replace(STUDENT, method="ff-g2m").resolved(task)
    chosen = Policies(acquire="margin", budget=0.3, objective="kl")
    first = PolicyLesson(Lesson(task.observed, logits, config, 0), METHODS["ff-g2m"], chosen)
    other = logits.clone()
    unasked = torch.ones(task.num_nodes, dtype=torch.bool)
    unasked[first.asked] = False
    other[unasked] = 1e3 * torch.randn(int(unasked.sum()), task.classes)
    second = PolicyLesson(Lesson(task.observed, other, config, 0), METHODS["ff-g2m"], chosen)
    assert torch.equal(first.asked, second.asked)
    with torch.no_grad():
        assert torch.equal(first.loss(1), second.loss(1))


def test_whole_budget_is_the_plain_method(task, teacher):
    """Asked about every node, the loss is the method's own: labels, low and high band."""
    found = policy(task, teacher, Policies(acquire="random", budget=1.0))
    own = METHODS["ff-g2m"].teach(found.lesson)
    with torch.no_grad():
        torch.testing.assert_close(found.loss(1), own.loss_of(1))
    part = policy(task, teacher, Policies(acquire="random", budget=0.5))
    assert part.base is not None
    seen = subgraph(task.observed, part.asked)
    logits = teacher.logits(task)[part.asked]
    lesson = replace(part.lesson, seen=seen, logits=logits, config=replace(part.lesson.config, label_weight=0.0))
    with torch.no_grad():
        labels = torch.nn.functional.cross_entropy(part.student(task.x)[task.train], task.y[task.train])
        terms = METHODS["ff-g2m"].teach(lesson).loss_of(1)
        torch.testing.assert_close(part.loss(1), 0.3 * labels + 0.7 * terms)


def test_dual_heads_learn_from_their_own_side(task, teacher):
    found = policy(task, teacher, Policies(head="dual"))
    weight = found.student.layers[-1].weight
    (gradient,) = torch.autograd.grad(found.loss(1), weight)
    blank = replace(
        found.lesson,
        logits=torch.zeros(task.num_nodes, task.classes),
        config=replace(STUDENT, method="mlp").resolved(task),
    )
    alone = PolicyLesson(blank, METHODS["mlp"], Policies(head="dual"))
    (other,) = torch.autograd.grad(alone.loss(1), alone.student.layers[-1].weight)
    torch.testing.assert_close(gradient[:, : task.classes], other[:, : task.classes])  # labels alone
    assert not torch.allclose(gradient[:, task.classes :], other[:, task.classes :])


@pytest.mark.parametrize("policies", [Policies(head="dual"), Policies(target="lelp:2")], ids=["dual", "lelp"])
def test_headed_students_are_saved_and_read_back(task, teacher, policies, tmp_path):
    result = graph.distill(task, teacher, STUDENT, policies=policies)
    assert isinstance(result.student, HeadedMlp)
    save_student(result.student, result.config, tmp_path)
    again = load_student(tmp_path)
    assert torch.equal(again(task.x), result.student(task.x))
    assert graph.evaluate_saved(tmp_path, task)["test"] == result.metrics["test"]
    assert result.student(task.x).shape == (task.num_nodes, task.classes)


def test_mixed_inputs_are_the_mixture_of_features(task, teacher):
    found = policy(task, teacher, Policies(target="mixup"), method="mlp")
    assert found.term is not None
    generator = found.term.generator
    state = generator.bit_generator.state
    with torch.no_grad():
        scores, wanted = found.term.mixed(found.student, found.x)
        generator.bit_generator.state = state
        mixing = objectives.targets.interpolation(task.num_nodes, generator=generator)
        x = task.x if isinstance(task.x, torch.Tensor) else task.x.dense()
        torch.testing.assert_close(scores, found.student(mixing.mix(x)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wanted, mixing.mix_targets(teacher.logits(task)))


def test_lelp_on_a_binary_heterophilous_graph(real_data):
    """Two classes, neighbours unlike each other: the subclass targets add up to the teacher, and a student learns."""
    mines = graph.load("heterophilous:minesweeper", root=real_data / "graph")
    taught = graph.train_teacher(mines, graph.TeacherConfig(model="sage", hidden=16, layers=2, epochs=15))
    found = policy(mines, taught, Policies(target="lelp:2"), method="mlp")
    assert found.term is not None
    split = found.term.taught.exp().reshape(mines.num_nodes, 2, 2)
    torch.testing.assert_close(split.sum(-1), taught.logits(mines).softmax(-1), rtol=1e-4, atol=1e-5)
    assert float(split.std(-1).mean()) > 0.01  # the split says more than the classes do
    short = replace(STUDENT, method="mlp", epochs=15)
    result = graph.distill(mines, taught, short, policies=Policies(target="lelp:2"))
    assert result.metrics["test"] > 0.5  # area under the curve


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_embeddings_are_what_the_last_layer_reads(task, model):
    taught = graph.train_teacher(task, graph.TeacherConfig(model=model, hidden=16, layers=3, epochs=5))
    last = taught.model.layers[-1]
    torch.testing.assert_close(
        embed_nodes(taught, task) @ last.weight + last.bias, taught.logits(task), rtol=1e-4, atol=1e-5
    )


def test_domain_shares_follow_the_gaps(task, teacher):
    found = policy(task, teacher, Policies(domains="degree:3"), method="mlp")
    domains = found.domains
    assert domains is not None
    np.testing.assert_allclose(domains.shares, 1 / len(domains.shares))
    for epoch in (1, 2, 11, 21):
        found.loss(epoch)
        assert domains.shares.sum() == pytest.approx(1)
    assert (domains.shares >= 0.5 / len(domains.shares) - 1e-12).all()
    assert not np.allclose(domains.shares, domains.shares[0])
    assert float(domains.weights(found.asked).mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("method", ["ff-g2m", "mlp"])
@pytest.mark.parametrize(
    "policies",
    [Policies(objective="kl"), Policies(representation="infonce"), Policies(head="dual"), Policies(target="lelp:2")],
    ids=["objective", "representation", "dual", "lelp"],
)
def test_one_pass_serves_the_method_and_what_stands_beside_it(task, teacher, policies, method):
    found = policy(task, teacher, policies, method, dropout=0.5)
    passes = []
    found.student.layers[0].register_forward_hook(lambda module, read, written: passes.append(len(written)))
    found.loss(1).backward()
    assert passes == [task.num_nodes]
    found.finish()
    assert not found.student.layers[-1]._forward_hooks


def test_terms_meet_the_same_dropout(task, teacher):
    """With dropout too: loss = the method's own + the objective, of one and the same draw."""
    found = policy(task, teacher, Policies(objective="reverse-kl"), dropout=0.5)
    own = METHODS["ff-g2m"].teach(found.lesson)
    with torch.no_grad():
        torch.manual_seed(1)
        together = found.loss(1)
        torch.manual_seed(1)
        alone = own.loss_of(1)
        torch.manual_seed(1)
        found.student.train()
        term = objectives.reverse_kl(found.student(found.x), teacher.logits(task))
    torch.testing.assert_close(together, alone + 0.7 * term)


@pytest.mark.parametrize("rule", FUSE)
def test_several_teachers_become_one(task, teacher, rule, monkeypatch):
    monkeypatch.setattr(fusing, "_STEPS", 40)
    other = graph.train_teacher(task, graph.TeacherConfig(model="sage", hidden=16, epochs=60)).logits(task)
    logits = teacher.logits(task)
    assert fuse(task.observed, [logits], rule, 0) is logits
    found = fuse(task.observed, [logits, other], rule, 0)
    assert found.shape == logits.shape
    if rule != "set-attention":  # it learns from few labels, here in few steps
        assert float((found.argmax(1) == task.y)[task.test].double().mean()) > 0.6
    swapped = fuse(task.observed, [other, logits], rule, 0)
    if rule not in ("router", "set-attention"):  # a gate's first weights, and dropout, know the places
        torch.testing.assert_close(found, swapped, rtol=1e-3, atol=1e-3)
    assert found.isfinite().all()
    assert float(found.softmax(1).max(1).values.mean()) > 0.45  # a target that prefers something; uniform is 1/3
    if rule in ("mean", "median", "confidence", "router"):
        torch.testing.assert_close(fuse(task.observed, [logits, logits], rule, 0), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("policies", "method", "message"),
    [
        (Policies(objective="nothing"), "mlp", "objective 'nothing'"),
        (Policies(target="taid", objective="margin-mse"), "mlp", "--target taid needs soft-max objectives"),
        (Policies(target="taid:x"), "mlp", "--target 'taid:x'"),
        (Policies(target="rank:2"), "mlp", "expected rank alone"),
        (Policies(target="taid:1.5"), "mlp", "expected taid:NUMBER, a number from 0 to 1"),
        (Policies(target="lelp:0"), "mlp", "expected lelp:NUMBER, a whole number from 1"),
        (Policies(target="truncate:2.5"), "mlp", "expected truncate:NUMBER, a whole number from 2"),
        (Policies(acquire="rad:-1"), "mlp", "expected rad:NUMBER, a number from 0"),
        (Policies(domains="degree:1"), "mlp", "expected degree:NUMBER, a whole number from 2"),
        (Policies(representation="mi-alpha:inf"), "mlp", "expected mi-alpha:NUMBER, a number from 0 to 1"),
        (Policies(sample_weight="loud"), "mlp", "--sample-weight 'loud'"),
        (Policies(sample_weight="bd-kd", objective="listnet"), "mlp", "add --objective kl"),
        (Policies(sample_weight="tgeo", head="dual"), "mlp", "--sample-weight tgeo"),
        (Policies(head="dual", target="mixup"), "mlp", "both change the student's outputs"),
        (Policies(budget=0.5), "mlp", "--budget needs --acquire"),
        (Policies(budget=0.0, acquire="random"), "mlp", "--budget 0.0"),
        (Policies(acquire="loudest"), "mlp", "--acquire 'loudest'"),
        (Policies(keep="agreement:1.0"), "mlp", "no answer of the teacher is left"),
        (Policies(domains="colour"), "mlp", "--domains 'colour'"),
        (Policies(representation="nothing"), "mlp", "--representation 'nothing'"),
        (Policies(head="dual"), "structkd", "method structkd prepares inputs or targets"),
    ],
)
def test_what_does_not_fit_is_refused(task, teacher, policies, method, message):
    with pytest.raises(UsageError, match=message):
        graph.distill(task, teacher, replace(STUDENT, method=method, epochs=2), policies=policies)


def test_what_the_teacher_cannot_give_is_refused(task, teacher):
    logits = teacher.logits(task)
    with pytest.raises(UsageError, match="logits alone were given"):
        graph.distill(task, logits, STUDENT, policies=Policies(target="lelp"))
    with pytest.raises(UsageError, match="policies change what is learned"):
        graph.distill(task, None, replace(STUDENT, method="mlp"), policies=Policies(objective="kl"))
    with pytest.raises(UsageError, match="--fuse 'loudest'"):
        fuse(task.observed, [logits], "loudest", 0)
    with pytest.raises(UsageError, match="same nodes and classes"):
        fuse(task.observed, [logits, logits[:, :2]], "mean", 0)
    with pytest.raises(UsageError, match="two outputs per class"):
        HeadedMlp(4, 8, 3, head="dual", per_class=3)
    one_layer = replace(STUDENT, method="mlp", layers=1)
    with pytest.raises(UsageError, match="one layer"):
        graph.distill(task, teacher, one_layer, policies=Policies(representation="infonce"))
    assert type(graph.distill(task, teacher, one_layer, policies=Policies(objective="kl")).student) is Mlp


def test_a_bench_switches_them_on(tmp_path, monkeypatch):
    """Policies and several teachers in one comparison; finished cells are kept apart from those without."""
    short = {"teacher_config": graph.TeacherConfig(hidden=8, epochs=4), "distill_config": replace(STUDENT, epochs=3)}
    plain = graph.BenchConfig(DATASET, methods=("glnn",), **short)
    chosen = replace(plain, policies=Policies(objective="plackett-luce", acquire="margin", budget=0.5))
    first, second = graph.bench(plain, tmp_path), graph.bench(chosen, tmp_path)
    assert first["rows"][0]["test"] != second["rows"][0]["test"]
    assert second["rows"][0]["policies"] == {"objective": "plackett-luce", "acquire": "margin", "budget": 0.5}
    assert (first["asked"], second["asked"]) == (1, 0)  # one teacher serves both
    both = graph.bench(replace(plain, others=("sage",), fuse="confidence"), tmp_path)
    assert (both["rows"][0]["teacher"], both["asked"]) == ("gcn,sage", 1)
    read = []
    monkeypatch.setattr(sys.modules["structkd.graph.bench"], "fuse", lambda *args: read.append(args[4]) or fuse(*args))
    graph.bench(replace(plain, others=("sage",), fuse="set-attention"), tmp_path)
    assert [part.shape for part in read[0]] == [(250, 8), (250, 8)]  # embeddings, not probabilities of 3 classes
    with pytest.raises(UsageError, match="--fuse"):
        replace(plain, fuse="loudest")


def test_flags_reach_the_commands(capsys):
    line = ["graph", "bench", "--dataset", DATASET, "--objective", "kl", "--target", "taid:0.2", "--sample-weight"]
    line += ["bd-kd", "--head", "single", "--acquire", "rad", "--budget", "0.25", "--fuse", "router", "--teacher"]
    assert run([*line, "gcn,sage", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in ("taid:0.2", "bd-kd", "rad", "0.25", "router", "gcn,sage"):
        assert part in shown
