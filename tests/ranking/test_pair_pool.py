"""Pairs from files and collections: columns, copies, exclusion, malformed lines; rank correlation, the split."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from structkd.errors import DataError
from structkd.ids import Ids, Texts
from structkd.ranking.data.collection import Collection
from structkd.ranking.data.pair_pool import (
    gold_of_file,
    overlap,
    pool_of_collection,
    pool_of_file,
    read_pair_file,
    swapped,
)
from structkd.ranking.evaluation.selection import PhaseRow, best_row, held_out_loss, spearman, split_pool
from structkd.trec import Run

TEN = [(f"left {i}", f"right {i}") for i in range(10)]


def written(folder: Path, rows: list[tuple[str, ...]], name: str = "pairs.tsv") -> Path:
    path = folder / name
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_two_or_three_columns_give_the_same_pairs(tmp_path: Path) -> None:
    two = pool_of_file(written(tmp_path, TEN), symmetric=True)
    three = pool_of_file(written(tmp_path, [("4.5", *pair) for pair in TEN], "scored.tsv"), symmetric=True)
    assert two.pairs.query_texts == three.pairs.query_texts == [left for left, _ in TEN]
    assert two.pairs.document_texts == [right for _, right in TEN]
    assert two.pairs.queries is two.pairs.documents


def test_copies_fall_out_in_either_order_only_when_symmetric(tmp_path: Path) -> None:
    path = written(tmp_path, [*TEN, TEN[3], (TEN[4][1], TEN[4][0]), ("same", "same")])
    symmetric, ordered = pool_of_file(path, symmetric=True), pool_of_file(path, symmetric=False)
    assert symmetric.counts == {"read": 13, "repeated": 2, "excluded": 0, "identical": 1}
    assert ordered.counts == {"read": 13, "repeated": 1, "excluded": 0, "identical": 1}
    assert symmetric.pairs.query_texts[:5] == [left for left, _ in TEN[:5]]  # the first copy stays, in its place
    assert ordered.pairs.queries is not ordered.pairs.documents


def test_excluded_pairs_are_found_whatever_their_order_case_and_final_stop(tmp_path: Path) -> None:
    path = written(tmp_path, TEN)
    test = [("RIGHT  1.", "left 1"), ("left 2", "right 2")]
    assert pool_of_file(path, symmetric=True, exclude=test).counts["excluded"] == 2
    ordered = pool_of_file(path, symmetric=False, exclude=test)
    assert ordered.counts["excluded"] == 1
    assert "left 2" not in ordered.pairs.query_texts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\tb\na\tb\tc\n", r"pairs.tsv:2: 3 tab-separated columns, expected 2 as in line 1. Replace tabs"),
        ("1\ta\tb\n2\ta\tb\tc\n", r"pairs.tsv:2: 4 tab-separated columns, expected 3"),
        ("a\tb\tc\n", r"pairs.tsv:1: 'a' is no score. Three columns are score, text, text"),
        (
            "Sentence1\tSentence2\na\tb\n",
            r"pairs.tsv:1: 'Sentence1' and 'Sentence2' name columns.*Remove the header line",
        ),
        ("score\tsentence1\tsentence2\n1\ta\tb\n", r"pairs.tsv:1: 'score' is no score.*without a header line"),
        ("nan\tb\tc\n", r"pairs.tsv:1: 'nan' is no score"),
        ("only one text\n", r"pairs.tsv:1: 1 tab-separated columns, expected 2 \(text, text\) or 3"),
        ("a\tb\nc\n", r"pairs.tsv:2: 1 tab-separated columns, expected 2 as in line 1.*give both texts"),
        ("a\tb\nc\t  \n", r"pairs.tsv:2: one side of the pair is empty"),
        ("1\t\tb\n", r"pairs.tsv:1: one side of the pair is empty"),
        ("\n \n", r"pairs.tsv: holds no pair"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_pair_file(path)


def test_too_few_pairs_after_exclusion_say_where_they_went(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"7 pairs are left \(10 read, 0 repeated, 3 excluded, 0 identical\), expected"):
        pool_of_file(written(tmp_path, TEN), symmetric=True, exclude=TEN[:3])


def test_gold_needs_scores_that_rank(tmp_path: Path) -> None:
    scored = [(f"{i / 2}", *pair) for i, pair in enumerate(TEN)]
    gold = gold_of_file(written(tmp_path, scored), symmetric=True)
    assert gold.scores.tolist() == [i / 2 for i in range(10)]
    with pytest.raises(DataError, match=r"two columns, expected three \(score, text, text\)"):
        gold_of_file(written(tmp_path, TEN), symmetric=True)
    with pytest.raises(DataError, match="10 pairs with equal scores rank nothing"):
        gold_of_file(written(tmp_path, [("3", *pair) for pair in TEN]), symmetric=True)
    pool = pool_of_file(written(tmp_path, [(right, left) for left, right in TEN[:8]]), symmetric=True)
    assert overlap(pool, gold) == 8


def test_a_collection_gives_its_candidates_without_empty_passages(capsys: pytest.CaptureFixture[str]) -> None:
    documents = Texts(Ids(f"d{i}" for i in range(12)), [f"passage {i}" if i != 3 else " " for i in range(12)])
    collection = Collection("c", Texts(Ids(["q1", "q2"]), ["one", "two"]), documents)
    listed = ([f"d{i}" for i in range(6)], -np.arange(6.0))
    run = Run({"q1": listed, "q2": listed, "elsewhere": listed})
    pool = pool_of_collection(collection, run, exclude=[("ONE", "passage 0"), ("passage 1", "one")])
    assert not pool.symmetric
    assert len(pool) == 9  # 12 less two empty and one excluded; order matters for query and passage
    assert pool.counts["excluded"] == 1
    assert "2 pairs with an empty text left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="unknown"):
        pool_of_collection(collection, Run({"q1": (["d99"], np.ones(1))}))


def test_swapped_is_its_own_inverse(tmp_path: Path) -> None:
    pairs = pool_of_file(written(tmp_path, TEN), symmetric=False).pairs
    assert swapped(pairs).query_texts == pairs.document_texts
    assert swapped(swapped(pairs)) == pairs or swapped(swapped(pairs)).query_ids == pairs.query_ids


def test_spearman_is_scipys_ties_included() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        left, right = generator.integers(0, 6, 40), generator.normal(size=40).round(1)
        assert spearman(left, right) == pytest.approx(float(spearmanr(left, right)[0]), abs=1e-12)
    assert spearman(np.ones(5), np.arange(5)) == 0.0
    assert spearman(np.arange(5), np.exp(np.arange(5.0))) == pytest.approx(1.0)


def test_held_out_loss_grows_as_labels_differ() -> None:
    labels = np.asarray([0.1, 0.5, 0.9], dtype=np.float32)
    assert held_out_loss(labels, labels) == 0
    assert held_out_loss(labels + np.float32(0.2), labels) == pytest.approx(-0.04, abs=1e-6)


def test_the_split_holds_out_pairs_or_whole_queries(tmp_path: Path) -> None:
    rows = [(f"query {i // 5}", f"passage {i}") for i in range(40)]
    symmetric = pool_of_file(written(tmp_path, rows), symmetric=True)
    train, held = split_pool(symmetric, 0.1, 0)
    assert len(held) == 4
    assert sorted([*train, *held]) == list(range(40))
    assert not np.array_equal(held, split_pool(symmetric, 0.1, 1)[1])
    ordered = pool_of_file(written(tmp_path, rows), symmetric=False)
    train, held = split_pool(ordered, 0.1, 0)
    assert len(held) == 15  # three of eight queries
    assert not set(ordered.pairs.query_rows[train]) & set(ordered.pairs.query_rows[held])
    one = pool_of_file(written(tmp_path, [("query", f"passage {i}") for i in range(10)]), symmetric=False)
    assert [len(part) for part in split_pool(one, 0.1, 0)] == [7, 3]


def test_the_best_row_is_the_latest_of_equals() -> None:
    rows = [
        PhaseRow(c, p, 1, d, f"{p}{c}", 1, 1.0, 1.0) for c, p, d in [(1, "bi", 0.5), (2, "bi", 0.5), (2, "cross", 9)]
    ]
    assert best_row(rows, "bi").folder == "bi2"
