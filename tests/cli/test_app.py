"""Exit status, one-line errors, --config, --dry-run and --json of the command line."""

import errno
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from structkd.cli import app as application
from structkd.cli.app import run
from structkd.cli.output import Output, Table, show
from structkd.runs import Run


def make_run(folder: Path) -> Path:
    Run.create(folder, "test", {"a": 1}).finish({})
    return folder


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["bogus"], 'Unknown command "bogus"'),
        (["bogus"], "See structkd --help."),
        (["ranking", "mine", "--model", "m"], "See structkd ranking mine --help."),
        (["index", "search", "folder", "--nope"], "See structkd index search --help."),
        (["ranking", "mine-all"], "See structkd ranking --help."),
        (["graph", "distill", "--dataset", "digits", "--method", "ffg2m", "--out", "o"], "Did you mean ff-g2m?"),
        (["report", "--bad", "3"], "Unknown option: --bad"),
        (["report", "x", "--seed", "many"], 'unable to convert "many" into int'),
    ],
)
def test_usage_errors_are_one_line_and_status_2(
    tokens: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tokens) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_bad_data_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path / "none"), "--out", str(tmp_path / "r.html")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("structkd: ")
    assert captured.err.count("\n") == 1


def test_unwritable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    make_run(tmp_path / "run")
    assert run(["report", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "r.html")]) == 1
    assert "file" in capsys.readouterr().err


def test_interrupt_is_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    make_run(tmp_path / "run")
    monkeypatch.setattr("structkd.report.write", interrupted)
    assert run(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 130
    assert "run the same line again" in capsys.readouterr().err


def test_config_file_is_read_flags_win_and_unknown_keys_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('out = "from-file.html"\nseed = 3\n')
    line = ["report", "x", "--config", str(config), "--dry-run"]
    assert run(line) == 0
    assert tomllib.loads(capsys.readouterr().out) == {"runs": ["x"], "out": "from-file.html", "seed": 3}
    assert run([*line, "--out", "flag.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == "flag.html"
    config.write_text('outt = "x"\n')
    assert run(line) == 2
    refused = capsys.readouterr().err
    assert "outt" in refused
    assert "c.toml" in refused
    assert run(["report", "x", f"--config={tmp_path / 'none.toml'}"]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_dry_run_output_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", "x", "--seed", "5", "--dry-run"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(first)
    assert run(["report", "--config", str(tmp_path / "again.toml"), "--dry-run"]) == 0
    assert capsys.readouterr().out == first


def test_show_prints_a_table_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output({"a": 1.5}, [Table("Title", [{"x": 0.123456, "y": "s"}, {"x": None, "z": 12345.6}])], ["line [b]"])
    show(output, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1.5}
    show(output, as_json=False)
    text = capsys.readouterr().out
    assert "0.1235" in text
    assert "12,346" in text
    assert "line [b]" in text


def test_a_wide_table_is_turned_where_that_makes_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"method": name, **{f"a long column {i}": i / 8 for i in range(9)}} for name in ("glnn", "ff-g2m")]
    show(Output({}, [Table("Wide", rows)]), as_json=False)
    text = capsys.readouterr().out
    assert re.search(r"method +\S +glnn +\S +ff-g2m", text)
    assert re.search(r"a long column 8 +\S +1.0000", text)
    show(Output({}, [Table("Long", [{"name": f"row {i}", "text": "word " * 30} for i in range(20)])]), as_json=False)
    text = capsys.readouterr().out
    assert text.count("row ") == 20
    assert "word" in text


def test_one_row_too_wide_for_the_terminal_is_turned_and_its_long_values_fold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"teacher": "bi-encoder:/a/long/path" * 6, **{f"column {i}": i / 8 for i in range(9)}}
    show(Output({}, [Table("One", [row])]), as_json=False)
    assert re.search(r"column 8 +\S +1.0000", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_groups_commands_and_flags(shell: str) -> None:
    script = application.app.generate_completion(shell=shell)
    for word in ("quickstart", "self-distill", "knn-graph", "--target-transform"):
        assert word in script


def test_completion_is_installed_by_one_line(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "structkd", "--install-completion", "--shell", "bash"]
    done = subprocess.run(line, env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "structkd" in path.name]
    assert written, done.stdout
    assert str(written[0]) in (tmp_path / ".bashrc").read_text()


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from structkd.cli.app import main; sys.argv = ['structkd', '--help']; main()"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert b"Traceback" not in writer.stderr.read()
    writer.stderr.close()
    writer.wait()


def test_every_group_and_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    for group in ("data", "graph", "ranking", "index", "scores"):
        assert run([group, "--help"]) == 0
        assert "Commands" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == application.structkd.__version__


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("graph bench --dataset digits --methods ff-g2", "ff-g2m"),
        ("graph bench --dataset planetoid:Coar", "Cora"),
        ("graph bench --dataset planetiod:Cora", "planetoid"),
        ("graph bench --dataset digits --split publik", "public"),
        ("graph bench --dataset digits --teacher gcm", "gcn"),
        ("graph bensh", '"bench"'),
        ("graph bench --datset digits", "--dataset"),
        ("ranking distill --collection pydoc --teacher bm25 --out o", "pydocs"),
        ("ranking distill --collection pydocs --teacher bm2 --student static --out o", "bm25"),
        ("ranking distill --collection pydocs --teacher bm25 --student statik --out o", "static"),
        ("index build --vectors v.npy --kind hnws --out o", "hnsw"),
        ("scores import x --format trec-rum --out o", "trec-run"),
    ],
)
def test_a_slip_of_the_pen_gets_the_name_that_was_meant(
    line: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.save("v.npy", np.eye(4, dtype=np.float32))
    assert run(line.split()) in (1, 2)
    said = capsys.readouterr().err
    assert f"Did you mean {near}" in said
    assert said.count("\n") == 1


def test_a_full_disk_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("structkd.report.write", full)
    page = tmp_path / "r.html"
    for out in (["--out", str(page)], [f"--out={page}"]):
        assert run(["report", str(make_run(tmp_path / "run")), *out]) == 1
        said = capsys.readouterr().err
        assert f"{page}: No space left on device. Free some space, or give --out another disk" in said


def test_a_model_that_is_nowhere_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["ranking", "distill", "--collection", "pydocs", "--teacher", "cross-encoder:no/such-model"]
    assert run([*line, "--student", "static", "--out", str(tmp_path / "o")]) == 1
    said = capsys.readouterr().err
    assert "no/such-model: no folder of that name, and the hub did not give a model of that id" in said
    assert said.count("\n") == 1
