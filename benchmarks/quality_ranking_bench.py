"""Students x objectives x seeds over small collections, through `structkd.ranking.bench`; some 25 minutes on one core.

    python benchmarks/quality_ranking_bench.py --data COLLECTIONS --init ALL_MINILM_L6_V2 --work DIR [--parts a b]

Students start from two layers of all-MiniLM-L6-v2 (tk from nothing); teachers are the whole six layers (T1), the same
reading no more of a text than the students do (T1-64), and T1 with BM25 (T2). Cells are small on purpose: 32 training
queries, 16 candidates each, texts cut to 64 tokens, a fixed number of epochs with nothing chosen on the way.
One JSON per part in results/; finished cells are kept in DIR and read back.

Parts that begin with large train longer (400 training queries, 32 candidates, texts of 128 tokens, 4 passes, up to 300
test queries, every student at its own default rate, search of the whole collection beside re-ranking); a cell of short
or few texts takes minutes of one core, others want a device.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from origin import RESULTS, commit, machine
from sentence_transformers import SentenceTransformer
from starts import saved

from structkd.files import write_json
from structkd.ranking.bench import BenchConfig, bench
from structkd.ranking.distillation import DistillConfig
from structkd.runs import versions

THREE = ("margin-mse", "kl", "plackett-luce")
SETTINGS: dict[str, Any] = {"depth": 16, "train_queries": 32, "test_queries": 50, "max_length": 64, "objectives": THREE}
WIKIQA = ("wikiqa-dev,wikiqa-train",)
PARTS: dict[str, dict[str, Any]] = {
    "wikiqa_losses": {
        "collections": WIKIQA,
        "objectives": (*THREE, "pointwise-mse", "weighted-ranknet"),
        "seeds": (0, 1, 2),
        "test_queries": 100,
    },
    "wikiqa_t2": {
        "collections": WIKIQA,
        "teachers": ("T2",),
        "objectives": ("margin-mse",),
        "seeds": (0, 1, 2),
        "test_queries": 100,
    },
    "dl19": {"collections": ("msmarco-dl19,msmarco-dl22",), "seeds": (0, 1)},
    "cranfield": {"collections": ("cranfield",), "seeds": (0, 1), "retrieve": True},
    "wikiqa_students": {"collections": WIKIQA, "students": ("colbert", "tk", "prett", "cat"), "test_queries": 100},
    "scifact": {"collections": ("scifact",), "seeds": (0, 1, 2), "teachers": ("T1-64",)},
    "cisi": {"collections": ("cisi",), "seeds": (0, 1, 2), "teachers": ("T1-64",)},
    "nfcorpus": {"collections": ("nfcorpus",), "seeds": (0, 1, 2), "teachers": ("T1-64",)},
    "tk": {
        "collections": ("scifact", "cisi", "nfcorpus"),
        "teachers": ("T1-64",),
        "students": ("tk",),
        "seeds": (0, 1, 2),
    },
}
_LARGE = {"depth": 32, "train_queries": 400, "test_queries": 300, "max_length": 128, "retrieve": True, "large": True}
_OTHERS = ("colbert", "tk", "prett", "cat")
for _name, _collection in {
    "scifact": "scifact",
    "nfcorpus": "nfcorpus",
    "dl19": "msmarco-dl19,msmarco-dl22",
    "cranfield": "cranfield",
    "cisi": "cisi",
    "wikiqa": "wikiqa-dev,wikiqa-train",
}.items():
    PARTS[f"large-{_name}"] = {**_LARGE, "collections": (_collection,), "seeds": (0, 1, 2)}
    PARTS[f"large-{_name}-t2"] = {**PARTS[f"large-{_name}"], "teachers": ("T2",), "objectives": ("margin-mse",)}
    PARTS[f"large-{_name}-students"] = {**PARTS[f"large-{_name}"], "students": _OTHERS, "seeds": (0,)}


def short_sighted(init: str, folder: Path, length: int) -> str:
    """The whole model, reading `length` tokens of a text."""
    if not folder.is_dir():
        model = SentenceTransformer(init, device="cpu")
        model.max_seq_length = length
        model.save(str(folder))
    return str(folder)


def share_scores(work: Path, name: str) -> None:
    """All parts read and fill one score cache."""
    kept = work / "scores"
    kept.mkdir(parents=True, exist_ok=True)
    (work / name).mkdir(exist_ok=True)
    if not (work / name / "scores").exists():
        (work / name / "scores").symlink_to(kept, target_is_directory=True)


def configured(part: dict[str, Any], options: argparse.Namespace, start: str) -> BenchConfig:
    """The part's settings with real paths."""
    length = SETTINGS["max_length"]
    short = short_sighted(options.init, Path(options.work, f"teacher-{length}"), length)
    names = {
        "T1": f"bi-encoder:{options.init}",
        "T1-64": f"bi-encoder:{short}",
        "T2": f"bi-encoder:{options.init}+bm25",
    }
    values = {"teachers": ("T1",), **SETTINGS, **part}
    large = values.pop("large", False)
    values["teachers"] = tuple(names[name] for name in values["teachers"])
    values["collections"] = tuple(
        ",".join(str(Path(options.data, name)) for name in pair.split(",")) for pair in values["collections"]
    )
    # cosines spread by .2 within a list, the students' scaled scores by 4: margins need one scale
    own_rate = large or "tk" in values.get("students", ())  # each student's own rate
    loop = DistillConfig(
        epochs=4 if large else 2,
        batch_lists=8 if large else 4,
        learning_rate=0.0 if own_rate else 2e-4,
        target_transform=options.transform,
        held_out=0.0,
        validate_on="none",
    )
    return BenchConfig(init=start, distill=loop, **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "init", "work"):
        parser.add_argument(f"--{name}", required=True)
    small = [name for name in PARTS if not name.startswith("large")]
    parser.add_argument("--parts", nargs="+", default=small, choices=list(PARTS))
    parser.add_argument("--transform", default="standardise", choices=["standardise", "auto"])
    parser.add_argument("--seeds", type=int, help="the first so many of each part's seeds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(options.work)
    start = saved(options.init, work / "start")
    for name in options.parts:
        part = PARTS[name]
        part |= {"seeds": part.get("seeds", (0,))[: options.seeds]}
        config = configured(part, options, start)
        share_scores(work, name)
        found = bench(config, work / name)
        loop = {
            key: getattr(config.distill, key) for key in ("epochs", "batch_lists", "learning_rate", "target_transform")
        }
        result = {
            "command": f"python benchmarks/quality_ranking_bench.py --parts {name}",
            "commit": commit(),
            "machine": f"{machine()}, one thread",
            "versions": versions(),
            "settings": {**SETTINGS, **part, **loop},
            "rows": found["rows"],
            "frontier": found["frontier"],
        }
        write_json(options.results / f"ranking_bench_{name}.json", result)
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
