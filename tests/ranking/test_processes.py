"""A process that is killed, and two processes that share a batch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from structkd.ranking.models.encoders import weights_sha256
from tests.ranking import processes

PROGRAM = [str(Path(processes.__file__))]
ROOT = str(Path(processes.__file__).parents[2])


def run(*line: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ROOT}
    return subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, timeout=300)


def test_a_run_killed_by_signal_9_goes_on_to_the_same_losses_and_weights(tiny: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process had
    try:
        expected, whole = processes.train_until(tmp_path / "whole", tiny)
        died = run(*PROGRAM, "kill", str(tmp_path / "cut"), tiny)
        assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
        assert (tmp_path / "cut" / "checkpoint" / "state.pt").is_file()
        assert list((tmp_path / "cut" / "tokens").iterdir()), "token ids outlive the process"
        found, again = processes.train_until(tmp_path / "cut", tiny)
    finally:
        torch.set_num_threads(threads)
    assert expected.steps == 15
    assert found.history == expected.history
    assert (found.best_step, found.best_value) == (expected.best_step, expected.best_value)
    assert weights_sha256(again) == weights_sha256(whole)


def test_two_processes_see_different_lists_and_average_to_the_gradients_of_one(tiny: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run(*launcher, *PROGRAM, "average", str(tmp_path), tiny)
    assert done.returncode == 0, done.stderr[-3000:]
    seen, expected = processes.step(tiny)
    halves = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == seen
    assert sorted(map(len, halves)) == [2, 3]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert set(expected) <= set(found)
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    averaged = torch.cat([found[name].flatten() for name in expected])
    assert float((averaged - whole).norm() / whole.norm()) < 1e-3  # float32 sums in another order; a wrong share: .1
    for name in set(found) - set(expected):  # what no step uses is filled with zeros by the averaging
        assert not found[name].any(), name
