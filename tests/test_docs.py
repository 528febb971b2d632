"""The documentation: generated pages are current, every local link resolves, the site builds without a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
