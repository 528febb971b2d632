"""Published hyper-parameters as data, and the defaults for graphs that no paper tuned.

FF_G2M: Wu et al., AAAI 2023, released configuration files (Planetoid public split, random 20/500/1000 otherwise), read
by effect: the files' `dropout_s` acts on the GNN teacher and `dropout_t` on the MLP student. CPF_*: Zhang et al.
(GLNN), ICLR 2022, released configuration for the CPF protocol.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

from structkd.errors import UsageError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Recipe:
    """Everything a teacher and a student of one dataset are trained with."""

    layers: int = 2
    hidden: int = 256
    teacher_dropout: float = 0.5
    student_layers: int = 2
    student_hidden: int = 256
    student_dropout: float = 0.5
    temperature: float = 1.3
    label_weight: float = 0.2
    teacher_learning_rate: float = 0.01
    teacher_weight_decay: float = 5e-4
    learning_rate: float = 0.01
    weight_decay: float = 5e-4


def _row(
    layers: int, hidden: int, teacher: float, student: float, temperature: float, label_weight: float,
    learning_rate: float = 0.01,
) -> Recipe:  # fmt: skip
    """One row of the FF-G2M table; student and teacher share depth and width."""
    return Recipe(
        layers, hidden, teacher, layers, hidden, student, temperature, label_weight, learning_rate=learning_rate
    )


FF_G2M: dict[tuple[str, str], Recipe] = {
    ("cora", "gcn"): _row(3, 512, 0.5, 0.6, 1.5, 0.4),
    ("cora", "sage"): _row(3, 512, 0.3, 0.4, 1.3, 0.5),
    ("cora", "gat"): _row(3, 1024, 0.6, 0.3, 1.2, 0.5),
    ("citeseer", "gcn"): _row(2, 256, 0.5, 0.5, 1.5, 0.1),
    ("citeseer", "sage"): _row(2, 1024, 0.5, 0.5, 1.2, 0.1),
    ("citeseer", "gat"): _row(2, 2048, 0.5, 0.4, 1.0, 0.1),
    ("pubmed", "gcn"): _row(2, 1024, 0.6, 0.3, 1.5, 0.0),
    ("pubmed", "sage"): _row(2, 2048, 0.3, 0.6, 1.3, 0.0),
    ("pubmed", "gat"): _row(2, 2048, 0.5, 0.3, 1.2, 0.0),
    ("cs", "gcn"): _row(2, 1024, 0.6, 0.5, 1.5, 0.3),
    ("cs", "sage"): _row(2, 256, 0.3, 0.6, 1.4, 0.5),
    ("cs", "gat"): _row(2, 128, 0.5, 0.4, 1.1, 0.3),
    ("photo", "gcn"): _row(3, 2048, 0.6, 0.5, 1.3, 0.1, 0.001),
    ("photo", "sage"): _row(3, 1024, 0.4, 0.4, 1.5, 0.2, 0.001),
    ("photo", "gat"): _row(3, 256, 0.3, 0.3, 1.4, 0.3, 0.001),
}

_GLNN_TEACHER = Recipe(hidden=128, teacher_dropout=0.0, student_hidden=128, label_weight=0.0)

CPF_SAGE: dict[str, Recipe] = {
    "cora": replace(_GLNN_TEACHER, learning_rate=0.01, weight_decay=0.005, student_dropout=0.6),
    "citeseer": replace(_GLNN_TEACHER, learning_rate=0.01, weight_decay=0.001, student_dropout=0.1),
    "pubmed": replace(_GLNN_TEACHER, learning_rate=0.005, weight_decay=0.0, student_dropout=0.4),
    "photo": replace(_GLNN_TEACHER, learning_rate=0.005, weight_decay=0.002, student_dropout=0.3),
}

GCNII: dict[str, tuple[int, int, float]] = {
    "cora": (64, 64, 0.6), "citeseer": (32, 256, 0.7), "pubmed": (16, 256, 0.5),
}  # fmt: skip
"Depth, width and dropout of Chen et al., ICML 2020, table 8, semi-supervised; one weight decay serves all layers here."

DEFAULT = Recipe()
SMALL = replace(DEFAULT, hidden=128, student_hidden=128, temperature=1.2, label_weight=0.1)

OWN = replace(DEFAULT, label_weight=0.0, student_dropout=0.5)
"""The default method's student: wide enough to hold a target better than its teacher, with so much dropout that it goes
by a node's features where these contradict the target; labels sit in the target."""


def given(value: Value | None) -> Value:
    """A field of a resolved configuration; UsageError when it was never resolved."""
    if value is None:
        raise UsageError("a configuration has open fields here; call its resolved(task) first.")
    return value


def recipe(dataset: str, split: str, teacher: str) -> Recipe:
    """The published row where there is one, by dataset, protocol and teacher; else a default.

    A teacher without a row of its own (APPNP, logits from elsewhere) takes the GCN row.
    """
    name = dataset_name(dataset)
    if teacher == "gcnii":
        layers, hidden, dropout = GCNII.get(name, (16, 64, 0.5))
        return replace(recipe(dataset, split, "gcn"), layers=layers, hidden=hidden, teacher_dropout=dropout)
    if dataset.partition(":")[0] in ("digits", "sbm"):
        return SMALL
    if split == "cpf" and teacher == "sage" and name in CPF_SAGE:
        return CPF_SAGE[name]
    return FF_G2M.get((name, teacher)) or FF_G2M.get((name, "gcn")) or DEFAULT


def dataset_name(dataset: str) -> str:
    """ "cora" of planetoid:Cora and npz:cora; empty for one that no paper has."""
    kind, _, rest = dataset.partition(":")
    return rest.lower() if kind in ("planetoid", "amazon", "coauthor", "npz") else ""
