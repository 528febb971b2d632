"""Token ids on disk: what comes back, what is asked again, and that a second process opens what the first wrote."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.token_store import TokenStore, hashes_of
from structkd.ranking.data.tokens import TokenCache
from structkd.ranking.models.encoders import BiScorer, CrossScorer, StaticScorer


def letters(keys: list[str]) -> list[NDArray[np.int32]]:
    return [np.frombuffer(key.encode(), dtype=np.uint8).astype(np.int32) for key in keys]


def test_ids_come_back_for_stored_texts_and_none_for_others(tmp_path: Path) -> None:
    texts = [f"text {number} " * (number % 7) for number in range(3000)]  # several chunks, one text often
    store = TokenStore.build(tmp_path / "s", texts, letters)
    assert len(store) == len(set(texts))
    asked = [texts[5], "never seen", texts[2999], "", texts[5]]
    found = store.get(asked)
    assert found[1] is None
    for key, ids in zip(asked, found, strict=True):
        if ids is not None:
            np.testing.assert_array_equal(ids, letters([key])[0])
    assert found[3] is not None, "the empty text is a text"
    assert store.nbytes == 2 * sum(map(len, set(texts)))
    assert TokenStore.build(tmp_path / "none", [], letters).get(["x"]) == [None]


def test_a_large_vocabulary_takes_four_bytes_from_the_first_id_on_that_needs_it(tmp_path: Path) -> None:
    def tokenise(keys: list[str]) -> list[NDArray[np.int32]]:
        return [np.array([int(key), int(key) // 2], dtype=np.int32) for key in keys]

    keys = [str(number) for number in [*range(2000), 70_000, 3]]
    store = TokenStore.build(tmp_path / "s", keys, tokenise)
    assert store.nbytes == 4 * 2 * 2001
    for key, ids in zip(["3", "70000", "1999"], store.get(["3", "70000", "1999"]), strict=True):
        assert ids is not None
        assert ids.tolist() == [int(key), int(key) // 2]


def test_a_whole_folder_is_opened_and_not_made_again(tmp_path: Path) -> None:
    TokenStore.build(tmp_path / "s", ["a", "b"], letters)

    def never(keys: list[str]) -> list[NDArray[np.int32]]:
        raise AssertionError("tokenised again")

    assert len(TokenStore.build(tmp_path / "s", ["a", "b"], never)) == 2
    with pytest.raises(AssertionError, match="tokenised again"):
        TokenStore.build(tmp_path / "t", ["a"], never)
    assert [path.name for path in tmp_path.iterdir()] == ["s"], "a build that failed leaves nothing"


def test_pairs_of_texts_are_told_apart() -> None:
    assert len(np.unique(hashes_of([("ab", "c"), ("a", "bc"), ("abc", "")]), axis=0)) == 3


def test_a_cache_reads_its_store_first(tmp_path: Path) -> None:
    cache = TokenCache(letters)
    cache.keep(tmp_path / "s", ["one", "two"])
    assert cache.made == 2
    assert [ids.tolist() for ids in cache.get(["two", "three", "one"])] == [
        ids.tolist() for ids in letters(["two", "three", "one"])
    ]
    assert cache.made == 3


@pytest.mark.parametrize("kind", ["dot", "cat", "static"])
def test_scores_are_the_same_from_files(kind: str, tiny: str, pairs: Pairs, tmp_path: Path) -> None:
    def make() -> BiScorer | CrossScorer:
        if kind == "static":
            return StaticScorer.fresh(pairs.documents, dimension=16)
        return BiScorer(tiny) if kind == "dot" else CrossScorer(tiny)

    expected, scorer = make().score(pairs), make()
    scorer.keep_tokens(pairs, tmp_path)
    made = sum(cache.made for cache in scorer.token_caches.values())
    assert scorer.score(pairs).tolist() == expected.tolist()
    assert sum(cache.made for cache in scorer.token_caches.values()) == made, "every text was on disk"
    folders = sorted(path.name for path in tmp_path.iterdir())
    again = make()
    again.keep_tokens(pairs, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
    assert sum(cache.made for cache in again.token_caches.values()) == 0
    other = Texts(Ids(pairs.documents.ids), [f"{text} alpha" for text in pairs.documents.texts])
    again.keep_tokens(dataclasses.replace(pairs, documents=other), tmp_path)
    assert len(list(tmp_path.iterdir())) == len(folders) + 1, "other texts, another file"
    assert scorer.lengths(pairs).tolist() == [
        ids.shape[-1]
        for ids in (
            scorer.token_caches["pair"].get(list(zip(pairs.query_texts, pairs.document_texts, strict=True)))
            if kind == "cat"
            else scorer.token_caches["document"].get(pairs.document_texts)
        )
    ]
