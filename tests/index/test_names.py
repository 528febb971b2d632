"""StoredIds: the same as Ids in every answer; row numbers written without making a string of each."""

import numpy as np
import pytest
import torch

from structkd import index
from structkd.errors import DataError
from structkd.ids import Ids
from structkd.index.folder import names
from structkd.index.folder.names import StoredIds, id_arrays, row_number_arrays


def stored(ids: Ids) -> StoredIds:
    arrays = id_arrays(ids)
    return StoredIds(arrays["bytes"].numpy(), arrays["offsets"].numpy())


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_answers_as_ids_do(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_CHUNK", chunk)
    ids = Ids(["b", "é-ü", "a", "\udc80", "zz"])
    found = stored(ids)
    assert (len(found), list(found), found[1], found[-1]) == (5, list(ids), "é-ü", "zz")
    assert found == ids
    assert ids == found
    assert hash(found) == hash(ids)
    assert repr(found) == repr(ids)
    assert found.fingerprint() == ids.fingerprint()
    assert found.find(["zz", "x"]).tolist() == [4, -1]
    assert "a" in found
    assert "x" not in found
    assert found.strings(np.asarray([2, 0])) == ["a", "b"]
    with pytest.raises(DataError, match="row -1 is outside the table of 5 ids"):
        found.strings([-1])
    with pytest.raises(DataError, match="1 of 2 ids are unknown, for example 'q'"):
        found.rows(["a", "q"])
    with pytest.raises(IndexError):
        found[5]


@pytest.mark.parametrize("count", [1, 9, 10, 11, 99, 100, 101, 1234])
def test_row_numbers_are_written_as_their_strings_would_be(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_CHUNK", 7)
    expected, found = id_arrays(Ids(str(row) for row in range(count))), row_number_arrays(count)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_an_index_without_ids_equals_one_with_row_numbers_as_ids() -> None:
    vectors = np.random.default_rng(0).integers(-1, 2, (150, 2)).astype(np.float32)  # ties everywhere
    plain = index.build(vectors, kind="flat", metric="ip")
    named = index.build(vectors, [str(row) for row in range(150)], kind="flat", metric="ip")
    assert plain.manifest.corpus == named.manifest.corpus  # type: ignore[attr-defined]
    assert plain.search(vectors[:9], 20).document_ids() == named.search(vectors[:9], 20).document_ids()
