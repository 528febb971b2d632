"""The examples and notebooks run as they are, on embedded data."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from sentence_transformers import SentenceTransformer

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*line: str) -> str:
    """stdout of an example; its stderr is the message when it fails."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(
        [sys.executable, *line], cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_publish_teacher_scores(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("".join(f"q{q} Q0 d{d} {d + 1} {1.5 - d} t\n" for q in range(3) for d in range(4)))
    out = run("publish_teacher_scores.py", str(path))
    assert "verified: True" in out
    assert "12 pairs" in out
    assert "d0" in out


@pytest.mark.examples
def test_node_classification() -> None:
    assert "student 0." in run("node_classification.py")


@pytest.mark.examples
def test_a_plain_torch_geometric_script_needs_five_lines() -> None:
    out = run("pyg_training.py", "--epochs", "40")
    gnn, mlp = (float(line.split()[1].rstrip(",")) for line in out.splitlines())
    assert gnn > 0.5
    assert mlp > 0.5
    changed = (EXAMPLES / "pyg_training.py").read_text(encoding="utf-8").count("  # structkd")
    assert changed == 5


@pytest.mark.examples
def test_retrieval_index() -> None:
    assert "read a file line by line" in run("retrieval_index.py", "--epochs", "1", "--queries", "200")


@pytest.mark.examples
def test_a_sentence_transformers_user_moves_in_and_out() -> None:
    out = run("from_sentence_transformers.py")
    assert "240 margins" in out
    assert "same vectors in sentence-transformers: True" in out


@pytest.mark.examples
def test_two_processes_by_accelerates_launcher(tmp_path: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    out = run(*launcher, "multi_process.py", "--out", str(tmp_path / "run"), "--queries", "24")
    assert out.count("steps, student in") == 1, "only the main process speaks"
    assert SentenceTransformer(str(tmp_path / "run" / "student")).encode(["a file"]).shape[0] == 1
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.examples
@pytest.mark.parametrize("path", sorted((EXAMPLES / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own event loop
def test_notebooks_run_from_top_to_bottom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 4
    assert all(cell.execution_count for cell in code)
