import functools
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

from structkd.errors import DataError, MissingExtraError
from structkd.ranking.data import datasets
from structkd.ranking.data.collection import load as load_folder
from structkd.ranking.data.collection import normalise
from structkd.ranking.data.datasets import DATASETS, load, splits, write

SOURCE = '''
"""Tools for boats.

They were written on a rainy day in the harbour of a small town by the sea.
"""
import does_not_exist_and_must_not_be_imported

class Boat:
    """A Boat floats on the water.  It carries people and goods from one shore to the other, slowly.

    More about it stands elsewhere.
    """

    def sail(self):
        """Sail away."""

    async def sink(self):
        """Let the boat sink down to the ground, e.g. in a storm. Whoever is aboard should learn to swim before that."""

    def copy(self):
        """A Boat floats on the water. It carries people and goods from one shore to the other, slowly.

        More about it stands elsewhere."""

    def float(self):
        """This is a long text of one sentence only that nobody has ever cut into two halves"""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of one module."""
    (tmp_path / "harbour").mkdir()
    (tmp_path / "harbour" / "__init__.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(
        '"""One two three four five six. Seven eight nine ten eleven twelve."""'
    )
    monkeypatch.setattr(datasets.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    # a cache of its own, so that the real collection is built once for all tests
    monkeypatch.setattr(datasets, "_pydocs", functools.cache(datasets._pydocs.__wrapped__))
    return tmp_path


def test_queries_and_passages_by_hand(library: Path) -> None:
    collection = datasets._pydocs()
    queries = dict(zip(collection.queries.ids, collection.queries.texts, strict=True))
    assert queries == {
        "harbour": "Tools for boats.",
        "harbour.Boat": "A floats on the water.",
        "harbour.Boat.copy": "A Boat floats on the water.",
        "harbour.Boat.sink": "Let the boat down to the ground, e.g. in a storm.",
    }
    documents = dict(zip(collection.documents.ids, collection.documents.texts, strict=True))
    assert documents == {
        "harbour": "They were written on a rainy day in the harbour of a small town by the sea.",
        "harbour.Boat": "It carries people and goods from one shore to the other, slowly. "
        "More about it stands elsewhere.",
        "harbour.Boat.float": "This is a long text of one sentence only that nobody has ever cut into two halves",
        "harbour.Boat.sink": "Whoever is aboard should learn to swim before that.",
    }
    # the copy's passage is that of the class: one passage, relevant to both queries
    assert collection.qrels == {
        "harbour": {"harbour": 1},
        "harbour.Boat": {"harbour.Boat": 1},
        "harbour.Boat.copy": {"harbour.Boat": 1},
        "harbour.Boat.sink": {"harbour.Boat.sink": 1},
    }


def test_the_limit_is_kept_and_does_not_depend_on_the_order(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "PYDOCS_LIMIT", 2)
    collection = load("pydocs", "all")
    assert len(collection.documents) <= 2
    (library / "aaa.py").write_text('"""Nothing."""')
    datasets._pydocs.cache_clear()
    assert load("pydocs", "all") == collection


def test_a_python_without_sources(library: Path) -> None:
    (library / "harbour" / "__init__.py").unlink()
    with pytest.raises(DataError, match="this Python came without its library"):
        load("pydocs")


def test_pydocs_of_this_python() -> None:
    before = set(sys.modules)
    collection = datasets._pydocs()
    assert not {"tkinter", "turtle", "antigravity", "this"} & (set(sys.modules) - before)
    assert 3000 < len(collection.documents) <= datasets.PYDOCS_LIMIT
    assert len(collection.queries) > 2000
    assert max(Counter(map(normalise, collection.documents.texts)).values()) == 1
    assert max(Counter(map(normalise, collection.queries.texts)).values()) == 1
    assert set(collection.qrels) == set(collection.queries.ids)
    known = set(collection.documents.ids)
    assert all(judged and set(judged) <= known for judged in collection.qrels.values())
    texts = dict(zip(collection.documents.ids, collection.documents.texts, strict=True))
    for query, text in zip(collection.queries.ids, collection.queries.texts, strict=True):
        assert all(normalise(text) != normalise(texts[document]) for document in collection.qrels[query])


def test_splits_are_disjoint_and_together_all() -> None:
    train, test, everything = (load("pydocs", split) for split in ("train", "test", "all"))
    assert set(train.queries.ids) | set(test.queries.ids) == set(everything.queries.ids)
    assert not set(train.queries.ids) & set(test.queries.ids)
    assert len(test.queries) / len(everything.queries) == pytest.approx(0.2, abs=0.03)
    assert load("pydocs").queries.ids == test.queries.ids
    assert train.documents is test.documents
    assert everything.qrels == {}  # as in a folder: what reads every query must not see test judgements
    assert train.name == f"{test.name}/train"


def test_written_and_read_again(tmp_path: Path) -> None:
    parts = {split: load("pydocs", split) for split in ("train", "test")}
    folder = write(load("pydocs", "all"), tmp_path / "pydocs", parts)
    for split, part in parts.items():
        again = load_folder(folder, split)
        assert again.queries.ids == part.queries.ids
        assert list(again.queries.texts) == list(part.queries.texts)
        assert list(again.documents.texts) == list(part.documents.texts)
        assert again.qrels == part.qrels
    assert load(folder).queries.ids == parts["test"].queries.ids
    assert splits(folder) == splits("pydocs") == ["test", "train"]
    assert splits("ir_datasets:beir/scifact") == []
    single = write(parts["test"], tmp_path / "single")
    assert load(single).qrels == parts["test"].qrels


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"pydoc: neither a folder nor a built-in collection; .* pydocs"):
        load("pydoc")
    with pytest.raises(DataError, match="no split 'dev'; expected train, test or all"):
        load("pydocs", "dev")
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nothing")
    # a folder of that name wins
    monkeypatch.chdir(tmp_path)
    write(load("pydocs"), "pydocs")
    assert load("pydocs").name == "pydocs"
    assert list(DATASETS) == ["pydocs"]


class _Package(types.ModuleType):
    """The calls of ir_datasets that are made, over two documents."""

    def load(self, name: str) -> object:
        if name != "toy/test":
            raise KeyError(name)
        item = lambda **fields: types.SimpleNamespace(default_text=lambda: fields["text"], **fields)  # noqa: E731
        return types.SimpleNamespace(
            has_docs=lambda: True,
            has_queries=lambda: True,
            has_qrels=lambda: True,
            docs_iter=lambda: [item(doc_id="d1", text="one"), item(doc_id="d2", text="two")],
            queries_iter=lambda: [item(query_id="q1", text="what")],
            qrels_iter=lambda: [
                types.SimpleNamespace(query_id="q1", doc_id="d2", relevance=2),
                types.SimpleNamespace(query_id="q9", doc_id="d2", relevance=1),
            ],
        )


def test_ir_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_datasets", _Package("ir_datasets"))
    collection = load("ir_datasets:toy/test")
    assert collection.qrels == {"q1": {"d2": 2}}
    assert list(collection.documents.texts) == ["one", "two"]
    assert load("ir_datasets:toy", "test") == collection
    with pytest.raises(DataError, match="ir_datasets knows no collection 'toy'"):
        load("ir_datasets:toy")
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(MissingExtraError, match="collection ir_datasets:toy needs ir_datasets"):
        load("ir_datasets:toy")
