"""Distillation speed beside the sentence-transformers trainer with MarginMSELoss; some ten minutes on one core.

    python benchmarks/bench_ranking_trainer.py --data DIR_OF_COLLECTIONS --init ALL_MINILM_L6_V2 --work DIR --out FILE

Four arms train the same two layers of all-MiniLM-L6-v2 on the same lists of 16 (the teacher's first document against
15 others), equal steps, equal comparisons a step, learning rate, schedule, precision (float32) and dropout (all but
`plain`):

    structkd   lists; each query and document encoded once a step
    plain      the same without dropout (`--no-dropout`)
    rows       sentence-transformers, one row per list: query, positive, 15 negatives
    triples    sentence-transformers, one row per (query, positive, negative)

Arms take turns in one process, one thread. Seconds are processor seconds of the training call (tokenising, batching,
optimizer; not the making of the trainer and its rows), so that a busy machine cannot favour one of them; wall seconds
stand beside. Peak memory is that of a process of its own per arm. Each call adds a run of --parts to FILE; the figures
are medians over runs, and a ratio is taken within its run.

`--device cuda` runs the parts that begin with gpu: all arms in float32 and in bfloat16 autocast, wall seconds to the
end of the device's work, peak memory of the device; and large in-batch steps (512 queries with a positive and a hard
negative each, every document against every query) beside CachedMultipleNegativesRankingLoss, gradients cached.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from origin import commit, machine, peak_bytes
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MarginMSELoss
from sentence_transformers.util import pairwise_dot_score
from starts import dl19, with_layers
from torch.nn.functional import cross_entropy

from structkd.files import read_json, write_json
from structkd.ids import Pairs
from structkd.objectives import margin_mse
from structkd.ranking.data.collection import Collection, load
from structkd.ranking.data.negatives import bm25_candidates
from structkd.ranking.evaluation.measures import EvaluationResult, compare, evaluate_model
from structkd.ranking.models.encoders import BiScorer
from structkd.ranking.training.train import Batch, FitConfig, Lists, fit, lists_of, scored_grid
from structkd.runs import versions
from structkd.trec import read_run

SIZE, RATE, SCALE = 16, 1e-4, 20.0
ARMS = ("structkd", "rows", "triples", "plain")


def training_lists(data: Path, name: str, queries: int) -> Lists:
    """Lists of 16 with standardised scores: SPLADE++ on msmarco-dl22, BM25 elsewhere; the best document first."""
    folder = data / name
    if name == "msmarco-dl22":
        collection, run = load(folder), read_run(folder / "runs" / "splade_p_p_ensemble_distil.tsv")
    else:
        collection = load(folder, "train") if (folder / "train.json").is_file() else load(folder)
        some = collection.with_queries(list(collection.queries.ids)[: 2 * queries])
        run = bm25_candidates(some, 100)
    kept: list[tuple[int, NDArray[np.int64]]] = []
    targets = []
    for query, (documents, scores) in run.lists.items():
        if len(documents) < SIZE or len(kept) == queries:
            continue
        chosen = np.linspace(0, len(documents) - 1, SIZE).astype(int)  # from the whole list, the best first
        rows = collection.documents.ids.rows([documents[i] for i in chosen])
        kept.append((int(collection.queries.ids.rows([query])[0]), rows))
        values = np.asarray(scores, dtype=np.float64)[chosen]
        targets.append((values - values.mean()) / values.std())
    return lists_of(collection.queries, collection.documents, kept, np.concatenate(targets).astype(np.float32))


def rows_of(lists: Lists, triples: bool) -> Dataset:
    """The lists as the rows that sentence-transformers trains on; the label is the margin."""
    pairs = lists.pairs()
    queries, documents = pairs.query_texts, pairs.document_texts
    rows: list[dict[str, Any]] = []
    for low, high in pairwise(lists.offsets.tolist()):
        margins = (lists.targets[low] - lists.targets[low + 1 : high]).tolist()
        first = {"query": queries[low], "positive": documents[low]}
        if triples:
            rows += [first | {"negative": documents[low + 1 + i], "label": value} for i, value in enumerate(margins)]
        else:
            others = {f"negative_{i}": documents[low + i] for i in range(1, high - low)}
            rows.append(first | others | {"label": margins})
    return Dataset.from_list(rows)


def scaled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The model normalises its vectors: this is 20 times the cosine."""
    return SCALE * pairwise_dot_score(a, b)


@dataclass(frozen=True)
class How:
    """What an arm is asked to do."""

    batch_lists: int
    steps: int
    seed: int
    work: Path
    device: str = "cpu"
    precision: Literal["no", "bf16"] = "no"
    in_batch: bool = False


def structkd_arm(model: SentenceTransformer, lists: Lists, how: How, dropout: bool) -> Callable[[], Any]:
    def margins(student: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return margin_mse(SCALE * scored_grid(student, batch), batch.targets, mask=batch.mask, pairs="first")

    def in_batch(student: torch.nn.Module, batch: Batch) -> torch.Tensor:
        size = len(batch.mask)
        pairs = batch.pairs  # rows: positive, hard negative, positive, ...
        queries, documents = np.repeat(pairs.query_rows[::2], 2 * size), np.tile(pairs.document_rows, size)
        grid = student(Pairs(pairs.queries, pairs.documents, queries, documents)).float().reshape(size, 2 * size)
        return cross_entropy(SCALE * grid, torch.arange(0, 2 * size, 2, device=grid.device))

    config = FitConfig(
        epochs=999, max_steps=how.steps, batch_lists=how.batch_lists, list_size=SIZE, learning_rate=RATE, seed=how.seed,
        dropout=dropout, precision=how.precision, gradient_cache=how.in_batch,
    )  # fmt: skip
    student = BiScorer(model, device=how.device)
    return lambda: fit(student, lists, in_batch if how.in_batch else margins, config)


def library_arm(model: SentenceTransformer, lists: Lists, how: How, triples: bool) -> Callable[[], Any]:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(how.work / "trainer"),
        max_steps=how.steps,
        per_device_train_batch_size=how.batch_lists * (SIZE - 1 if triples else 1),
        learning_rate=RATE,
        warmup_steps=max(1, round(0.1 * how.steps)),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=how.seed,
        use_cpu=how.device == "cpu",
        bf16=how.precision == "bf16",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = rows_of(lists, triples)
    loss: torch.nn.Module = MarginMSELoss(model, similarity_fct=scaled)
    if how.in_batch:
        data = data.remove_columns("label")
        loss = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=64)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train


def training(arm: str, model: SentenceTransformer, lists: Lists, how: How) -> Callable[[], Any]:
    """One training of one arm, ready to start."""
    torch.manual_seed(0)
    model.to(how.device)
    if arm in ("structkd", "plain"):
        return structkd_arm(model, lists, how, dropout=arm == "structkd")
    return library_arm(model, lists, how, triples=arm == "triples")


def timed(action: Callable[[], Any], device: str = "cpu") -> dict[str, float]:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    wall, own = time.perf_counter(), time.process_time()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    found = {"cpu_s": round(time.process_time() - own, 2), "wall_s": round(time.perf_counter() - wall, 2)}
    return found | ({"peak_mb": round(torch.cuda.max_memory_allocated() / 2**20)} if device == "cuda" else {})


def peak(arm: str, init: str, data: str, name: str, batch_lists: int, work: str, out: Any) -> None:
    """Two steps in a process of its own; its peak resident memory in MB."""
    torch.set_num_threads(1)
    lists = training_lists(Path(data), name, 2 * batch_lists)
    training(arm, with_layers(init), lists, How(batch_lists, 2, 0, Path(work)))()
    out.put(peak_bytes() / 2**20)


def peak_of(arm: str, options: argparse.Namespace, name: str, batch_lists: int) -> float:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    arguments = (arm, options.init, options.data, name, batch_lists, options.work, out)
    process = context.Process(target=peak, args=arguments)
    process.start()
    value = float(out.get())
    process.join()
    return round(value, 1)


def quality(model: SentenceTransformer, collection: Collection, data: Path, depth: int) -> EvaluationResult:
    """Re-ranking of BM25's first documents of msmarco-dl19, which no arm was trained on."""
    run = read_run(data / "msmarco-dl19" / "runs" / "bm25.tsv")
    return evaluate_model(collection, BiScorer(model), candidates=run, depth=depth, measures="nDCG@10")


def lists_of_part(part: dict[str, Any], options: argparse.Namespace) -> Lists:
    return training_lists(Path(options.data), part["collection"], part["queries"])


def speed(part: dict[str, Any], options: argparse.Namespace, run: int) -> dict[str, Any]:
    """Each arm once, in turn; the order turns with the run."""
    lists, seconds = lists_of_part(part, options), {}
    for position in range(len(ARMS)):
        arm = ARMS[(position + run) % len(ARMS)]
        how = How(part["batch_lists"], part["steps"], run, Path(options.work))
        seconds[arm] = timed(training(arm, with_layers(options.init), lists, how))
    return seconds


def on_gpu(part: dict[str, Any], options: argparse.Namespace, run: int) -> dict[str, Any]:
    """Each arm in float32 and in bfloat16, after a short one that warms the device; in-batch sets have no triples."""
    lists, seconds = lists_of_part(part, options), {}
    in_batch = part.get("in_batch", False)
    if in_batch:
        lists = first_two(lists)
    arms = ("structkd", "rows", "plain") if in_batch else ARMS
    for precision in ("no", "bf16"):
        for position in range(len(arms)):
            arm = arms[(position + run) % len(arms)]
            how = How(part["batch_lists"], part["steps"], run, Path(options.work), "cuda", precision, in_batch)
            training(arm, with_layers(options.init), lists, replace(how, steps=2))()
            seconds[f"{arm}, {precision}"] = timed(training(arm, with_layers(options.init), lists, how), "cuda")
    return seconds


def first_two(lists: Lists) -> Lists:
    """Each list's first document and its fourth: a positive and a hard negative."""
    low = lists.offsets[:-1]
    items = np.stack([low, low + 3], axis=1).reshape(-1)
    offsets = np.arange(0, len(items) + 1, 2)
    return Lists(
        lists.queries, lists.documents, lists.query_rows, offsets, lists.document_rows[items], lists.targets[items]
    )


def memory(part: dict[str, Any], options: argparse.Namespace, run: int) -> dict[str, Any]:
    """Peak resident memory of each arm in MB, for two steps."""
    return {arm: peak_of(arm, options, part["collection"], part["batch_lists"]) for arm in ARMS}


def final_quality(part: dict[str, Any], options: argparse.Namespace, run: int) -> dict[str, Any]:
    """nDCG@10 on msmarco-dl19 after the same training, and whether queries tell the arms apart."""
    data, work = Path(options.data), Path(options.work)
    lists, results = lists_of_part(part, options), {}
    models = {"before": with_layers(options.init)}
    for arm in ARMS:
        models[arm] = with_layers(options.init)
        training(arm, models[arm], lists, How(part["batch_lists"], part["steps"], run, work))()
    collection = dl19(data)
    for name, model in models.items():
        results[name] = quality(model, collection, data, 20)
    found: dict[str, Any] = {name: round(result.measures["nDCG@10"], 4) for name, result in results.items()}
    tests = {arm: compare(results[arm], results["structkd"], "nDCG@10") for arm in ("rows", "triples", "plain")}
    return found | {f"p against {arm}": round(test.p_value, 4) for arm, test in tests.items()}


def summary(runs: list[dict[str, Any]], part: dict[str, Any]) -> dict[str, Any]:
    """Medians over runs; a ratio is taken within its run."""
    compared = part["steps"] * part["batch_lists"] * (SIZE - 1)
    found: dict[str, Any] = {"comparisons": compared}
    arms = [arm for arm in ARMS if all(arm in run for run in runs)]  # older runs have no arm without dropout
    for arm in arms:
        rates = [compared / run[arm]["cpu_s"] for run in runs]
        found[f"{arm}: pairs per processor second"] = round(float(np.median(rates)), 2)
    for arm in ("rows", "triples"):
        ratios = [run[arm]["cpu_s"] / run["structkd"]["cpu_s"] for run in runs]
        found[f"speedup over {arm}"] = round(float(np.median(ratios)), 2)
        found[f"speedup over {arm}, each run"] = [round(ratio, 2) for ratio in ratios]
        if "plain" in arms:
            ratios = [run[arm]["cpu_s"] / run["plain"]["cpu_s"] for run in runs]
            found[f"plain: speedup over {arm}"] = round(float(np.median(ratios)), 2)
    return found


def ratios_on_gpu(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Wall seconds and device memory of the others over structkd's, medians over runs, a ratio within its run."""
    found: dict[str, Any] = {}
    for arm in runs[0]:
        own = f"structkd, {arm.split(', ')[1]}"
        ratios = [run[arm]["wall_s"] / run[own]["wall_s"] for run in runs]
        found[arm] = {
            "times_the_seconds": round(float(np.median(ratios)), 2),
            "each_run": [round(ratio, 2) for ratio in ratios],
            "times_the_memory": round(runs[0][arm]["peak_mb"] / runs[0][own]["peak_mb"], 2),
        }
    return found


PARTS: dict[str, dict[str, Any]] = {
    "dl22": {"what": "speed", "collection": "msmarco-dl22", "queries": 16, "batch_lists": 8, "steps": 2},
    "dl22-small-steps": {"what": "speed", "collection": "msmarco-dl22", "queries": 12, "batch_lists": 2, "steps": 6},
    "scifact": {"what": "speed", "collection": "scifact", "queries": 8, "batch_lists": 4, "steps": 2},
    "scifact-four-arms": {"what": "speed", "collection": "scifact", "queries": 8, "batch_lists": 4, "steps": 2},
    "nfcorpus": {"what": "speed", "collection": "nfcorpus", "queries": 8, "batch_lists": 4, "steps": 2},
    "dl22-memory": {"what": "memory", "collection": "msmarco-dl22", "queries": 16, "batch_lists": 8, "steps": 2},
    "gpu-dl22": {"what": "gpu", "collection": "msmarco-dl22", "queries": 64, "batch_lists": 8, "steps": 40},
    "gpu-scifact": {"what": "gpu", "collection": "scifact", "queries": 64, "batch_lists": 8, "steps": 40},
    "gpu-nfcorpus": {"what": "gpu", "collection": "nfcorpus", "queries": 64, "batch_lists": 8, "steps": 40},
    "gpu-in-batch": {
        "what": "gpu",
        "collection": "scifact",
        "queries": 512,
        "batch_lists": 512,
        "steps": 3,
        "in_batch": True,
    },
    "dl22-quality": {"what": "quality", "collection": "msmarco-dl22", "queries": 40, "batch_lists": 8, "steps": 5},
}
DOES = {"speed": speed, "memory": memory, "quality": final_quality, "gpu": on_gpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "init", "work", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="by default all of the device's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    options.parts = options.parts or [name for name in PARTS if name.startswith("gpu") == (options.device == "cuda")]
    torch.set_num_threads(1)
    out = Path(options.out)
    for name in options.parts:
        kept = read_json(out) if out.is_file() else {"parts": {}}
        part = PARTS[name]
        runs = kept["parts"].get(name, {}).get("runs", [])
        runs.append(DOES[part["what"]](part, options, len(runs)))
        kept["parts"][name] = {"settings": part, "runs": runs}
        if part["what"] == "gpu":
            kept["parts"][name] |= {"device": torch.cuda.get_device_name(), "median": ratios_on_gpu(runs)}
        if part["what"] == "speed":
            kept["parts"][name]["median"] = summary(runs, part)
        settings = {"list_size": SIZE, "learning_rate": RATE, "student_scale": SCALE, "threads": 1}
        head = {"command": "python benchmarks/bench_ranking_trainer.py", "machine": machine(), "commit": commit()}
        write_json(out, {**head, "versions": versions(), "settings": settings, "parts": kept["parts"]})
        print(json.dumps({name: kept["parts"][name]}), flush=True)


if __name__ == "__main__":
    main()
