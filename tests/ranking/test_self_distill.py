"""Trans-Encoder cycles: targets, both orders, one truncation, models of different width, resume, published labels."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from structkd import scores
from structkd.cli.app import run as command_line
from structkd.errors import DataError, UsageError
from structkd.files import read_json
from structkd.ranking.data.pair_pool import PairPool, gold_of_file, pool_of_file, swapped
from structkd.ranking.evaluation.selection import split_pool
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.cross_encoder import CrossScorer
from structkd.ranking.models.encoders import quiet_loading, train_tokenizer
from structkd.ranking.self_distillation import cycles as module
from structkd.ranking.self_distillation.cycles import SelfDistillConfig, SelfDistillResult, self_distill
from structkd.ranking.self_distillation.isotropy import WhitenedScorer, Whitening, mean_cosine, sentence_vectors
from structkd.ranking.self_distillation.pseudo_labels import (
    SentenceScorer,
    averaged,
    calibrated,
    fit_head,
    logit_targets,
    orders,
    unit_targets,
)
from structkd.ranking.training.train import Lists

WORDS = list("abcdefghijklmnopqrst")  # one token each, whatever the vocabulary is cut to
FAST = SelfDistillConfig(
    cycles=1,
    cross_epochs=1,
    bi_epochs=1,
    cross_batch=8,
    bi_batch=8,
    cross_learning_rate=1e-3,
    bi_labels="cross",
    label_space="raw",  # a random encoder's vectors lean, and auto would whiten them
)


def written(folder: Path, rows: Sequence[tuple[str, ...]], name: str = "pairs.tsv") -> Path:
    path = folder / name
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_bi(folder: Path, width: int, vocabulary: list[str], seed: int) -> str:
    """A mean-pooled cosine bi-encoder of one layer with a tokenizer of its own."""
    core = train_tokenizer([" ".join(vocabulary)] * 3, 200)
    core.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=48, **names)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=width,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    body = folder.with_name(folder.name + "-body")
    with quiet_loading():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(body)
        tokenizer.save_pretrained(body)
        encoder = Transformer(str(body))
        pooling = Pooling(width, pooling_mode="mean")
        SentenceTransformer(modules=[encoder, pooling], similarity_fn_name="cosine", device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def bi(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bi(tmp_path_factory.mktemp("bi") / "one", 32, WORDS, 0)


@pytest.fixture(scope="session")
def other_bi(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another width, another tokenizer."""
    return make_bi(tmp_path_factory.mktemp("bi") / "two", 48, [*"tsrqponmlkjihgfedcba", *"uvw"], 1)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(WORDS, generator.integers(2, 9))) for _ in range(40)]
    rows = [tuple(generator.choice(sentences, 2)) for _ in range(40)]
    return written(tmp_path, [*rows, ("a b c", "a b c")])


@pytest.fixture
def pool(pairs_file: Path) -> PairPool:
    return pool_of_file(pairs_file, symmetric=True)


class Spy:
    """Stands in for `fit` and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[nn.Module, Lists]] = []
        real = module.fit

        def fit(student: nn.Module, lists: Lists, *rest: Any, **named: Any) -> Any:
            self.calls.append((student, lists))
            return real(student, lists, *rest, **named)

        monkeypatch.setattr(module, "fit", fit)


# targets


def test_soft_bce_is_bounded_below_only_for_targets_in_the_unit_interval() -> None:
    logits = torch.tensor([0.0, -5.0, -20.0])
    raw = binary_cross_entropy_with_logits(logits, torch.full((3,), -0.2), reduction="none")
    assert raw.tolist() == pytest.approx([0.6931, -0.9933, -4.0], abs=1e-3)  # the original's loss on a negative cosine
    cosines = np.linspace(-1, 1, 101).astype(np.float32)
    grid = torch.linspace(-30, 30, 601)
    for how in ("clamp", "shift", "stretch"):
        targets = unit_targets(cosines, how, bounded=True)
        assert targets.min() >= 0
        assert targets.max() <= 1
        assert (np.diff(targets) >= 0).all()
        losses = binary_cross_entropy_with_logits(
            grid[None].expand(101, -1), torch.from_numpy(targets)[:, None].expand(-1, 601), reduction="none"
        )
        assert float(losses.min()) >= 0
    np.testing.assert_allclose(unit_targets(cosines, "clamp", True), np.maximum(cosines, 0))
    np.testing.assert_allclose(unit_targets(cosines, "shift", True), (cosines + 1) / 2, atol=1e-7)


def test_scores_without_bounds_need_stretch() -> None:
    dots = np.asarray([-300.0, 0.0, 500.0], dtype=np.float32)
    with pytest.raises(UsageError, match=r"target map 'clamp' needs cosines.*Use stretch"):
        unit_targets(dots, "clamp", bounded=False)
    assert (np.diff(unit_targets(dots, "stretch", bounded=False)) > 0).all()
    assert np.isfinite(unit_targets(np.ones(4, dtype=np.float32), "stretch", False)).all()


def test_averages_are_means_of_sigmoids_and_of_models() -> None:
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=5).astype(np.float32) * 3 for _ in range(2)]
    expected = [(1 / (1 + np.exp(-float(a))) + 1 / (1 + np.exp(-float(b)))) / 2 for a, b in zip(*logits, strict=True)]
    np.testing.assert_allclose(logit_targets(logits), expected, rtol=1e-6)
    np.testing.assert_allclose(averaged([logits[0], logits[1]]), (logits[0] + logits[1]) / 2, rtol=1e-6)


def test_calibration_takes_the_students_moments_and_keeps_the_order() -> None:
    generator = np.random.default_rng(0)
    labels, own = generator.random(50).astype(np.float32), (generator.normal(size=50) * 7 - 3).astype(np.float32)
    fitted = calibrated(labels, own, "moments")
    assert fitted.mean() == pytest.approx(own.mean(), abs=1e-4)
    assert fitted.std() == pytest.approx(own.std(), rel=1e-4)
    assert (np.argsort(fitted) == np.argsort(labels)).all()
    assert calibrated(labels, own, "none") is labels
    with pytest.raises(DataError, match=r"all pseudo-labels are equal.*Lower --cross-learning-rate"):
        calibrated(np.ones(3, dtype=np.float32), own[:3], "moments")


def test_a_fitted_head_is_the_ridge_regression_on_what_it_reads(bi: str, pool: PairPool) -> None:
    scorer = CrossScorer(bi, seed=3)
    targets = np.random.default_rng(0).random(len(pool)).astype(np.float32)
    head = scorer.model[0].model.classifier
    rows = []
    hook = head.register_forward_pre_hook(lambda _, given: rows.append(given[0].detach().double().numpy()[0]))
    for i in range(len(pool)):
        scorer.score(pool.pairs.take([i]))
    hook.remove()
    features, wanted = np.stack(rows), np.clip(targets.astype(np.float64), 0.02, 0.98)
    wanted = np.log(wanted / (1 - wanted))
    design = np.concatenate([features - features.mean(0), np.sqrt(0.02 * len(rows)) * np.eye(32)])
    weights = np.linalg.lstsq(design, np.concatenate([wanted - wanted.mean(), np.zeros(32)]), rcond=None)[0]
    correlation = fit_head(scorer, pool.pairs, targets)
    expected = wanted.mean() + (features - features.mean(0)) @ weights
    np.testing.assert_allclose(scorer.score(pool.pairs).numpy(), expected, atol=1e-3)
    assert correlation == pytest.approx(np.corrcoef(expected, wanted)[0, 1], abs=1e-4)


# scorers


def test_a_sentence_is_encoded_once_on_whichever_side_it_stands(bi: str, pool: PairPool) -> None:
    scorer = SentenceScorer(bi)
    scorer.train()
    scorer.forward(pool.pairs)
    assert scorer.encoded == len(set(pool.pairs.query_rows) | set(pool.pairs.document_rows))
    torch.testing.assert_close(scorer.score(pool.pairs), BiScorer(bi).score(pool.pairs))
    torch.testing.assert_close(scorer.score(pool.pairs), scorer.score(swapped(pool.pairs)))
    assert scorer.spec.fingerprint != BiScorer(bi).spec.fingerprint


def test_prompts_do_not_break_the_symmetry_of_sentences(bi: str, pool: PairPool) -> None:
    model = SentenceTransformer(bi, device="cpu", prompts={"query": "a: ", "document": "b: "})
    sided = BiScorer(model).score(pool.pairs) - BiScorer(model).score(swapped(pool.pairs))
    assert sided.abs().max() > 1e-4
    scorer = SentenceScorer(model)
    torch.testing.assert_close(scorer.score(pool.pairs), scorer.score(swapped(pool.pairs)))
    assert scorer.spec.prompt == "b: "


# the cycle


def test_a_cycle_trains_both_orders_on_mapped_targets_and_labels_both(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    result = self_distill(pool, [bi], FAST, out=tmp_path / "run")
    assert [(row.cycle, row.phase, row.model) for row in result.rows] == [(1, "cross", 1), (1, "bi", 1)]
    train, _ = split_pool(pool, FAST.held_out, FAST.seed)
    own = SentenceScorer(bi).score(pool.pairs).numpy()
    (cross, cross_lists), (_, bi_lists) = spy.calls
    assert isinstance(cross, CrossScorer)
    rows = pool.pairs.query_rows[train], pool.pairs.document_rows[train]
    np.testing.assert_array_equal(cross_lists.query_rows, np.concatenate(rows))
    np.testing.assert_array_equal(cross_lists.document_rows, np.concatenate(rows[::-1]))
    np.testing.assert_allclose(cross_lists.targets, np.tile(np.clip(own[train], 0, 1), 2), atol=1e-6)
    labeller = CrossScorer(result.best["cross"])
    labels = logit_targets(orders(labeller, pool.pairs, True))
    np.testing.assert_allclose(bi_lists.targets, calibrated(labels, own, "moments")[train], atol=1e-5)
    # the same pairs handed over in the other order get the same labels
    np.testing.assert_allclose(labels, logit_targets(orders(labeller, swapped(pool.pairs), True)), atol=1e-6)
    assert not np.allclose(*(values.numpy() for values in map(labeller.score, (pool.pairs, swapped(pool.pairs)))))


def test_what_comes_out_loads_in_its_own_class_with_equal_scores(bi: str, pool: PairPool, tmp_path: Path) -> None:
    result = self_distill(pool, [bi], FAST, out=tmp_path / "run")
    left, right = pool.pairs.query_texts, pool.pairs.document_texts
    model = SentenceTransformer(result.best["bi"], device="cpu")
    vectors = [torch.nn.functional.normalize(model.encode(x, convert_to_tensor=True), dim=-1) for x in (left, right)]
    own = SentenceScorer(result.best["bi"]).score(pool.pairs)
    torch.testing.assert_close((vectors[0] * vectors[1]).sum(-1), own, atol=1e-5, rtol=0)
    logits = CrossEncoder(result.best["cross"], device="cpu").predict(list(zip(left, right, strict=True)))
    np.testing.assert_allclose(logits, CrossScorer(result.best["cross"]).score(pool.pairs).numpy(), atol=1e-4)


def test_one_truncation_in_training_labelling_and_the_saved_models(bi: str, tmp_path: Path) -> None:
    rows = [(" ".join([*WORDS[i:], *WORDS[:i]]), WORDS[i] + " c") for i in range(12)]
    long = pool_of_file(written(tmp_path, rows), symmetric=True)
    config = dataclasses.replace(FAST, max_length=6, max_pair_length=9)
    result = self_distill(long, [bi], config, out=tmp_path / "run")
    assert SentenceTransformer(result.best["bi"], device="cpu").max_seq_length == 6
    assert CrossEncoder(result.best["cross"], device="cpu").max_seq_length == 9
    stored = scores.open(tmp_path / "run/cycle-1/labels-cross-1")
    assert stored.spec.max_length == 9
    texts = list(zip(long.pairs.query_texts, long.pairs.document_texts, strict=True))
    logits = CrossEncoder(result.best["cross"], device="cpu").predict(texts)
    found = stored.lookup(long.pairs.query_ids, long.pairs.document_ids)
    np.testing.assert_allclose(logits, found, atol=1e-4)
    assert scores.open(tmp_path / "run/cycle-1/labels-bi-1").spec.max_length == 6


def test_a_bi_encoder_learns_both_labels_as_far_as_the_cross_encoder_agrees(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    for name, agreement in (("much", 0.9), ("some", 0.25), ("none", -0.3)):
        monkeypatch.setattr(module, "spearman", lambda *_, found=agreement: found)
        result = self_distill(pool, [bi], dataclasses.replace(FAST, bi_labels="both"), out=tmp_path / name)
        own = np.clip(SentenceScorer(bi).score(pool.pairs).numpy(), 0, 1)
        labels = logit_targets(orders(CrossScorer(result.best["cross"]), pool.pairs, True))
        weight = max(agreement, 0)
        mixed = ((own + weight * labels) / (1 + weight)).astype(np.float32)
        expected = calibrated(mixed, SentenceScorer(bi).score(pool.pairs).numpy(), "moments")
        train, _ = split_pool(pool, FAST.held_out, FAST.seed)
        np.testing.assert_allclose(spy.calls[-1][1].targets, expected[train], atol=1e-5)


def test_a_bi_encoder_is_not_judged_by_its_own_labels(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own answers among the labels, the weights that agree best would be those it started from."""
    judged = []

    def agreement(scores: Any, labels: Any) -> float:
        judged.append(labels)
        return 0.0

    monkeypatch.setitem(module.JUDGES, "agreement", agreement)
    result = self_distill(pool, [bi], dataclasses.replace(FAST, bi_labels="both"), out=tmp_path / "run")
    _, held = split_pool(pool, FAST.held_out, FAST.seed)
    labels = logit_targets(orders(CrossScorer(result.best["cross"]), pool.pairs, True))
    expected = calibrated(labels, SentenceScorer(bi).score(pool.pairs).numpy(), "moments")
    np.testing.assert_allclose(judged[-1], expected[held], atol=1e-5)


@pytest.mark.parametrize(
    ("lists", "steps", "expected"),
    [(10_000, 600, 2), (20_000, 600, 1), (90_000, 600, 1), (5_000, 300, 2), (40, 300, 5)],
)
def test_passes_come_near_to_the_steps(lists: int, steps: int, expected: int) -> None:
    assert module.passes(lists, 32, steps) == expected


def test_labels_of_leaning_vectors_are_whitened_and_a_second_run_fits_nothing(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spy = Spy(monkeypatch)
    config = dataclasses.replace(FAST, label_space="auto")
    self_distill(pool, [bi], config, out=tmp_path / "run")
    assert "whitened labels" in capsys.readouterr().err
    start = SentenceScorer(bi)
    vectors = sentence_vectors(start, pool.pairs)
    assert read_json(tmp_path / "run/cycle-1/whitening-1.json")["mean_cosine"] == pytest.approx(mean_cosine(vectors))
    expected = WhitenedScorer(start, Whitening.fit(vectors)).score(pool.pairs).numpy()
    stored = scores.open(tmp_path / "run/cycle-1/labels-bi-1")
    assert stored.spec.head == "whitened cosine"
    np.testing.assert_allclose(stored.lookup(pool.pairs.query_ids, pool.pairs.document_ids), expected, atol=1e-5)
    train, _ = split_pool(pool, config.held_out, config.seed)
    (_, cross_lists), (_, bi_lists) = spy.calls
    np.testing.assert_allclose(cross_lists.targets, np.tile(np.clip(expected[train], 0, 1), 2), atol=1e-5)
    assert bi_lists.targets.mean() == pytest.approx(expected[train].mean(), abs=0.02)  # its scale, not the raw one
    monkeypatch.setattr(module, "sentence_vectors", lambda *_: pytest.fail("encoded again"))
    assert self_distill(pool, [bi], config, out=tmp_path / "run").asked == 0


def test_vectors_without_a_common_direction_are_left_as_they_are(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANISOTROPIC", 1.0)
    self_distill(pool, [bi], dataclasses.replace(FAST, label_space="auto"), out=tmp_path / "run")
    stored = scores.open(tmp_path / "run/cycle-1/labels-bi-1")
    found = stored.lookup(pool.pairs.query_ids, pool.pairs.document_ids)
    np.testing.assert_allclose(found, SentenceScorer(bi).score(pool.pairs), atol=1e-5)


def test_whitened_labels_need_cosines_of_sentence_pairs(
    bi: str, pool: PairPool, tmp_path: Path, pairs_file: Path
) -> None:
    config = dataclasses.replace(FAST, label_space="whitened")
    model = SentenceTransformer(bi, device="cpu")
    model.similarity_fn_name = "dot"
    model.save(str(tmp_path / "dot"))
    with pytest.raises(
        UsageError, match=r"whitened labels are cosines, its scores have no bounds; use --label-space raw"
    ):
        self_distill(pool, [tmp_path / "dot"], config, out=tmp_path / "run")
    ordered = pool_of_file(pairs_file, symmetric=False)
    with pytest.raises(UsageError, match=r"whitened labels are for sentence pairs"):
        self_distill(ordered, [bi], dataclasses.replace(config, asymmetric=True), out=tmp_path / "run")


def test_mutual_models_keep_their_own_width_and_learn_from_the_average(
    bi: str, other_bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    result = self_distill(pool, [bi, other_bi], FAST, out=tmp_path / "run")
    assert [(row.phase, row.model) for row in result.rows] == [("cross", 1), ("cross", 2), ("bi", 1), ("bi", 2)]
    widths = [SentenceTransformer(row.folder, device="cpu").get_embedding_dimension() for row in result.rows[2:]]
    assert widths == [32, 48]
    train, _ = split_pool(pool, FAST.held_out, FAST.seed)
    cosines = [SentenceScorer(init).score(pool.pairs).numpy() for init in (bi, other_bi)]
    mean = np.mean([np.clip(one, 0, 1) for one in cosines], axis=0)
    for _, lists in spy.calls[:2]:
        np.testing.assert_allclose(lists.targets, np.tile(mean[train], 2), atol=1e-6)
    labels = averaged([logit_targets(orders(CrossScorer(row.folder), pool.pairs, True)) for row in result.rows[:2]])
    for (_, lists), own in zip(spy.calls[2:], cosines, strict=True):
        np.testing.assert_allclose(lists.targets, calibrated(labels, own, "moments")[train], atol=1e-5)


def test_an_interrupted_third_cycle_restarts_in_the_third_cycle(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(FAST, cycles=3)
    whole = self_distill(pool, [bi], config, out=tmp_path / "whole")
    real, steps = module.cross_loss, {"left": 10 * 2 + 5}  # two cycles of ten steps, then killed in the third

    def dying(name: str) -> Any:
        inner = real(name)

        def loss_of(*given: Any) -> Any:
            steps["left"] -= 1
            if steps["left"] == 0:
                raise KeyboardInterrupt
            return inner(*given)

        return loss_of

    monkeypatch.setattr(module, "cross_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        self_distill(pool, [bi], config, out=tmp_path / "cut")
    finished = sorted(str(path.parent.relative_to(tmp_path / "cut")) for path in (tmp_path / "cut").rglob("phase.json"))
    assert finished == ["cycle-1/bi-1", "cycle-1/cross-1", "cycle-2/bi-1", "cycle-2/cross-1"]
    spy = Spy(monkeypatch)
    monkeypatch.setattr(module, "cross_loss", real)
    monkeypatch.setattr(module, "fit_head", lambda *_: pytest.fail("fitted again: other threads, other last bits"))
    again = self_distill(pool, [bi], config, out=tmp_path / "cut")
    assert len(spy.calls) == 2  # the third cycle's cross- and bi-encoder
    # its cross-encoder's labels; of a pair with itself both orders are one
    assert again.asked == 2 * len(pool) - pool.counts["identical"]
    assert again.found > 0
    assert [dataclasses.replace(row, folder="", seconds=0, pairs_per_second=0) for row in again.rows] == [
        dataclasses.replace(row, folder="", seconds=0, pairs_per_second=0) for row in whole.rows
    ]
    torch.testing.assert_close(
        SentenceScorer(again.best["bi"]).score(pool.pairs),
        SentenceScorer(whole.best["bi"]).score(pool.pairs),
        atol=0,
        rtol=0,
    )
    assert self_distill(pool, [bi], config, out=tmp_path / "cut").asked == 0
    with pytest.raises(UsageError, match=r"holds a run with other settings, pairs or starting weights.*another --out"):
        self_distill(pool, [bi], dataclasses.replace(config, bi_epochs=2), out=tmp_path / "cut")


@pytest.mark.slow  # three processes that load everything
def test_a_run_killed_in_its_third_cycle_ends_as_if_it_had_not_been(bi: str, pairs_file: Path, tmp_path: Path) -> None:
    flags = ["--pairs", str(pairs_file), "--init", bi, "--cross-epochs", "20", "--bi-epochs", "1", "--cross-batch", "2"]
    command = [sys.executable, "-m", "structkd", "ranking", "self-distill", *flags, "--json", "--out"]
    whole = json.loads(subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True).stdout)
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut/cycle-3/cross-1/checkpoint/state.pt"
    while process.poll() is None and not checkpoint.is_file():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut/cycle-3/cross-1/phase.json").is_file()
    again = subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True, text=True)
    assert "cycle-3/cross-1 at step" in again.stderr
    assert again.stderr.count("trained already") == 4
    found = json.loads(again.stdout)
    assert [row["dev"] for row in found["cycles"]] == [row["dev"] for row in whole["cycles"]]
    pool = pool_of_file(pairs_file, symmetric=True).pairs
    ends = [SentenceScorer(result["best"]["bi"]).score(pool) for result in (found, whole)]
    torch.testing.assert_close(*ends, atol=0, rtol=0)


def test_every_label_can_be_published_and_taught_from(bi: str, pool: PairPool, tmp_path: Path) -> None:
    self_distill(pool, [bi], FAST, out=tmp_path / "run")
    store = tmp_path / "run/cycle-1/labels-cross-1"
    assert command_line(["scores", "publish", str(store), "--out", str(tmp_path / "v1"), "--license", "CC-BY-4.0"]) == 0
    assert scores.verify(tmp_path / "v1").ok
    published = scores.StoredScorer(scores.open(tmp_path / "v1"))
    model = CrossScorer(tmp_path / "run/cycle-1/cross-1/model")
    torch.testing.assert_close(published.score(pool.pairs), model.score(pool.pairs), atol=1e-3, rtol=0)
    written_texts = (tmp_path / "run/pool/queries.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in written_texts] == list(pool.pairs.queries.texts)


def test_gold_scores_choose_and_the_result_says_so_whatever_their_scale(
    bi: str, pool: PairPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(5)
    texts = list(zip(pool.pairs.query_texts, pool.pairs.document_texts, strict=True))[:12]
    values = generator.random(12)
    found: list[SelfDistillResult] = []
    for name, scaled in (("unit", values), ("other", -40 + 1000 * values)):
        path = written(
            tmp_path, [(repr(float(v)), *pair) for v, pair in zip(scaled, texts, strict=True)], f"{name}.tsv"
        )
        gold = gold_of_file(path, symmetric=True)
        found.append(self_distill(pool, [bi], FAST, out=tmp_path / name, gold=gold))
    one, other = found
    assert one.selection == "gold Spearman"
    assert one.pool["gold_in_pool"] == 12
    assert "transductive: 12 of 12 pairs" in capsys.readouterr().err
    assert [row.dev for row in one.rows] == [row.dev for row in other.rows]
    assert one.start == other.start
    assert self_distill(pool, [bi], FAST, out=tmp_path / "none").selection == "held-out agreement"


def test_without_gold_every_cycle_moves_its_models_and_the_last_one_counts(
    bi: str, pool: PairPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agreement with labels that a model had a part in is highest where it stays: here it falls all the time."""
    values = iter(range(1000, 0, -1))
    monkeypatch.setitem(module.JUDGES, "agreement", lambda *_: float(next(values)))
    config = dataclasses.replace(FAST, cycles=2, bi_labels="both")
    result = self_distill(pool, [bi], config, out=tmp_path / "run")
    folders = [Path(bi), *(Path(row.folder) for row in result.rows if row.phase == "bi")]
    states = [BiScorer(str(folder)).state_dict() for folder in folders]
    for before, after in itertools.pairwise(states):
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all("cycle-2" in folder for folder in result.best.values())


def test_queries_and_passages_are_labelled_in_one_order(
    bi: str, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    ordered = pool_of_file(pairs_file, symmetric=False)
    config = dataclasses.replace(FAST, asymmetric=True, target_map="stretch", calibration="none", bi_loss="margin")
    self_distill(ordered, [bi], config, out=tmp_path / "run")
    train, _ = split_pool(ordered, config.held_out, config.seed)
    assert [len(lists) for _, lists in spy.calls] == [len(train), len(train)]
    assert len(scores.open(tmp_path / "run/cycle-1/labels-cross-1")) == len(ordered)
    with pytest.raises(UsageError, match="the pool and --asymmetric disagree"):
        self_distill(ordered, [bi], FAST, out=tmp_path / "no")


def test_later_cycles_go_on_or_start_again(bi: str, pool: PairPool, tmp_path: Path, monkeypatch: Any) -> None:
    sources: list[str] = []
    real = module._Cycles._cross_source

    def source(self: Any, cycle: int, member: int) -> str:
        sources.append(real(self, cycle, member))
        return sources[-1]

    monkeypatch.setattr(module._Cycles, "_cross_source", source)
    config = dataclasses.replace(FAST, cycles=2, cross_from="last", bi_from="init", freeze="embeddings")
    self_distill(pool, [bi], config, out=tmp_path / "run")
    assert sources == [bi, str(tmp_path / "run/cycle-1/cross-1/model")]
    self_distill(pool, [bi], dataclasses.replace(FAST, cycles=2), out=tmp_path / "again")
    assert sources[2:] == [bi, str(tmp_path / "again/cycle-1/bi-1/model")]
    self_distill(pool, [bi], dataclasses.replace(FAST, cycles=2), out=tmp_path / "body", cross_inits=[bi])
    assert sources[4:] == [bi, bi]
    # the frozen table is the starting one in every bi-encoder
    tables = [
        SentenceTransformer(folder, device="cpu")[0].auto_model.embeddings.word_embeddings.weight
        for folder in (bi, str(tmp_path / "run/cycle-2/bi-1/model"))
    ]
    torch.testing.assert_close(tables[0], tables[1], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "inits", "bodies", "message"),
    [
        ({"cycles": 0}, 1, 0, "expected cycles >= 1"),
        ({"held_out": 1.0}, 1, 0, "0 < held_out < 1"),
        ({}, 0, 0, "0 starting models and 0 bodies"),
        ({}, 3, 2, "3 starting models and 2 bodies"),
    ],
)
def test_settings_out_of_range(
    bi: str, pool: PairPool, tmp_path: Path, change: dict[str, Any], inits: int, bodies: int, message: str
) -> None:
    config = dataclasses.replace(FAST, **change)
    with pytest.raises(UsageError, match=message):
        self_distill(pool, [bi] * inits, config, out=tmp_path / "run", cross_inits=[bi] * bodies)


def test_a_cross_encoder_is_no_start(bi: str, pool: PairPool, tmp_path: Path) -> None:
    CrossScorer(bi).save(tmp_path / "cross")
    with pytest.raises(UsageError, match="holds a cross-encoder; a cycle starts from a bi-encoder"):
        self_distill(pool, [tmp_path / "cross"], FAST, out=tmp_path / "run")


# the command


def call(*tokens: str) -> int:
    return command_line(["ranking", "self-distill", *tokens])


def test_the_command_prints_the_contracts_keys(
    bi: str, other_bi: str, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = written(tmp_path, [("a b c", "a b c")], "test.tsv")
    flags = ["--cycles", "1", "--bi-epochs", "1", "--cross-init", other_bi, "--exclude", str(kept), "--json"]
    assert call("--pairs", str(pairs_file), "--init", bi, *flags, "--out", str(tmp_path / "run")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["cycle"], row["phase"]) for row in found["cycles"]] == [(1, "cross"), (1, "bi")]
    assert all(isinstance(row["dev"], float) for row in found["cycles"])
    assert set(found["best"]) == {"bi", "cross"}
    assert SentenceTransformer(found["best"]["bi"], device="cpu").get_embedding_dimension() == 32
    assert CrossScorer(found["best"]["cross"]).model[0].model.config.hidden_size == 48
    assert found["selection"] == "held-out agreement"
    assert found["pool"]["excluded"] == 1


def test_the_command_builds_pairs_from_a_collection_and_an_index(
    bi: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "collection"
    folder.mkdir()
    for name, letter, count in (("corpus.jsonl", "d", 30), ("queries.jsonl", "q", 6)):
        lines = [{"_id": f"{letter}{i}", "text": f"{2 * WORDS[i % 20]} {2 * WORDS[i * 7 % 20]}"} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = ["--collection", str(folder), "--init", bi, "--cycles", "1", "--bi-epochs", "1", "--depth", "4", "--json"]
    assert call(*flags, "--out", str(tmp_path / "bm25")) == 0
    bm25 = json.loads(capsys.readouterr().out)
    assert not bm25["symmetric"]
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    np.save(tmp_path / "vectors.npy", BiScorer(bi).encode(texts, "document"))
    (tmp_path / "ids.txt").write_text("".join(f"d{i}\n" for i in range(30)), encoding="utf-8")
    vectors = ["--vectors", str(tmp_path / "vectors.npy"), "--ids", str(tmp_path / "ids.txt"), "--kind", "flat"]
    assert command_line(["index", "build", *vectors, "--out", str(tmp_path / "index")]) == 0
    capsys.readouterr()
    assert call(*flags, "--index", str(tmp_path / "index"), "--out", str(tmp_path / "dense")) == 0
    assert json.loads(capsys.readouterr().out)["pool"]["pairs"] == 24


@pytest.mark.parametrize(
    ("tokens", "status", "message"),
    [
        ([], 2, "give either --pairs FILE or --collection DIR"),
        (["--pairs", "absent.tsv"], 1, "absent.tsv: no such file"),
        (["--pairs", "PAIRS", "--dev", "PAIRS"], 1, "two columns, expected three"),
        (["--pairs", "PAIRS", "--cycles", "0"], 2, "expected cycles >= 1"),
    ],
)
def test_the_command_says_what_is_wrong(
    bi: str,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokens: list[str],
    status: int,
    message: str,
) -> None:
    given = [str(pairs_file) if token == "PAIRS" else token for token in tokens]
    assert call(*given, "--init", bi, "--out", str(tmp_path / "run")) == status
    assert message in capsys.readouterr().err
