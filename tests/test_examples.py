"""The examples run as they are, on embedded or shared data."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*line: str) -> str:
    """stdout of an example; its stderr is the message when it fails."""
    result = subprocess.run([sys.executable, *line], cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_publish_teacher_scores(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("".join(f"q{q} Q0 d{d} {d + 1} {1.5 - d} t\n" for q in range(3) for d in range(4)))
    out = run("publish_teacher_scores.py", str(path))
    assert "verified: True" in out
    assert "12 pairs" in out
    assert "d0" in out


@pytest.mark.slow
def test_node_classification() -> None:
    assert "student 0." in run("node_classification.py")


@pytest.mark.slow
def test_retrieval_index() -> None:
    assert "read a file line by line" in run("retrieval_index.py", "--epochs", "1")
