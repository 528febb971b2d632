"""docs/papers.md: every paper has a row, and every name in it exists in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", TEXT, flags=re.MULTILINE)
NAMES = re.compile(r"structkd(?:\.\w+)+")


def names_of(body: list[ast.stmt]) -> set[str]:
    """Functions, classes, and assigned names of a module or class, without importing it."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def exists(name: str) -> bool:
    """A module, or a public name of one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:cut])
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if file.is_file():
            rest = parts[cut:]
            if len(rest) > 1:
                return False
            return not rest or rest[0] in names_of(ast.parse(file.read_text(encoding="utf-8")).body)
    return False


def test_every_paper_has_one_row() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 40))
    titles = [title for _, title, *_ in ROWS]
    assert len(set(titles)) == 39


@pytest.mark.parametrize(("number", "title", "verdict", "where"), ROWS, ids=[f"paper {row[0]}" for row in ROWS])
def test_what_is_in_has_a_place(number: str, title: str, verdict: str, where: str) -> None:
    named = NAMES.findall(where)
    assert verdict in ("in", "partial", "out"), f"paper {number}, {title}: verdict {verdict!r}"
    assert bool(named) or verdict == "out", f"paper {number}, {title}: {verdict}, but no name"
    assert [name for name in named if not exists(name)] == []


@pytest.mark.parametrize("page", ["papers.md", "objectives.md"])
def test_names_in_the_text_exist(page: str) -> None:
    names = NAMES.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert [name for name in names if not exists(name)] == []


def test_the_test_itself_refuses() -> None:
    assert exists("structkd.objectives.listwise.kl")
    assert exists("structkd.acquisition")
    for name in ("structkd.objectives.listwise.nothing", "structkd.nowhere.kl", "structkd.objectives.kl.kl.kl"):
        assert not exists(name)
