"""The architecture as a test: which module may import which, and where third-party packages may appear."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "structkd"

# Every folder's entries, bottom to top. A module or folder imports entries of lower groups only; those of one
# group stand apart and never import each other.
ORDER = {
    "": [
        {"errors", "kernels", "text"},
        {"files", "ids", "progress"},
        {"packed"},
        {"ordering"},
        {"trec", "runs"},
        {"objectives", "scores", "index", "report", "acquisition"},
        {"policies"},
        {"graph", "ranking"},
        {"quickstart"},
        {"cli"},
    ],
    # listwise reads the direction weights of balanced_kl from weights
    "objectives": [
        {"_masks"},
        {"targets", "weights", "ensembles", "subclasses"},
        {"pairwise", "listwise", "representation"},
        {"dual_head", "fusion_ratio"},
    ],
    "scores": [
        {"manifest"},
        {"layout", "card", "remote"},  # a mirror checks the manifest
        {"compaction"},
        {"bundle"},  # the published layout, which open() reads too
        {"pairs", "nodes"},
        {"store"},
        {"cache"},
        {"produce"},
        {"formats"},
        {"importing"},
        {"publish"},
        {"calibrate", "compare", "doctor", "provenance"},
    ],
    "scores/layout": [
        {"document_rows", "sealed", "topk"},
        {"_lookup"},
        {"id_table", "parts", "part_list"},
        {"snapshot"},
        {"shards", "log"},
    ],
    "scores/compaction": [{"statistics", "merge"}, {"pairs", "rows"}, {"compact"}],
    "scores/formats": [
        {"_opcodes", "base"},
        {"delimited"},
        {"margins", "runs"},
        {"json_lines", "pickles", "tables"},
        {"node_files"},
        {"registry"},
    ],
    "index": [
        {"fusion", "topk", "vectors"},
        {"choice", "folder", "neighbours"},
        {"base", "opened"},
        {"flat", "text"},
        {"recall"},  # is measured against flat
        {"approximate", "multi_vector"},
        {"kinds"},
    ],
    "index/folder": [{"manifest", "names"}, {"storage"}, {"draft"}, {"blocks"}],
    "index/text": [{"bm25", "lucene"}],
    "index/approximate": [{"faiss_gpu", "tuning"}, {"faiss_index", "milvus"}],
    "index/multi_vector": [{"_maxsim", "codebooks"}, {"candidates"}, {"late_interaction"}],
    "report": [{"statistics", "compare"}, {"draw"}, {"page"}],
    "graph": [
        {"kernels", "figures", "published"},
        {"data", "published_students"},
        {"config", "evaluate", "losses", "spectral"},
        {"models"},
        {"targets"},
        {"methods", "link_prediction"},
        {"policies"},
        {"distillation"},
        {"serving", "storage"},
        {"spectrum"},
        {"shown"},  # what a comparison keeps for its report
        {"bench"},
    ],
    "graph/kernels": [{"_edges", "_layers", "_sample", "_transport", "_walks"}],
    "graph/data": [{"hetero", "sparse"}, {"task"}, {"inputs", "sampling", "splits"}, {"readers"}, {"datasets"}],
    "graph/models": [
        {"networks"},
        {"heads"},
        {"students"},
        {"sampled", "train"},
        {"teacher"},
        {"embeddings", "stages"},
    ],
    "graph/targets": [{"fusing", "shares"}, {"committee"}, {"views"}, {"estimate"}],
    "graph/methods": [
        {"positions"},
        {"lesson"},
        {"boosting", "dirichlet", "influence", "moments", "nosmog", "reliability"},
        {"hardness"},  # reads the entropy of reliability
        {"table", "minibatch"},  # families of methods stand between lesson and the table
    ],
    "graph/policies": [{"flags"}, {"asked_nodes", "domains", "hidden_term", "label_ratios", "node_term"}, {"lesson"}],
    "graph/link_prediction": [{"task"}, {"distillation"}, {"bench"}],
    "graph/serving": [{"calibration", "export", "latency"}],
    "ranking": [
        {"data"},
        {"models"},
        {"card", "training"},
        {"teachers"},
        {"evaluation"},
        {"distillation", "self_distillation"},
        {"export"},
        {"bench"},
    ],
    "ranking/data": [
        {"collection", "token_store"},
        {"check", "datasets", "tokens"},
        {"answers", "budget", "negatives", "pair_pool"},
    ],
    "ranking/models": [
        {"maxsim", "scorer"},
        {"prett_model", "prett_store", "sides"},
        {"bi_encoder", "cross_encoder", "multi_vector", "prett", "tk"},
        {"dual", "static"},
        {"students"},
        {"encoders"},
    ],
    "ranking/training": [{"_dropout"}, {"dropout"}, {"in_batch", "losses", "train"}, {"policies", "topics"}, {"live"}],
    "ranking/teachers": [{"sources", "teacher", "teacher_ray"}],
    "ranking/evaluation": [{"measures", "selection"}, {"cases", "frontier"}, {"held_out", "run_folder"}],
    "ranking/self_distillation": [{"pseudo_labels"}, {"isotropy"}, {"cycles"}],
    "cli": [{"output"}, {"data", "graph", "index", "quickstart", "ranking", "report", "scores"}, {"app"}],
    "cli/graph": [{"links", "serving"}, {"main"}],
    "cli/ranking": [{"bench", "evaluate", "order", "score", "self_distill", "serving"}, {"main"}],
}

FENCES = {
    "cyclopts": {"cli/"},
    "rich": {"progress.py", "cli/"},
    "pyarrow": {
        "packed.py",
        "scores/layout/sealed.py",
        "scores/layout/id_table.py",
        "scores/layout/parts.py",
        "scores/layout/log.py",
        "scores/layout/snapshot.py",
        "scores/bundle.py",
        "scores/formats/delimited.py",
        "scores/formats",
    },
    "safetensors": {
        "scores/formats/node_files.py",
        "scores/layout/snapshot.py",
        "scores/formats/registry.py",
        "scores/layout/topk.py",
        "index/folder/draft.py",
        "index/folder/storage.py",
        "runs.py",
        "ranking/models/tk.py",
        "ranking/models/prett.py",
    },
    "fsspec": {"scores/remote.py"},
    "numba": {
        "kernels.py",
        "ranking/training/_dropout.py",
        "scores/layout/_lookup.py",
        "scores/formats/_opcodes.py",
        "graph/kernels/_edges.py",
        "graph/kernels/_layers.py",
        "graph/kernels/_sample.py",
        "graph/kernels/_transport.py",
        "graph/kernels/_walks.py",
        "index/multi_vector/_maxsim.py",
    },
    "faiss": {"index/approximate/faiss_gpu.py", "index/approximate/faiss_index.py", "index/multi_vector/codebooks.py"},
    "bm25s": {"index/text/bm25.py"},
    "Stemmer": {"index/text/bm25.py"},
    "pyserini": {"index/text/lucene.py"},
    "jnius": {"index/text/lucene.py"},
    "jnius_config": {"index/text/lucene.py"},
    "pymilvus": {"index/approximate/milvus.py"},
    "torch_geometric": {
        "graph/data/task.py",
        "graph/data/hetero.py",
        "graph/models/networks.py",
        "graph/data/datasets.py",
    },
    "scipy": {"graph/", "index/", "ranking/evaluation/measures.py", "report/statistics.py"},  # t-tests and t-intervals
    "sklearn": {"graph/data/datasets.py"},
    "sentence_transformers": {
        "ranking/models/bi_encoder.py",
        "ranking/models/cross_encoder.py",
        "ranking/models/dual.py",
        "ranking/models/multi_vector.py",
        "ranking/models/static.py",
    },
    "transformers": {"ranking/models/scorer.py", "ranking/models/prett.py", "ranking/data/tokens.py"},
    "accelerate": {"ranking/training/train.py"},
    "ir_measures": {"ranking/evaluation/measures.py"},
    "ray": {"ranking/teachers/teacher_ray.py"},
    "onnx": {"graph/serving/export.py"},
    "onnxruntime": {"graph/serving/export.py"},
    "jinja2": {"report/page.py"},
    "matplotlib": {"report/draw.py"},
    "datasets": set(),
    "pandas": set(),
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in a file, `from a import b` as `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def places(folder: str) -> dict[str, int]:
    """The height of each entry of a folder."""
    return {entry: height for height, group in enumerate(ORDER[folder]) for entry in group}


def violations(path: Path, names: set[str]) -> list[str]:
    """Every forbidden edge from one file (relative to the package) to the names it imports."""
    relative = path.relative_to(ROOT) if path.is_absolute() else path
    own = list(relative.with_suffix("").parts)
    out = []
    for name in sorted(names):
        top, *target = name.split(".")
        if top in FENCES and not any(str(relative).startswith(fence) for fence in FENCES[top]):
            out.append(f"{relative} imports {top}, which only {sorted(FENCES[top])} may")
        if top != "structkd" or own[0] in ("__init__", "__main__"):
            continue
        shared = next(i for i, part in enumerate([*own, None]) if target[i : i + 1] != [part])  # folders in common
        folder, other = "/".join(own[:shared]), target[shared] if shared < len(target) else ""
        if own[shared:] in ([], ["__init__"]) or folder not in ORDER:
            continue  # a package's own face, or a name of the very module
        heights = places(folder)
        if other not in heights:
            if folder:
                package = "structkd." + folder.replace("/", ".")
                out.append(f"{relative} imports from the package root {package}; name the module")
        elif heights[other] >= heights[own[shared]]:
            out.append(f"{relative} imports {'.'.join(['structkd', *target[: shared + 1]])}, not below {own[shared]}")
    return out


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert violations(path, imports(path)) == []


def test_every_module_has_its_place() -> None:
    for path in modules():
        *folders, name = path.relative_to(ROOT).with_suffix("").parts
        entries = [*folders, *({name} - {"__init__", "__main__"})]
        for depth, entry in enumerate(entries):
            assert entry in places("/".join(entries[:depth])), f"{path.relative_to(ROOT)}: {entry} has no place"
    for folder in ORDER:
        for entry in places(folder):
            assert (ROOT / folder / entry).is_dir() or (ROOT / folder / f"{entry}.py").is_file(), f"{folder}: {entry}?"


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("graph/models/train.py", "structkd.ranking.data.collection", "not below graph"),
        ("scores/layout/log.py", "structkd.index.base", "not below scores"),
        ("scores/manifest.py", "structkd.scores.cache.Scorer", "not below manifest"),
        ("graph/models/train.py", "structkd.graph.distillation", "not below models"),
        ("graph/models/train.py", "structkd.graph.models.teacher.Teacher", "not below train"),
        ("graph/models/train.py", "structkd.graph.models", "name the module"),
        (
            "ranking/distillation.py",
            "faiss",
            "only ['index/approximate/faiss_gpu.py', 'index/approximate/faiss_index.py', "
            "'index/multi_vector/codebooks.py'] may",
        ),
        ("objectives/pairwise.py", "structkd.objectives.margin_mse", "name the module"),
    ],
)
def test_the_test_itself_refuses(path: str, name: str, message: str) -> None:
    assert any(message in violation for violation in violations(Path(path), {name}))


def test_import_structkd_loads_nothing_heavy() -> None:
    code = (
        "import sys, structkd; heavy = {'torch','faiss','numba','jnius','jpype','numpy','scipy','transformers',"
        "'sentence_transformers','torch_geometric','pyarrow','rich','cyclopts'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from structkd.cli.app import run; assert run(['--help']) == 0; "
        "heavy = {'torch','faiss','numba','transformers'} & set(sys.modules); sys.exit(repr(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
