"""The architecture as a test: which module may import which, and where third-party packages may appear."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "structkd"

# top-level units, bottom to top; a unit imports only units of a lower layer ("apart": same layer, never each other)
LAYERS = [
    {"errors", "text"},
    {"files", "ids", "progress"},
    {"packed"},
    {"ordering"},
    {"trec", "runs"},
    {"objectives", "scores", "index", "report", "acquisition"},
    {"policies"},
    {"graph", "ranking"},
    {"quickstart"},
    {"cli"},
]

# inside a subpackage, left to right; modules in one group do not import each other
INSIDE = {
    # listwise reads the direction weights of balanced_kl from weights
    "objectives": [
        {"_masks"},
        {"targets", "weights", "ensembles", "subclasses"},
        {"pairwise", "listwise", "representation"},
        {"dual_head", "fusion_ratio"},
    ],
    "scores": [
        {"manifest", "document_rows", "_opcodes", "sealed", "topk"},
        {"card", "_lookup"},
        {"id_table", "parts", "part_list", "remote"},  # a mirror checks the manifest
        {"snapshot"},
        {"shards", "log", "statistics"},
        {"merge"},
        {"compact_pairs", "compact_rows"},
        {"compaction"},
        {"bundle"},  # the published layout, which open() reads too
        {"pairs", "nodes"},
        {"store"},
        {"cache", "formats_base"},
        {"produce", "delimited"},
        {"formats_margins", "formats_runs"},
        {"formats_json", "formats_pickle", "formats_tables"},
        {"formats_nodes"},
        {"formats"},
        {"importing"},
        {"publish"},
        {"calibrate", "compare", "doctor", "provenance"},
    ],
    "index": [
        {"_maxsim", "codebooks", "manifest", "names", "topk", "vectors", "fusion"},
        {"candidates", "neighbours", "storage"},
        {"base", "draft", "opened"},
        {"blocks", "choice", "faiss_gpu", "flat", "lexical", "lucene"},
        {"recall"},  # is measured against flat
        {"tuning"},
        {"ann", "milvus", "multivector"},
        {"kinds"},
    ],
    "report": [{"statistics", "compare"}, {"draw"}, {"page"}],
    "graph": [
        {"_edges", "_layers", "_sample", "_transport", "_walks", "figures", "hetero", "published"},
        {"sparse"},
        {"published_students"},
        {"data"},
        {"config", "inputs", "splits", "spectral", "sampling"},
        {"readers"},
        {"datasets", "fusing", "link_task", "losses", "models", "positions"},
        {"heads"},
        {"evaluate", "students"},
        {"sampled", "train"},
        {"shares"},
        {"committee"},
        {"views"},
        {"targets", "teacher"},
        {"embeddings", "links"},
        {"lesson", "link_bench", "stages"},
        {"boosting", "dirichlet", "influence", "moments", "nosmog", "reliability"},
        {"hardness"},  # reads the entropy of reliability
        {"methods", "minibatch"},  # the table; families of methods stand between lesson and it
        {"policies"},
        {"asked_nodes", "domains", "hidden_term", "label_ratios", "node_term"},
        {"policy_lesson"},
        {"distillation"},
        {"storage"},
        {"calibration", "export", "latency", "spectrum"},
        {"shown"},  # what a comparison keeps for its report
        {"bench"},
    ],
    "ranking": [
        {"data", "token_store"},
        {"check", "datasets", "in_batch", "losses", "maxsim", "tokens"},
        {"scorer"},
        {"card", "prett_model", "prett_store"},
        {"bi_encoder", "cross_encoder", "multi_vector", "prett", "tk"},
        {"dual", "static"},
        {"students"},
        {"encoders"},
        {"answers", "budget", "negatives", "evaluate", "sources", "pair_pool"},
        {"train", "pseudo_labels", "selection"},
        {"isotropy"},
        {"cases", "policies", "teacher", "teacher_ray", "topics"},
        {"evaluation_run", "held_out", "live"},
        {"distillation"},
        {"self_distill"},
        {"export", "frontier"},
        {"bench"},
    ],
    "cli": [
        {"output"},
        {"graph_links"},  # commands that graph puts beside its own
        {
            "data",
            "graph",
            "graph_serving",
            "index",
            "quickstart",
            "ranking",
            "ranking_bench",
            "ranking_score",
            "ranking_evaluate",
            "ranking_order",
            "ranking_self",
            "ranking_serving",
            "report",
            "scores",
        },
        {"app"},
    ],
}

FENCES = {
    "cyclopts": {"cli/"},
    "rich": {"progress.py", "cli/"},
    "pyarrow": {
        "packed.py",
        "scores/sealed.py",
        "scores/id_table.py",
        "scores/parts.py",
        "scores/log.py",
        "scores/snapshot.py",
        "scores/bundle.py",
        "scores/delimited.py",
        "scores/formats",
    },
    "safetensors": {
        "scores/formats_nodes.py",
        "scores/snapshot.py",
        "scores/formats.py",
        "scores/topk.py",
        "index/draft.py",
        "index/storage.py",
        "runs.py",
        "ranking/tk.py",
        "ranking/prett.py",
    },
    "fsspec": {"scores/remote.py"},
    "numba": {
        "scores/_lookup.py",
        "scores/_opcodes.py",
        "graph/_edges.py",
        "graph/_layers.py",
        "graph/_sample.py",
        "graph/_transport.py",
        "graph/_walks.py",
        "index/_maxsim.py",
    },
    "faiss": {"index/ann.py", "index/codebooks.py", "index/faiss_gpu.py"},
    "bm25s": {"index/lexical.py"},
    "Stemmer": {"index/lexical.py"},
    "pyserini": {"index/lucene.py"},
    "jnius": {"index/lucene.py"},
    "jnius_config": {"index/lucene.py"},
    "pymilvus": {"index/milvus.py"},
    "torch_geometric": {"graph/data.py", "graph/hetero.py", "graph/models.py", "graph/datasets.py"},
    "scipy": {"graph/", "index/", "ranking/evaluate.py", "report/statistics.py"},  # t-tests and t-intervals
    "sklearn": {"graph/datasets.py"},
    "sentence_transformers": {
        "ranking/bi_encoder.py",
        "ranking/cross_encoder.py",
        "ranking/dual.py",
        "ranking/multi_vector.py",
        "ranking/static.py",
    },
    "transformers": {"ranking/scorer.py", "ranking/prett.py", "ranking/tokens.py"},
    "accelerate": {"ranking/train.py"},
    "ir_measures": {"ranking/evaluate.py"},
    "ray": {"ranking/teacher_ray.py"},
    "onnx": {"graph/export.py"},
    "onnxruntime": {"graph/export.py"},
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


def violations(path: Path, names: set[str]) -> list[str]:
    """Every forbidden edge from one file (relative to the package) to the names it imports."""
    relative = path.relative_to(ROOT) if path.is_absolute() else path
    unit = relative.parts[0].removesuffix(".py")
    out = []
    for name in sorted(names):
        top, *rest = name.split(".")
        if top in FENCES and not any(str(relative).startswith(fence) for fence in FENCES[top]):
            out.append(f"{relative} imports {top}, which only {sorted(FENCES[top])} may")
        if top != "structkd" or not rest or unit in ("__init__", "__main__"):
            continue
        target = rest[0]
        layer_of = {u: i for i, layer in enumerate(LAYERS) for u in layer}
        if target not in layer_of:
            continue  # __version__
        if target != unit and layer_of[target] >= layer_of[unit]:
            out.append(f"{relative} imports structkd.{target}, which is not below {unit}")
        if target == unit and len(rest) > 1 and unit in INSIDE and relative.name != "__init__.py":
            inside = {m: i for i, group in enumerate(INSIDE[unit]) for m in group}
            me, other = relative.stem, rest[1]
            if other not in inside:
                out.append(f"{relative} imports from the package root structkd.{unit}; name the module")
            elif other != me and inside[other] >= inside[me]:
                out.append(f"{relative} imports {other}, which is not left of {me}")
    return out


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert violations(path, imports(path)) == []


def test_every_module_has_its_place() -> None:
    units = set().union(*LAYERS) | {"__init__", "__main__"}
    for path in modules():
        relative = path.relative_to(ROOT)
        assert relative.parts[0].removesuffix(".py") in units, f"{relative} stands in no layer"
        if len(relative.parts) > 1 and relative.stem != "__init__":
            assert relative.stem in set().union(*INSIDE[relative.parts[0]]), f"{relative} has no place in its folder"


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("graph/train.py", "structkd.ranking.data", "not below graph"),
        ("scores/log.py", "structkd.index.base", "not below scores"),
        ("scores/manifest.py", "structkd.scores.cache.Scorer", "not left of manifest"),
        ("graph/train.py", "structkd.graph.distillation", "not left of train"),
        ("ranking/distillation.py", "faiss", "only ['index/ann.py', 'index/codebooks.py', 'index/faiss_gpu.py'] may"),
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
