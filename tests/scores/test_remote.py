"""Published folders in an object store (fsspec's in-memory one)."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

from structkd import scores
from structkd.errors import CorruptFileError, DataError, MissingExtraError
from structkd.scores import TeacherSpec
from structkd.scores.remote import download, is_remote, upload


@pytest.fixture
def published(tmp_path: Path) -> Path:
    scores.write_pairs(tmp_path / "s", TeacherSpec("t"), ["q", "q"], ["a", "b"], np.array([1.0, 2.0]))
    scores.publish(tmp_path / "s", to=tmp_path / "p", license="CC0-1.0")
    return tmp_path / "p"


def test_there_and_back(published: Path, tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/teacher"
    upload(published, uri)
    download(uri, tmp_path / "copy")
    assert scores.verify(tmp_path / "copy").ok
    assert scores.open(tmp_path / "copy").lookup(["q"], ["b"]) == 2.0
    with pytest.raises(DataError, match="holds a published folder already"):
        upload(published, uri)
    memory = fsspec.filesystem("memory")
    path = f"/{tmp_path.name}/teacher/data/scores-00000.parquet"
    good = memory.cat_file(path)
    memory.pipe_file(path, good[:-1] + b"x")
    download(uri, tmp_path / "copy")  # what is there and sound is not fetched again
    with pytest.raises(CorruptFileError, match="differs from the manifest's checksum"):
        download(uri, tmp_path / "fresh")
    assert not (tmp_path / "fresh" / "manifest.json").exists()
    memory.pipe_file(path, good)
    download(uri, tmp_path / "fresh")  # continues
    assert scores.verify(tmp_path / "fresh").ok


def test_what_is_no_published_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json there"):
        download(f"memory://{tmp_path.name}/nothing", tmp_path / "x")
    with pytest.raises(DataError, match="publish the store first"):
        upload(tmp_path, "memory://x")
    with pytest.raises((MissingExtraError, DataError), match="nope"):
        download("nope://bucket/x", tmp_path / "x")
    assert is_remote("s3://bucket/x")
    assert not is_remote("out/teacher")
