"""The ranking half of `quality_objectives.py`: its pieces, its collections, its students.

scifact: BM25's scores of 16 candidates of 200 training queries teach; 150 test queries measure, re-ranking BM25's first
20. msmarco-dl19: SPLADE++'s scores of 32 candidates of dl22's 76 unlabelled queries teach; dl19's 43 judged queries
measure, re-ranking BM25's first 50. "bi-encoder teacher": all six layers of the encoder that the student has two of,
alone, with the terms on vectors, and together with the collection's own teacher. Judgements of test queries are met in
the last measurement only.

The student: two layers of all-MiniLM-L6-v2 (the third and the sixth), texts cut to 64 tokens, encoded once and frozen,
and on them a square linear map that starts as the identity and is what is trained. So a run costs seconds, and every
piece starts from a real encoder. Which 10 % of the training queries are held out, the order of lists and their cuts
come from the seed; the best of the passes is chosen by the teacher's first ten on the held-out queries. The learning
rate, one for all pieces, is that of .0003, .001 and .003 with the best held-out value of `kl` (and of `margin-mse`) on
scifact at seed 100, which is not reported.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

# piece -> (changed settings, policies); DistillConfig's own defaults but for what `_CONFIG` names
Piece = tuple[dict[str, Any], dict[str, Any]]
OBJECTIVES = (
    "kl", "margin-mse", "plackett-luce", "ranknet", "listnet", "listmle", "pointwise-mse", "reverse-kl",
    "jensen-shannon", "jeffreys", "weighted-ranknet", "pairwise-logistic", "hinge",
)  # fmt: skip
PLAIN: dict[str, Piece] = {
    **{name: ({"objective": name}, {}) for name in OBJECTIVES},
    **{
        f"{name}, raw scores": ({"objective": name, "target_transform": "none"}, {})
        for name in ("kl", "plackett-luce", "margin-mse", "pointwise-mse")
    },
    "kl, ranks as scores": ({"target_transform": "rank"}, {}),
    "plackett-luce, order only": ({"objective": "plackett-luce", "target_transform": "none"}, {"order": True}),
}
AROUND: dict[str, Piece] = {
    "kl, bd-kd": ({}, {"sample_weight": "bd-kd"}),
    "kl, taid": ({}, {"target": "taid"}),
    "kl, truncate:5": ({}, {"target": "truncate:5"}),
    "kl, confidence": ({}, {"sample_weight": "confidence"}),
    "kl, ddk by length": ({}, {"domains": "length"}),
    "kl, agreement filter": ({}, {"keep": "agreement"}),
}
LABELS: dict[str, Piece] = {
    "kl, dual head": ({}, {"head": "dual"}),
    "kl, own document in the first 3": ({}, {"keep": "own-top:3"}),
}
ASKED: dict[str, Piece] = {
    f"{policy} {budget:g}": ({}, {"acquire": policy, "budget": budget})
    for policy in ("random", "margin", "rad")
    for budget in (0.1, 0.25, 0.5)
}
VECTORS: dict[str, Piece] = {
    "kl": ({}, {}),
    **{
        f"kl + {name}": ({}, {"representation": name})
        for name in ("mi-alpha", "infonce", "similarity-preserving", "affinity-kl", "cosine", "feature-mse")
    },
    # at the common weight of .1 these two are worth some 1e-5; 3000 is the paper's
    "kl + similarity-preserving, weight 3000": (
        {},
        {"representation": "similarity-preserving", "representation_weight": 3000.0},
    ),
    "kl + affinity-kl, weight 300": ({}, {"representation": "affinity-kl", "representation_weight": 300.0}),
    **{
        f"kl, both teachers by {rule}": ({}, {"combine": rule})
        for rule in ("z-mean", "mean", "median", "reciprocal-rank", "confidence")
    },
}
BI = ", bi-encoder teacher"
COLLECTIONS: dict[str, list[dict[str, Piece]]] = {
    "scifact": [PLAIN, {**AROUND, **LABELS}, ASKED],
    "msmarco-dl19": [PLAIN, AROUND, ASKED],
    f"scifact{BI}": [VECTORS],
    f"msmarco-dl19{BI}": [VECTORS],
}
_CONFIG = {
    "objective": "kl", "target_transform": "standardise", "epochs": 8, "batch_lists": 16, "list_size": 16,
    "held_out": 0.1, "learning_rate": 3e-3,
}  # fmt: skip


def run_of(options: Any, dataset: str) -> Callable[[int], Callable[[Piece], dict[str, Any]]]:
    """Seed -> (piece -> its measured values), on one collection."""
    from structkd.ranking.distillation import DistillConfig, distill
    from structkd.ranking.evaluation.measures import evaluate_run, rerank
    from structkd.ranking.models.static import StaticScorer
    from structkd.ranking.teachers.sources import EnsembleScorer
    from structkd.ranking.training.policies import Policies

    name = dataset.removesuffix(BI)
    test, train, first_stage, lists, own, order = _parts(options, name)
    texts = _texts(name, (test, first_stage), (train, lists))
    start = StaticScorer(_student(_table(texts, _encoded(options, name, texts, (2, 5)))), name="two frozen layers")
    teacher = own
    if name != dataset:
        teacher = StaticScorer(_table(texts, _encoded(options, name, texts, range(6))), name="six layers")

    def measured(student: Any) -> Any:
        return evaluate_run(test, rerank(test, student, first_stage), "nDCG@10")

    before = measured(start).measures["nDCG@10"]
    ceiling = evaluate_run(test, first_stage, "nDCG@10").measures["nDCG@10"]

    def of_seed(seed: int) -> Callable[[Piece], dict[str, Any]]:
        def run(piece: Piece) -> dict[str, Any]:
            settings, policies = piece
            chosen = dict(policies)
            asked = order if chosen.pop("order", False) else teacher
            if rule := chosen.pop("combine", ""):
                asked = EnsembleScorer([own, teacher], rule)
            config = DistillConfig(**{**_CONFIG, **settings, "seed": seed})
            found = distill(copy.deepcopy(start), asked, train, config, candidates=lists, policies=Policies(**chosen))
            after, best = measured(found.student), found.metrics["best"]["measures"]
            return {
                "test": after.measures["nDCG@10"], "before": before, "teacher": ceiling,
                "valid": next(iter(best.values()), None), "per_query": after.per_query["nDCG@10"],
            }  # fmt: skip

        return run

    return of_seed


def _parts(options: Any, dataset: str) -> tuple[Any, ...]:
    """Test and training collections, first stage, training lists, the teacher, and the teacher as an order."""
    from structkd.ranking.data.datasets import load
    from structkd.ranking.data.negatives import bm25_candidates
    from structkd.ranking.teachers.sources import Bm25Scorer, RunScorer
    from structkd.trec import read_run, write_run

    folder, kept = Path(options.data) / "ranking", Path(options.work) / f"{dataset}-order.tsv"
    if dataset == "scifact":
        test, train = load(str(folder / "scifact")), load(str(folder / "scifact"), "train")
        repeated = {"871", "1291"}  # training queries whose text is a test query's
        train = train.with_queries([query for query in train.queries.ids if query not in repeated][:200])
        test = test.with_queries(list(test.queries.ids)[:150])
        first_stage, lists = bm25_candidates(test, 20), bm25_candidates(train, 16)
        teacher: Any = Bm25Scorer(train.documents)
    else:
        test, train = load(str(folder / "msmarco-dl19")), load(str(folder / "msmarco-dl22"))
        first_stage = read_run(folder / "msmarco-dl19" / "runs" / "bm25.tsv").cut(50)
        teacher = RunScorer(folder / "msmarco-dl22" / "runs" / "splade_p_p_ensemble_distil.tsv")
        lists = teacher.run.cut(32)
    write_run(kept, lists)
    return test, train, first_stage, lists, teacher, RunScorer(kept, by_rank=True)


def _texts(dataset: str, *parts: tuple[Any, Any]) -> list[str]:
    """Every text that is met, once: queries, and documents of the lists."""
    texts: dict[str, None] = {}
    for collection, run in parts:
        named = sorted({document for own, _ in run.lists.values() for document in own})
        rows = collection.documents.ids.rows(named, dataset)
        texts |= dict.fromkeys([*collection.queries.texts, *(collection.documents.texts[row] for row in rows)])
    return list(texts)


def _table(texts: list[str], vectors: Any) -> Any:
    """An encoder that knows these texts alone: one frozen vector for each."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({text: row for row, text in enumerate(texts)}, unk_token=texts[0]))
    table = StaticEmbedding(tokenizer, embedding_weights=torch.from_numpy(vectors))
    table.embedding.weight.requires_grad_(False)
    return SentenceTransformer(modules=[table], similarity_fn_name="cosine", device="cpu")


def _student(table: Any) -> Any:
    """The frozen vectors and a linear map on them, the identity at first."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    width = table.get_embedding_dimension()
    head = Dense(width, width, bias=False, activation_function=torch.nn.Identity())
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(width))
    return SentenceTransformer(modules=[table[0], head], similarity_fn_name="cosine", device="cpu")


def _encoded(options: Any, dataset: str, texts: list[str], layers: Iterable[int]) -> Any:
    """Unit vectors of some layers of the encoder, kept in blocks below WORK."""

    from starts import with_layers

    chosen = list(layers)
    folder = Path(options.work) / "vectors" / dataset / "-".join(map(str, chosen))
    folder.mkdir(parents=True, exist_ok=True)
    order, model = np.argsort([len(text) for text in texts], kind="stable"), None
    out: Any = None
    for low in range(0, len(texts), 256):
        rows, path = order[low : low + 256], folder / f"{len(texts)}-{low}.npy"
        if not path.is_file():
            if model is None:
                started = time.process_time()
                model = with_layers(options.init, chosen)
                model.max_seq_length = 64
            block = model.encode(
                [texts[row] for row in rows], batch_size=64, normalize_embeddings=True, show_progress_bar=False
            )
            np.save(path, block)
        block = np.load(path)
        out = np.zeros((len(texts), block.shape[1]), dtype=np.float32) if out is None else out
        out[rows] = block
    if model is not None:
        print(f"{dataset}: {len(texts)} texts encoded in {time.process_time() - started:.0f} s", flush=True)
    return out


def mean_per_query(runs: list[Mapping[str, Any]]) -> dict[str, float]:
    """A query's value, the mean over runs."""
    return {query: float(np.mean([run["per_query"][query] for run in runs])) for query in runs[0]["per_query"]}
