"""Who made the scores and what a store holds: teacher identity, the store's header, snapshot manifests, reports."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from structkd.errors import CorruptFileError, DataError, TeacherMismatchError, UsageError
from structkd.files import read_json
from structkd.ids import fingerprint_json

FORMAT = "structkd-scores"
VERSION = 1
HEADER = "cache.json"
PUBLISHED = "manifest.json"
SEAL = "json_sha256"  # every JSON file of a store carries the fingerprint of its other fields


@dataclass(frozen=True)
class TeacherSpec:
    """What decides a teacher's scores, and nothing else.

    Batch size, device, library versions, paths and times belong to provenance: they never change the fingerprint.
    Equal fingerprints mean interchangeable scores; a store refuses scores of any other fingerprint.
    """

    model: str
    "Model id (hub name, or a name of your own for a local checkpoint)."

    kind: Literal["pairs", "rows"] = "pairs"
    "pairs: scores of (query, document) pairs; rows: logits of nodes."

    revision: str | None = None
    "Resolved commit of the weights, never a branch name."

    weights_sha256: str | None = None
    "SHA-256 of the weights; needed for a local checkpoint."

    tokenizer_sha256: str | None = None
    "SHA-256 of the tokenizer file."

    max_length: int | None = None
    "Tokens after which input is cut."

    truncation: str | None = None
    "Which side or which text is cut."

    prompt: str | None = None
    "Prompt or template around the texts."

    head: str | None = None
    "Output used: head, activation, logit index."

    dtype: str = "float32"
    "Compute dtype of the forward pass."

    code_version: str = "1"
    "Version of the scoring code; raise it when the same weights give other scores."

    extra: dict[str, Any] = field(default_factory=dict)
    "Anything else that changes scores (JSON values): adapters, architecture, fan-outs, sampling seed."

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("TeacherSpec: model is empty; give the teacher a name.")
        if self.kind not in ("pairs", "rows"):
            raise UsageError(f"TeacherSpec: kind {self.kind!r}; expected 'pairs' or 'rows'.")
        try:
            json.dumps(self.extra, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"TeacherSpec: extra must hold JSON values only ({error}).") from None

    def fields(self) -> dict[str, Any]:
        """The declared fields; those left at None, and an empty `extra`, are absent, so new fields keep old stores."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None and value != {}}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, no white space, ASCII) of `fields()`, hexadecimal."""
        return fingerprint_json(self.fields())

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str | Path) -> "TeacherSpec":
        """The spec written in a header or manifest; DataError when it has fields this version does not know."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise DataError(f"{where}: teacher fields {sorted(unknown)} are unknown. Was a newer release used?")
        if "model" not in fields:
            raise CorruptFileError(f"{where}: the teacher has no model field.")
        return cls(**dict(fields))

    def require(self, expected: "TeacherSpec", where: str | Path) -> None:
        """TeacherMismatchError with every differing field unless this is the expected teacher."""
        found, want = _flat(self.fields()), _flat(expected.fields())
        differing = {
            name: (found.get(name), want.get(name))
            for name in sorted(set(found) | set(want))
            if found.get(name) != want.get(name)
        }
        if differing:
            raise TeacherMismatchError(str(where), differing)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` entries as fields of their own (extra.NAME), so that a message names the one that differs."""
    extra = fields.get("extra", {})
    return {name: value for name, value in fields.items() if name != "extra"} | {
        f"extra.{name}": value for name, value in extra.items()
    }


@dataclass(frozen=True)
class Header:
    """cache.json: written once, create-exclusive; two processes that race write the same bytes."""

    spec: TeacherSpec
    graph_fingerprint: str | None = None
    num_nodes: int | None = None
    num_classes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The sealed JSON object."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.spec.kind,
            "teacher": self.spec.fields(),
            "teacher_fp": self.spec.fingerprint,
            "key": "(id, text hash); where the text was unknown, the id alone"
            if self.spec.kind == "pairs"
            else "(graph fingerprint, node row)",
            "value_names": ["score"] if self.spec.kind == "pairs" else ["logits"],
        }
        if self.spec.kind == "rows":
            value |= {"graph_fp": self.graph_fingerprint, "nodes": self.num_nodes, "classes": self.num_classes}
        return sealed(value)

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """Header of a store; DataError when the folder is none."""
        path = folder / HEADER
        if not path.is_file():
            raise DataError(f"{folder}: no {HEADER} there; expected a folder of teacher scores.")
        value = unsealed(path)
        spec = TeacherSpec.of(value["teacher"], path)
        if spec.fingerprint != value["teacher_fp"]:
            raise CorruptFileError(f"{path}: teacher_fp does not fit the teacher's fields. Do not use this store.")
        return cls(spec, value.get("graph_fp"), value.get("nodes"), value.get("classes"))


@dataclass(frozen=True)
class ScoreManifest:
    """One snapshot (or one published folder): where the data lies, what went in, and what it holds.

    `parts` says how many parts went in, the digest of their names, and where their list lies (see `part_list`); in a
    published folder, which holds no parts, the first two alone.
    """

    kind: str
    snapshot: int
    parent: int | None
    teacher: dict[str, Any]
    teacher_fp: str
    provenance: dict[str, Any]
    inputs: dict[str, str]
    parts: dict[str, Any]
    files: list[dict[str, Any]]
    counts: dict[str, int]
    stats: dict[str, Any]
    dtype: str
    quant_error: dict[str, float]
    created_at: str
    license: str | None = None
    citation: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def spec(self) -> TeacherSpec:
        """The teacher."""
        return TeacherSpec.of(self.teacher, "manifest")

    def to_json(self) -> dict[str, Any]:
        """The sealed JSON object."""
        return sealed({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "ScoreManifest":
        """A manifest; CorruptFileError when its seal is broken."""
        value = unsealed(path)
        known = {f.name for f in dataclasses.fields(cls)}
        missing = sorted(known - set(value) - {"license", "citation", "notes"})
        if missing:
            raise CorruptFileError(f"{path}: fields {missing} are missing. Is it a manifest of structkd scores?")
        if not isinstance(value["parts"], dict):
            raise DataError(
                f"{path}: of an earlier development version. Delete the folder's snapshots/ and compact it."
            )
        manifest = cls(**{name: item for name, item in value.items() if name in known})
        if manifest.spec.fingerprint != manifest.teacher_fp:
            raise CorruptFileError(f"{path}: teacher_fp does not fit the teacher's fields. Do not use this store.")
        return manifest


@dataclass(frozen=True)
class Problem:
    """One thing that `verify` found."""

    path: str
    problem: str


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        files: how many files were read.
        problems: empty when everything is sound.
    """

    files: int
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """True when there is no problem."""
        return not self.problems


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with the fingerprint of its fields added."""
    return {**value, SEAL: fingerprint_json(value)}


def unsealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON object; CorruptFileError when a field was changed, DataError for a foreign format."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{path}: not a file of structkd scores (no format {FORMAT!r}).")
    if value.get("version") != VERSION:
        raise DataError(f"{path}: version {value.get('version')!r}; this release reads {VERSION}. Update structkd.")
    seal = value.pop(SEAL, None)
    if seal != fingerprint_json(value):
        raise CorruptFileError(f"{path}: its content differs from its own checksum. Restore it from a copy.")
    return value


def now() -> str:
    """UTC time for manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")
