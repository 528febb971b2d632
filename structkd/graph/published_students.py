"""Published hyper-parameters of each method's student, read from released code and read by effect.

KRD, ICML 2023, and HGMD, CIKM 2024: `best_parameters.json` (transductive); AdaGMLP, KDD 2024: `train.sh`, which leaves
the student's width at its default 64; InfGraND, TMLR 2026: `configs/*_tran.yaml` (its table 6); NOSMOG, ICLR 2023:
`tran.conf.yaml`, made for the CPF protocol with a SAGE teacher; TINED, ICML 2025: `best_records.json`, SAGE teacher,
whose `lamb` weighs the teacher's answers, so the label weight is one minus it. G2MLP has no public code: its row is
FF-G2M's, and the weight of its moments is ours. A dataset or teacher without a
row of a method takes the dataset's FF-G2M row at temperature 1 and the method's first options.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from structkd.graph.published import OWN, Recipe, dataset_name, recipe

Options = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One student of one method: the common fields, and the method's own parameters."""

    layers: int
    hidden: int
    dropout: float
    label_weight: float
    temperature: float = 1.0
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    options: Mapping[str, float] = field(default_factory=dict)


KRD: dict[tuple[str, str], Row] = {
    ("cora", "gcn"): Row(3, 1024, 0.3, 0.5, 0.8),
    ("cora", "sage"): Row(3, 1024, 0.6, 0.3, 1.1),
    ("cora", "gat"): Row(3, 1024, 0.4, 0.2, 1.1),
    ("citeseer", "gcn"): Row(2, 256, 0.6, 0.0, 0.9),
    ("citeseer", "sage"): Row(2, 1024, 0.4, 0.0, 0.8),
    ("citeseer", "gat"): Row(2, 512, 0.3, 0.0, 0.9),
    ("pubmed", "gcn"): Row(3, 256, 0.4, 0.0, 1.0),
    ("pubmed", "sage"): Row(3, 256, 0.3, 0.0, 0.8),
    ("pubmed", "gat"): Row(3, 256, 0.4, 0.0, 1.0),
    ("cs", "gcn"): Row(2, 256, 0.6, 0.3, 1.1, weight_decay=1e-3),
    ("cs", "sage"): Row(2, 128, 0.6, 0.4, 1.2, weight_decay=1e-3),
}

HGMD: dict[tuple[str, str], Row] = {
    ("cora", "gcn"): Row(3, 512, 0.3, 0.1, 0.9, options={"sharpness": 5, "beta": 0.3}),
    ("citeseer", "gcn"): Row(2, 256, 0.6, 0.0, 1.1, options={"sharpness": 5, "beta": 0.4}),
    ("pubmed", "gcn"): Row(3, 256, 0.6, 0.0, 0.9, options={"sharpness": 10, "beta": 0.5}),
    ("cs", "gcn"): Row(2, 512, 0.6, 0.1, 1.0, weight_decay=5e-3, options={"sharpness": 1, "beta": 0.4}),
    ("photo", "gcn"): Row(2, 512, 0.5, 0.2, 0.9, options={"sharpness": 10, "beta": 0.5}),
}


def _influence(delta_1: float, delta_2: float, gamma_1: float, gamma_2: float) -> Options:
    return {"delta_1": delta_1, "delta_2": delta_2, "gamma_1": gamma_1, "gamma_2": gamma_2, "hops": 2}


INFGRAND: dict[tuple[str, str], Row] = {
    ("cora", "gcn"): Row(3, 512, 0.5, 0.1, 1.5, options=_influence(0.6, 0.2, 0.8, 0.4)),
    ("cora", "sage"): Row(3, 512, 0.3, 0.5, 1.3, options=_influence(0.8, 0.1, 1.0, 0.4)),
    ("cora", "gat"): Row(3, 1024, 0.6, 0.5, 1.2, options=_influence(0.4, 0.2, 1.0, 0.1)),
    ("citeseer", "gcn"): Row(2, 256, 0.5, 0.0, 1.5, options=_influence(0.6, 0.1, 0.6, 0.4)),
    ("citeseer", "sage"): Row(2, 1024, 0.5, 0.1, 1.2, options=_influence(0.6, 0.1, 0.4, 0.4)),
    ("citeseer", "gat"): Row(2, 2048, 0.5, 0.1, 1.0, options=_influence(0.8, 0.2, 0.6, 0.2)),
}


def _positions(walks: int, length: int, passes: int, width: int, bound: float, likeness: float) -> Options:
    return {
        "walks": walks, "length": length, "window": 5, "passes": passes, "width": width, "bound": bound, "noise": 0.1,
        "likeness": likeness,
    }  # fmt: skip


NOSMOG: dict[tuple[str, str], Row] = {
    ("cora", "sage"): Row(2, 128, 0.6, 0.0, weight_decay=5e-3, options=_positions(5, 50, 1, 64, 0.04, 0.1)),
    ("citeseer", "sage"): Row(2, 128, 0.1, 0.0, weight_decay=1e-3, options=_positions(3, 50, 5, 16, 0.045, 0.1)),
    ("pubmed", "sage"): Row(2, 128, 0.4, 0.0, 1.0, 5e-3, 1e-3, _positions(1, 50, 3, 16, 0.005, 0.9)),
    ("photo", "sage"): Row(2, 128, 0.1, 0.0, 1.0, 1e-3, 1e-3, _positions(1, 30, 1, 64, 0.1, 1e-9)),
}


def _boosting(members: int, beta: float, missing: float, align_outputs: float) -> Options:
    return {"members": members, "beta": beta, "missing": missing, "align_outputs": align_outputs}


ADAGMLP: dict[tuple[str, str], Row] = {
    ("cora", "gcn"): Row(3, 64, 0.7, 0.1, 0.4, options=_boosting(3, 1, 0.1, 0.9)),
    ("cora", "sage"): Row(3, 64, 0.5, 0.5, 0.9, options=_boosting(2, 4, 0.0, 0.0)),
    ("cora", "gat"): Row(3, 64, 0.1, 0.7, 0.6, options=_boosting(2, 2, 0.1, 0.1)),
    ("citeseer", "gcn"): Row(2, 64, 0.9, 0.1, 0.3, options=_boosting(3, 4, 0.1, 0.9)),
    ("citeseer", "sage"): Row(2, 64, 0.9, 0.1, 0.3, options=_boosting(3, 4, 0.1, 0.9)),
    ("citeseer", "gat"): Row(2, 64, 0.9, 0.7, 0.01, options=_boosting(3, 4, 0.0, 0.9)),
    ("pubmed", "gcn"): Row(3, 64, 0.7, 0.1, 0.6, options=_boosting(2, 2, 0.1, 0.5)),
    ("pubmed", "sage"): Row(3, 64, 0.7, 0.1, 0.5, options=_boosting(2, 4, 0.1, 0.5)),
    ("pubmed", "gat"): Row(3, 64, 0.7, 0.2, 0.05, options=_boosting(3, 1, 0.1, 0.7)),
    ("photo", "gcn"): Row(2, 64, 0.8, 0.5, 0.5, weight_decay=0.0, options=_boosting(2, 4, 0.0, 0.5)),
    ("photo", "sage"): Row(2, 64, 0.6, 0.2, 0.1, 5e-3, options=_boosting(2, 0.5, 0.0, 0.5)),
    ("photo", "gat"): Row(2, 64, 0.6, 0.1, 0.1, 5e-3, options=_boosting(2, 0.5, 0.0, 0.5)),
    ("cs", "gcn"): Row(2, 64, 0.9, 0.1, 0.9, weight_decay=1e-3, options=_boosting(3, 4, 0.0, 0.0)),
    ("cs", "sage"): Row(2, 64, 0.9, 0.1, 0.9, weight_decay=1e-3, options=_boosting(2, 2, 0.0, 0.9)),
    ("cs", "gat"): Row(2, 64, 0.9, 0.1, 0.5, weight_decay=1e-3, options=_boosting(2, 2, 0.0, 0.0)),
}


TINED: dict[tuple[str, str], Row] = {
    ("cora", "sage"): Row(6, 512, 0.0, 0.0, 1.0, 5e-3, 5e-3, {"rate": 1.0, "copied_rate": 1.0}),
    ("citeseer", "sage"): Row(4, 1024, 0.0, 0.5, 1.0, 1e-4, 1e-2, {"rate": 10.0, "copied_rate": 0.5}),
    ("pubmed", "sage"): Row(4, 2048, 0.1, 0.0, 1.0, 1e-3, 1e-2, {"rate": 0.1, "copied_rate": 0.5}),
    ("photo", "sage"): Row(6, 1024, 0.5, 0.5, 1.0, 1e-3, 1e-3, {"rate": 0.1, "copied_rate": 0.1}),
}

ROWS: dict[str, dict[tuple[str, str], Row]] = {
    "krd": KRD, "hgmd": HGMD, "hgmd-weight": HGMD, "infgrand": INFGRAND, "nosmog": NOSMOG, "adagmlp": ADAGMLP,
    "tined": TINED, "g2mlp": {},
}  # fmt: skip

OPTIONS: dict[str, Options] = {
    "krd": {"power": 1.0, "momentum": 0.99, "warmup": 50},
    "hgmd": {"sharpness": 5.0, "beta": 0.4},
    "hgmd-weight": {"sharpness": 5.0},
    "infgrand": _influence(0.6, 0.2, 0.8, 0.4),
    "nosmog": _positions(5, 50, 1, 64, 0.04, 0.1),
    "adagmlp": _boosting(3, 1, 0.1, 0.9),
    "tined": {"rate": 1.0, "copied_rate": 1.0},
    "g2mlp": {"moments": 0.1},
    "structkd": {"high_band": 0.0},
}
"Own parameters of each method where no row says otherwise."

FF_G2M_TERMS = ("lfd", "hfd", "ff-g2m")
"Methods whose students take FF-G2M's row under every protocol; the rows for CPF splits are those of GLNN's student."


def student_recipe(method: str, dataset: str, split: str, teacher: str) -> Recipe:
    """What a method's student is trained with: its published row, else the dataset's own row or a default."""
    published_for = "" if method in FF_G2M_TERMS else split
    base = OWN if method == "structkd" else recipe(dataset, published_for, teacher)
    row = _row(method, dataset, teacher)
    if row is None:
        return replace(base, temperature=1.0) if method in ROWS else base
    return replace(
        base,
        student_layers=row.layers,
        student_hidden=row.hidden,
        student_dropout=row.dropout,
        temperature=row.temperature,
        label_weight=row.label_weight,
        learning_rate=row.learning_rate,
        weight_decay=row.weight_decay,
    )


def own_options(method: str, dataset: str, teacher: str) -> Options:
    """The method's own parameters and their published values or defaults; empty for a method without any."""
    row = _row(method, dataset, teacher)
    known = OPTIONS.get(method, {})
    published = {} if row is None else {name: value for name, value in row.options.items() if name in known}
    return {**known, **published}


def _row(method: str, dataset: str, teacher: str) -> Row | None:
    rows, name = ROWS.get(method, {}), dataset_name(dataset)
    return (
        rows.get((name, teacher))
        or (rows.get((name, "sage")) if method in ("nosmog", "tined") else None)
        or (rows.get((name, "gcn")))
    )
