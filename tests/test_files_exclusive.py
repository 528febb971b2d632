"""create_exclusive on file systems without hard links."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from structkd import files
from structkd.errors import DataError


@pytest.fixture(params=["link", "renameat2", "claim"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    if request.param != "link":
        monkeypatch.setattr(os, "link", no_links)
    if request.param == "claim":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
        monkeypatch.setattr(files, "_CLAIM_PAUSE", 0.0)
    return str(request.param)


def test_the_first_wins_and_the_second_changes_nothing(tmp_path: Path, way: str) -> None:
    target = tmp_path / "target"
    for number, won in ((1, True), (2, False)):
        source = tmp_path / f"source-{number}"
        source.write_text(str(number))
        assert files.create_exclusive(source, target) is won
        assert not source.exists()
    assert target.read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_stale_claim_is_named(tmp_path: Path, way: str) -> None:
    if way != "claim":
        pytest.skip("only the claim can be left behind")
    (tmp_path / ".claim-target").touch()
    (tmp_path / "source").write_text("1")
    with pytest.raises(DataError, match="Delete this file"):
        files.create_exclusive(tmp_path / "source", tmp_path / "target")


def test_other_errors_are_not_taken_for_missing_links(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("1")
    with pytest.raises(FileNotFoundError):
        files.create_exclusive(tmp_path / "source", tmp_path / "absent" / "target")
    assert (tmp_path / "source").exists()
