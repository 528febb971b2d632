"""The documentation: generated pages are current, every local link resolves, the site builds without a warning."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from structkd.graph import METHODS
from structkd.index.kinds import INDEXES
from structkd.objectives import OBJECTIVES
from structkd.scores import READERS

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_current() -> None:
    line = [sys.executable, "docs/generate.py", "--check"]  # a process of its own: no shape checks around commands
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "site").rglob("*.html"))) >= 12


@pytest.mark.parametrize("path", [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")], ids=str)
def test_local_links_outside_the_site_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"


def test_every_formula_has_its_row() -> None:
    """Objectives, methods, file formats and index kinds that the code offers stand in the pages that explain them."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    for page, names in (
        ("objectives.md", OBJECTIVES),
        ("graph.md", METHODS),
        ("file-formats.md", READERS),
        ("indexes.md", INDEXES),
    ):
        missing = [name for name in names if f"`{name}`" not in pages[page]]
        assert not missing, f"docs/{page} lacks {missing}"


def test_every_code_name_in_the_formulas_exists() -> None:
    page = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
    cells = [row.rsplit("|", 2)[1] for row in page.splitlines() if row.startswith("| ") and row.endswith("|")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert len(names) > 20
    for name in names:
        module, _, attribute = f"structkd.{name}".rpartition(".")
        assert importlib.import_module(module)
        if not hasattr(sys.modules[module], attribute):
            importlib.import_module(f"structkd.{name}")
