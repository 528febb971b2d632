"""Every policy of the ranking half: its limit, its budget, what a checkpoint holds, what is saved, what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from structkd import index, objectives, scores
from structkd.errors import DataError, UsageError
from structkd.ids import Pairs
from structkd.ranking.data.collection import Collection
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.dual import DualBiScorer
from structkd.ranking.models.static import StaticScorer
from structkd.ranking.models.students import load_student
from structkd.ranking.teachers.sources import Bm25Scorer, RunScorer
from structkd.ranking.training.policies import Policies, asked, grids, kept, own_items
from structkd.ranking.training.train import Lists, lists_of
from structkd.runs import Run
from structkd.scores.cache import StoredScorer
from structkd.scores.manifest import TeacherSpec
from structkd.trec import Run as RankedRun

CONFIG = DistillConfig(objective="kl", epochs=1, batch_lists=4, list_size=8, depth=8, held_out=0.25, seed=3)


@pytest.fixture
def student(small: Collection) -> StaticScorer:
    return StaticScorer.fresh(small.documents, dimension=8, vocabulary=60)


@pytest.fixture
def teacher(small: Collection) -> Bm25Scorer:
    return Bm25Scorer(small.documents)


def lists(small: Collection, seed: int = 0) -> Lists:
    generator = np.random.default_rng(seed)
    rows = [(q, np.unique(np.r_[q, generator.integers(0, 40, 4 + q % 3)])) for q in range(12)]
    empty = lists_of(small.queries, small.documents, rows)
    return dataclasses.replace(empty, targets=generator.normal(size=len(empty.document_rows)).astype(np.float32))


EVERY = [
    Policies(target="taid"),
    Policies(target="truncate:3"),
    *[Policies(sample_weight=name) for name in ("confidence", "certainty", "margin", "bd-kd")],
    Policies(head="dual"),
    Policies(acquire="margin", budget=0.5),
    Policies(keep="agreement:0.01"),
    Policies(keep="own-top:5"),
    Policies(domains="length:2"),
]


@pytest.mark.parametrize("policies", EVERY, ids=range(len(EVERY)))
def test_each_is_one_flag_and_trains(small, student, teacher, policies):
    result = distill(student, teacher, small, CONFIG, policies=policies)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses
    assert np.isfinite(losses).all()
    assert result.student.score(small.pairs_of(_all(small))).isfinite().all()


@pytest.mark.parametrize(
    "name", ["mi-alpha", "infonce", "similarity-preserving", "affinity-kl", "cosine", "feature-mse"]
)
def test_vectors_of_a_bi_encoder_teach(small, student, name):
    wide = StaticScorer.fresh(small.documents, dimension=12, vocabulary=60, seed=5)
    result = distill(student, wide, small, CONFIG, policies=Policies(representation=name))
    assert np.isfinite([row["loss"] for row in result.history if "loss" in row]).all()
    assert not hasattr(result.student, "projection")


@pytest.mark.parametrize("name", ["random", "margin", "rad"])
@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_the_teacher_is_asked_about_exactly_the_budget(small, student, name, budget):
    class Counting:
        def __init__(self) -> None:
            self.inner, self.queries = Bm25Scorer(small.documents), set()
            self.spec = self.inner.spec

        def score(self, pairs: Pairs) -> torch.Tensor:
            self.queries |= set(pairs.query_ids)
            return self.inner.score(pairs)

    counting = Counting()
    distill(student, counting, small, CONFIG, policies=Policies(acquire=name, budget=budget))
    assert len(counting.queries) == round(budget * 12)


def test_margin_asks_about_the_least_sure_lists(small, student):
    found = lists(small)
    rows = asked(Policies(acquire="margin", budget=0.25), student, found, scale=20.0, seed=0)
    scores, mask = grids(found, 20.0 * student.score(found.pairs()).numpy())
    p = np.where(mask, np.exp(scores - scores.max(1, keepdims=True)), 0)
    best = np.sort(p / p.sum(1, keepdims=True), axis=1)[:, -2:]
    np.testing.assert_array_equal(rows, np.sort(np.argsort(best[:, 1] - best[:, 0], kind="stable")[:3]))


def test_filters_keep_what_they_say(small, student):
    found = lists(small)
    scores, mask = grids(found, found.targets)
    own, there = own_items(found, small, mask)
    assert there.all()  # document i is in list i, and is the one judged relevant
    ranks = [int((row[valid] > row[place]).sum()) + 1 for row, valid, place in zip(scores, mask, own, strict=True)]
    top = kept(Policies(keep="own-top:2"), student, found, small, 20.0)
    np.testing.assert_array_equal(top, np.flatnonzero(np.asarray(ranks) <= 2))
    high = kept(Policies(keep="own-score:0.5"), student, found, small, 20.0)
    np.testing.assert_array_equal(high, np.flatnonzero(scores[np.arange(12), own] >= 0.5))
    with pytest.raises(DataError, match="none of 12 lists passes"):
        kept(Policies(keep="own-score:100"), student, found, small, 20.0)


def test_taid_and_domain_shares_are_saved_and_resumed(small, teacher, tmp_path, monkeypatch):
    """A run that is killed in the middle ends as one that was not, bit for bit."""
    policies = Policies(target="taid", domains="length:2")
    config = dataclasses.replace(CONFIG, epochs=3, checkpoint_every=2, validate_on="none")

    def start() -> StaticScorer:
        return StaticScorer.fresh(small.documents, dimension=8, vocabulary=60)

    whole = distill(start(), teacher, small, config, policies=policies, out=tmp_path / "whole")
    logged = Run.log
    monkeypatch.setattr(Run, "log", lambda self, **row: _stop() if row.get("step") == 6 else logged(self, **row))
    with pytest.raises(KeyboardInterrupt):
        distill(start(), teacher, small, config, policies=policies, out=tmp_path / "cut")
    monkeypatch.setattr(Run, "log", logged)
    with pytest.raises(UsageError, match="other policies"):
        distill(start(), teacher, small, config, policies=Policies(target="taid:0.2"), out=tmp_path / "cut")
    resumed = distill(start(), teacher, small, config, policies=policies, out=tmp_path / "cut")
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, resumed.student.state_dict()[name]), name


def test_truncate_at_full_length_and_taid_at_its_end_change_nothing(small, teacher):
    def trained(policies: Policies) -> torch.Tensor:
        fresh = StaticScorer.fresh(small.documents, dimension=8, vocabulary=60)
        last = dataclasses.replace(CONFIG, validate_on="none")
        return distill(fresh, teacher, small, last, policies=policies).student.model[0].embedding.weight.detach()

    plain = trained(Policies())
    torch.testing.assert_close(trained(Policies(target="truncate:100")), plain)
    torch.testing.assert_close(trained(Policies(target="taid:1")), plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(trained(Policies(target="truncate:2")), plain)


def test_two_heads_are_one_index(small, student, tmp_path: Path):
    """Search in one index of inner products ranks by share x label score + (1 - share) x teacher score."""
    dual = DualBiScorer(student)
    with torch.no_grad():
        dual.model[-1].linear.weight += 0.3 * torch.randn(dual.model[-1].linear.weight.shape)
    pairs = small.pairs_of(_all(small))
    with torch.no_grad():
        label, taught = dual.both(pairs)
    for share in (0.25, 0.5, 0.9):
        dual.set_share(share)
        mixed = (share * label + (1 - share) * taught).numpy().reshape(12, 40)
        torch.testing.assert_close(dual.score(pairs), torch.from_numpy(mixed).flatten(), rtol=1e-4, atol=1e-5)
        again = dual.both(pairs)
        torch.testing.assert_close(torch.stack(again), torch.stack([label, taught]), rtol=1e-4, atol=1e-5)
        built = index.build(dual.encode(small.documents.texts, "document"), kind="flat", metric="ip", device="cpu")
        found = built.search(dual.encode(small.queries.texts, "query"), k=5)
        np.testing.assert_allclose(found.scores, -np.sort(-mixed, axis=1)[:, :5], rtol=1e-4, atol=1e-5)
    dual.save(tmp_path / "dual")
    plain = load_student(tmp_path / "dual")
    assert isinstance(plain, BiScorer)
    assert not isinstance(plain, DualBiScorer)
    torch.testing.assert_close(plain.score(pairs), dual.score(pairs), rtol=1e-5, atol=1e-6)


def test_a_fresh_dual_head_scores_as_what_it_started_from(small, student):
    pairs = small.pairs_of(_all(small))
    torch.testing.assert_close(DualBiScorer(student).score(pairs), student.score(pairs), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="strictly between"):
        DualBiScorer(student).set_share(1.0)


@pytest.mark.parametrize(
    ("policies", "objective", "message"),
    [
        (Policies(target="taid"), "margin-mse", "--target taid needs soft-max objectives"),
        (Policies(target="lelp"), "kl", "--target 'lelp'"),
        (Policies(sample_weight="tgeo"), "kl", "--sample-weight 'tgeo'"),
        (Policies(sample_weight="bd-kd"), "listnet", "add --objective kl"),
        (Policies(budget=0.5), "kl", "--budget 0.5"),
        (Policies(representation="infonce"), "kl", "must be one bi-encoder"),
        (Policies(keep="loud"), "kl", "--keep 'loud'"),
        (Policies(keep="own-top:0"), "kl", "expected own-top:NUMBER, a whole number from 1"),
        (Policies(keep="own-score:nan"), "kl", "expected own-score:NUMBER, a number"),
        (Policies(acquire="rad:2"), "kl", "expected rad:NUMBER, a number from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(small, student, teacher, policies, objective, message):
    with pytest.raises(UsageError, match=message):
        distill(student, teacher, small, dataclasses.replace(CONFIG, objective=objective), policies=policies)


@pytest.fixture
def order(small: Collection, tmp_path: Path) -> RunScorer:
    """A list-wise teacher: permutations of ten documents for each query, no scores."""
    generator = np.random.default_rng(0)
    lines = [[query, *map(str, generator.permutation(list(small.documents.ids))[:10])] for query in small.queries.ids]
    (tmp_path / "order.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunScorer(tmp_path / "order.jsonl", by_rank=True)


@pytest.mark.parametrize(
    ("policies", "objective", "message"),
    [
        (Policies(), "kl", "gives an order and no scores, which --objective kl would read"),
        (Policies(), "plackett-luce:1,margin-mse:0.5", "--objective margin-mse would read"),
        (Policies(target="taid"), "plackett-luce", "--target taid would read"),
        (Policies(sample_weight="confidence"), "plackett-luce", "--sample-weight confidence would read"),
        (Policies(keep="agreement"), "listmle", "--keep agreement would read"),
        (Policies(domains="length"), "listmle", "--domains length would read"),
    ],
)
def test_an_order_is_not_read_as_scores(small, student, order, policies, objective, message):
    config = dataclasses.replace(CONFIG, objective=objective)
    with pytest.raises(UsageError, match=message):
        distill(student, order, small, config, policies=policies)


@pytest.mark.parametrize(
    ("objective", "policies"),
    [*((name, Policies()) for name in sorted(objectives.ORDER_OBJECTIVES)), ("plackett-luce", Policies(head="dual"))],
)
def test_an_order_teaches_by_its_order_alone(small, order, objective, policies, tmp_path):
    """Evenly and unevenly spread numbers in the same order give the same student (plackett-luce: by rank weights)."""
    config = dataclasses.replace(CONFIG, objective=objective, validate_on="none")

    def trained(one: object) -> torch.Tensor:
        fresh = StaticScorer.fresh(small.documents, dimension=8, vocabulary=60)
        found = distill(fresh, one, small, config, policies=policies)
        assert found.config.target_transform == "none"
        return found.student.model[0].embedding.weight.detach()

    lists = order.run.lists.items()
    values = np.concatenate([-(np.arange(1.0, 11) ** 2) for _ in lists])
    pairs = [(query, document) for query, (documents, _) in lists for document in documents]
    spec = TeacherSpec("uneven", extra={"score_kind": "rank"})
    scores.write_pairs(tmp_path / "uneven", spec, *zip(*pairs, strict=True), values)
    uneven = StoredScorer(scores.open(tmp_path / "uneven"))
    assert torch.equal(trained(uneven), trained(order))


def test_ranks_become_scores_when_asked(small, student, order):
    config = dataclasses.replace(CONFIG, objective="kl", target_transform="rank")
    assert distill(student, order, small, config).config.target_transform == "rank"


def test_judgements_are_needed_where_they_are_read(small, student, teacher):
    blank = dataclasses.replace(small, qrels={})
    with pytest.raises(UsageError, match="read judgements, and it has none"):
        distill(student, teacher, blank, CONFIG, policies=Policies(head="dual"))


def _all(small: Collection) -> RankedRun:
    """Every query with every document."""
    documents = list(small.documents.ids)
    return RankedRun({query: (documents, -np.arange(1.0, len(documents) + 1)) for query in small.queries.ids})


def _stop() -> None:
    raise KeyboardInterrupt
