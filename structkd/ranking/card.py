"""The model card of a distilled student: README.md in its folder, with where its teacher's scores came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structkd import __version__
from structkd.files import write_text
from structkd.ranking.data.collection import Collection
from structkd.ranking.models.scorer import NeuralScorer
from structkd.scores.cache import Scorer
from structkd.scores.manifest import TeacherSpec

_LOADING = {
    "dot": ("sentence-transformers", 'SentenceTransformer("FOLDER")'),
    "static": ("sentence-transformers", 'SentenceTransformer("FOLDER")'),
    "colbert": ("sentence-transformers", 'MultiVectorEncoder("FOLDER")'),
    "cat": ("sentence-transformers", 'CrossEncoder("FOLDER")'),
}


def write_card(
    folder: str | Path,
    student: NeuralScorer,
    teachers: Sequence[Scorer],
    collection: Collection,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Path:
    """Write README.md beside the saved student and return its path.

    Args:
        folder: where the student was saved.
        student: the student.
        teachers: what it learned from; an ensemble is listed member by member.
        collection: what it was trained on.
        config: settings of the training.
        metrics: `before`, `best` and `steps` of the training.
    """
    path = Path(folder) / "README.md"
    write_text(path, card(student, teachers, collection, config, metrics))
    return path


def card(
    student: NeuralScorer,
    teachers: Sequence[Scorer],
    collection: Collection,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    """The card's text."""
    library, _ = _LOADING.get(student.kind, ("structkd", ""))
    parameters = sum(weight.numel() for weight in student.parameters())
    specs = list({spec.fingerprint: spec for teacher in teachers for spec in teacher_specs(teacher)}.values())
    parts = [
        f"---\nlibrary_name: {library}\ntags:\n- structkd\n- knowledge-distillation\n- {student.kind}\n---",
        f"# {student.kind} student of {', '.join(spec.model for spec in specs)}",
        f"Distilled with structkd {__version__}.",
        "## Student",
        _table(
            {
                "kind": student.kind,
                "parameters": f"{parameters:,}",
                "weights sha256": student.spec.weights_sha256,
                "tokenizer sha256": student.spec.tokenizer_sha256,
                "longest text (tokens)": student.spec.max_length,
            }
        ),
        "## Training",
        _table(
            {
                "collection": f"{collection.name} ({len(collection.queries)} queries, "
                f"{len(collection.documents)} documents)",
                **{name: config[name] for name in _SETTINGS if name in config},
                "steps": metrics.get("steps"),
            }
        ),
        "## Teacher",
        "Identity of the scores that the student learned from; a cache of the same fingerprint holds the same scores.",
        *(_table(_provenance(spec)) for spec in specs),
        "## Figures",
        _figures(metrics),
        "## Use",
        _use(student),
    ]
    return "\n\n".join(parts) + "\n"


_SETTINGS = (
    "objective", "margins", "target_transform", "temperature", "student_temperature", "student_scale", "in_batch",
    "epochs", "batch_lists", "list_size", "learning_rate", "validate_on", "held_out", "seed",
)  # fmt: skip


def teacher_specs(teacher: Scorer) -> list[TeacherSpec]:
    """The teacher's identity, or its members' when it is an ensemble."""
    members: list[Scorer] = list(getattr(teacher, "members", []))
    return [spec for member in members for spec in teacher_specs(member)] if members else [teacher.spec]


def _provenance(spec: TeacherSpec) -> dict[str, Any]:
    return {
        "model": spec.model,
        "fingerprint": spec.fingerprint,
        "weights sha256": spec.weights_sha256,
        "revision": spec.revision,
        "tokenizer sha256": spec.tokenizer_sha256,
        "longest input (tokens)": spec.max_length,
        "prompt": spec.prompt,
        "score": spec.head,
    }


def _figures(metrics: Mapping[str, Any]) -> str:
    before, best = metrics.get("before") or {}, (metrics.get("best") or {}).get("measures", {})
    if not best:
        return "No queries were held out, so nothing was measured while training."
    lines = ["| measure on held-out queries | before | after |", "|---|---|---|"]
    for name, value in best.items():
        first = f"{before[name]:.4f}" if name in before else ""
        lines.append(f"| {name} | {first} | {value:.4f} |")
    text = "These queries chose the checkpoint, so they are no test. Measure with `structkd ranking evaluate`."
    return "\n".join(lines) + f"\n\n{text}"


def _use(student: NeuralScorer) -> str:
    library, call = _LOADING.get(student.kind, ("structkd", ""))
    own = 'from structkd import ranking\n\nmodel = ranking.load_student("FOLDER")\nscores = model.score(pairs)'
    if library == "structkd":
        return f"```python\n{own}\n```"
    name = call.split("(")[0]
    return (
        f"```python\nfrom sentence_transformers import {name}\n\nmodel = {call}\n```\n\nor, with the same scores,\n\n"
        f"```python\n{own}\n```"
    )


def _table(rows: Mapping[str, Any]) -> str:
    """What is known; None and empty values are left out."""
    kept = {name: value for name, value in rows.items() if value not in (None, "")}
    lines = [f"| {name} | {_cell(value)} |" for name, value in kept.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
