"""The tutorials run as written: every line of their bash blocks, in order, on a cut of the data they name."""

import json
import re
import shlex
from pathlib import Path

import pytest

from structkd.cli.app import run

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def lines(name: str) -> list[str]:
    page = (TUTORIALS / name).read_text(encoding="utf-8")
    return [line for block in _BLOCK.findall(page) for line in block.strip().split("\n")]


def cut(folder: Path, queries: int = 40, documents: int = 300) -> None:
    """Keep a few queries of each split, their judged documents and some others."""
    judged: set[str] = set()
    kept: set[str] = set()
    for path in sorted((folder / "qrels").glob("*.tsv")):
        head, *rows = path.read_text(encoding="utf-8").splitlines()
        rows = rows[:queries]
        kept |= {row.split("\t")[0] for row in rows}
        judged |= {row.split("\t")[1] for row in rows}
        path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    for name, wanted, most in (("queries.jsonl", kept, 0), ("corpus.jsonl", judged, documents)):
        rows = (folder / name).read_text(encoding="utf-8").splitlines()
        ids = [json.loads(row)["_id"] for row in rows]
        chosen = [row for at, (row, one) in enumerate(zip(rows, ids, strict=True)) if one in wanted or at < most]
        (folder / name).write_text("\n".join(chosen) + "\n", encoding="utf-8")


@pytest.mark.examples
@pytest.mark.parametrize("name", sorted(path.name for path in TUTORIALS.glob("*.md")))
def test_every_line_of_a_tutorial_runs_as_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = lines(name)
    assert len(found) >= 7
    for line in found:
        program, *tokens = shlex.split(line)
        assert program == "structkd"
        status = run(tokens)
        assert status == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
        if tokens[:2] == ["data", "make"]:
            cut(tmp_path / "texts")
    pages = {path.parent.name for path in tmp_path.glob("*/report.html")}
    assert "student" in pages
