"""The run folder: one experiment's configuration, seed, versions, metrics, tables, figures and checkpoints.

<run>/run.json          command, seed, versions, started, finished, summary
<run>/config.toml       the resolved configuration; the same file runs it again with --config
<run>/metrics.jsonl     one JSON object a line: {"step": 1, "loss": ...}
<run>/tables/NAME.json  {"title", "columns", "rows"}
<run>/figures/NAME.json what `report` draws (see `Figure`)
<run>/teachers.json     who taught: identity and fingerprint, what was asked, what the cache saved
<run>/report.html       the page of this run
<run>/checkpoint/       latest training state
"""

import dataclasses
import importlib.metadata
import json
import platform
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tomli_w

import structkd
from structkd.errors import DataError, UsageError
from structkd.files import read_json, write_json, write_text
from structkd.ids import fingerprint_json

_PACKAGES = ("structkd", "torch", "torch_geometric", "numpy", "scipy", "numba", "sentence-transformers", "transformers")


@dataclass(frozen=True)
class Series:
    """One named curve or group of bars: x and y of equal length, y_error optional (one standard deviation).

    Series of one `group` share their colour and differ in their lines; without it each has a colour of its own.
    """

    name: str
    x: Sequence[float | str]
    y: Sequence[float]
    y_error: Sequence[float] | None = None
    group: str | None = None


@dataclass(frozen=True)
class Figure:
    """A plot as data; `structkd.report` draws it.

    Kinds: lines; bars and samples (x names categories; samples repeat a name for each value, seeds for example, and
    are drawn with their mean and its 95 % confidence interval); scatter; cloud (many points around nought);
    histogram (x is ignored, y holds the samples).
    """

    kind: Literal["lines", "bars", "samples", "scatter", "cloud", "histogram"]
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True)
class Run:
    """An open run folder; `Run.create` makes one, `Run.open` reads one."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(
        cls, folder: str | Path, command: str, config: Any = None, seed: int | None = None, *, anew: bool = False
    ) -> "Run":
        """Start a run folder; an existing one of the same command is continued.

        Args:
            folder: where; created with its parents.
            command: for example "graph bench".
            config: a dataclass or mapping; written to config.toml with None left out.
            seed: the seed that all randomness of the run comes from.
            anew: the command starts over, so the curves that an earlier run logged there are dropped.

        Raises:
            UsageError: another command's run is there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        before = read_json(folder / "run.json")["command"] if (folder / "run.json").is_file() else command
        if before != command:
            raise UsageError(f"{folder} holds a run of `{before}`, not of `{command}`. Give --out another folder.")
        if anew:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        info = {
            "command": command,
            "seed": seed,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": None,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "versions": versions(),
            "summary": {},
        }
        write_text(folder / "config.toml", tomli_w.dumps(plain(config or {})))
        write_json(folder / "run.json", info)
        return cls(folder, info)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Open an existing run; DataError when the folder is none."""
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise DataError(f"{folder}: no run.json there; expected the --out folder of a structkd command.")
        return cls(folder, read_json(folder / "run.json"))

    def config(self) -> dict[str, Any]:
        """The configuration as written."""
        return tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8"))

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(json.dumps(plain(values)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl (a last line cut by a crash is left out)."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return [json.loads(line) for line in lines[:-1] if line]

    def write_table(self, name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a table; columns are the keys of the rows in order of appearance."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"title": title, "columns": columns, "rows": list(rows)}
        write_json(self.folder / "tables" / f"{name}.json", plain(table))

    def write_figure(self, name: str, figure: Figure) -> None:
        """Keep a plot for the report."""
        write_json(self.folder / "figures" / f"{name}.json", plain(figure))

    def write_teachers(self, teachers: Sequence[Mapping[str, Any]]) -> None:
        """Keep who taught: one mapping a teacher, with `model` and `fingerprint`, and what it cost."""
        write_json(self.folder / "teachers.json", plain(list(teachers)))

    def teachers(self) -> list[dict[str, Any]]:
        """Who taught; empty when nobody did."""
        path = self.folder / "teachers.json"
        found: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        return found

    def tables(self) -> dict[str, dict[str, Any]]:
        """All tables by name."""
        return {path.stem: read_json(path) for path in sorted((self.folder / "tables").glob("*.json"))}

    def figures(self) -> dict[str, Figure]:
        """All plots by name."""
        out = {}
        for path in sorted((self.folder / "figures").glob("*.json")):
            value = read_json(path)
            out[path.stem] = Figure(**{**value, "series": [Series(**series) for series in value["series"]]})
        return out

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what came out and when; a run without it was interrupted."""
        self.info["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.info["summary"] = plain(summary)
        write_json(self.folder / "run.json", self.info)


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed; by default of all that can change a result."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def source_version(folder: Path) -> str:
    """Version of what computes: the release and all sources of a package, so that an edited method starts afresh."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    return fingerprint_json([structkd.__version__, sources])


def plain(value: Any) -> Any:
    """Dataclasses, paths, tuples and numpy scalars as JSON/TOML values; None inside mappings is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch values
        return value.tolist()
    return value
