import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_rel

from structkd.errors import DataError, UsageError
from structkd.ids import Ids, Pairs, Texts
from structkd.ranking.data.collection import Collection
from structkd.ranking.evaluation.measures import (
    PROTOCOLS,
    EvaluateConfig,
    binarised,
    check_protocol,
    compare,
    evaluate_model,
    evaluate_run,
    parse_measures,
    rerank,
    retrieve,
)
from structkd.trec import Run, read_run, run_of


def texts(**named: str) -> Texts:
    return Texts(Ids(named), list(named.values()))


DOCUMENTS = texts(a="red", b="green", c="blue", d="")
QUERIES = texts(q1="red", q2="blue", q3="grey", q4="none")
TOY = Collection(
    "toy", QUERIES, DOCUMENTS, {"q1": {"a": 2, "b": 1}, "q2": {"c": 1, "a": -1}, "q3": {"a": 0}, "q4": {"zz": 3}}
)


def run(**lists: str) -> Run:
    """q1="abc" ranks a, b, c."""
    return Run({query: (list(names), np.arange(len(names), 0, -1.0)) for query, names in lists.items()})


def test_values_by_hand() -> None:
    result = evaluate_run(TOY, run(q1="bac", q2="ac"), "nDCG@10 RR@10 R@1 AP P@2")
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    expected = {
        "nDCG@10": {"q1": (1 / math.log2(2) + 2 / math.log2(3)) / ideal, "q2": (1 / math.log2(3)), "q4": 0},
        "RR@10": {"q1": 1, "q2": 0.5, "q4": 0},
        "R@1": {"q1": 0.5, "q2": 0, "q4": 0},
        "AP": {"q1": 1, "q2": 0.5, "q4": 0},
        "P@2": {"q1": 1, "q2": 0.5, "q4": 0},
    }
    for name, values in expected.items():
        assert result.per_query[name] == pytest.approx(values, abs=1e-9), name
        assert result.measures[name] == pytest.approx(sum(values.values()) / 3, abs=1e-9)
    # q3 has no positive; q4 is not answered and counts 0
    assert (result.queries, result.missing, result.without_positive) == (3, 1, 1)
    assert result.unjudged == pytest.approx(1 / 5)  # only c of q1 was not judged


def test_the_ideal_ranking_holds_documents_outside_the_collection() -> None:
    full = Collection("full", QUERIES, DOCUMENTS, {"q1": {"a": 1, "elsewhere": 1}})
    result = evaluate_run(full, run(q1="a"), "nDCG@10 R@10")
    assert result.measures["nDCG@10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert result.measures["R@10"] == 0.5


def test_ties_are_broken_by_structkd_alone() -> None:
    # equal scores: ir-measures' providers would answer 0.5 for RR and 1.0 for RR@10
    tied = run_of(["q1", "q1"], ["b", "a"], np.asarray([1.0, 1.0]))
    only_b = Collection("b", QUERIES, DOCUMENTS, {"q1": {"b": 1}})
    assert evaluate_run(only_b, tied, "RR RR@10").measures == {"RR": 0.5, "RR@10": 0.5}
    # differences that float32 cannot hold
    close = run_of(["q1", "q1"], ["b", "a"], np.asarray([1.0 + 1e-9, 1.0]))
    assert evaluate_run(only_b, close, "RR RR@10 nDCG@10").measures == {"RR": 1, "RR@10": 1, "nDCG@10": 1}


def test_binarised_and_protocols() -> None:
    graded = Collection("graded", QUERIES, DOCUMENTS, {"q1": {"a": 2, "b": 1}})
    assert binarised("nDCG@10 RR@10 AP R@100") == "nDCG@10 RR(rel=2)@10 AP(rel=2) R(rel=2)@100"
    assert evaluate_run(graded, run(q1="ba"), "RR@10").measures["RR@10"] == 1
    assert evaluate_run(graded, run(q1="ba"), binarised("RR@10")).measures == {"RR(rel=2)@10": 0.5}
    for protocol in PROTOCOLS:
        assert evaluate_run(graded, run(q1="ba"), protocol).queries == 1


def test_a_document_with_the_querys_id_can_be_dropped() -> None:
    same = Collection("same", texts(a="x"), DOCUMENTS, {"a": {"b": 1}})
    lists = Run({"a": (["a", "b"], np.asarray([2.0, 1.0]))})
    assert evaluate_run(same, lists, "RR@10").measures["RR@10"] == 0.5
    assert evaluate_run(same, lists, "RR@10", drop_same_id=True).measures["RR@10"] == 1


@pytest.mark.parametrize(
    ("name", "published"), [("bm25", 0.5058), ("d_bert_kd_tasb", 0.7210), ("splade_p_p_ensemble_distil", 0.7308)]
)
def test_published_runs_of_trec_dl_2019(real_data: Path, name: str, published: float) -> None:
    folder = real_data / "ranking" / "msmarco-dl19"
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.full.trec").read_text().splitlines():
        query, _, document, grade = line.split()
        qrels.setdefault(query, {})[document] = int(grade)
    collection = Collection("dl19", Texts(Ids(qrels), list(qrels)), DOCUMENTS, qrels)
    result = evaluate_run(collection, read_run(folder / "runs" / f"{name}.tsv"), "trec-dl")
    assert result.measures["nDCG@10"] == pytest.approx(published, abs=0.0005)
    assert (result.queries, result.missing) == (43, 0)


class Fake:
    """Scores a pair by the letters that the two texts share."""

    def score(self, pairs: Pairs) -> torch.Tensor:
        shared = [len(set(q) & set(d)) / 7 for q, d in zip(pairs.query_texts, pairs.document_texts, strict=True)]
        return torch.tensor(shared)


class FakeEncoder(Fake):
    def encode(self, texts: Sequence[str], side: str) -> NDArray[np.float32]:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return np.asarray([[letter in text for letter in letters] for text in texts], dtype=np.float32)


def test_rerank_orders_candidates_and_ignores_strangers() -> None:
    candidates = run(q1="bca", q2="acb", other="abc")
    lists = rerank(TOY, Fake(), candidates).lists
    assert lists["q1"][0] == ["a", "b", "c"]  # r, e, d; then b and c by shared letters: "green" 2, "blue" 1
    assert set(lists) == {"q1", "q2"}
    assert rerank(TOY, Fake(), candidates, depth=2).lists["q1"][0] == ["b", "c"]
    result = evaluate_model(TOY, Fake(), candidates=candidates, measures="RR@10")
    assert result.per_query["RR@10"] == {"q1": 1, "q2": 1, "q4": 0}


def test_retrieve_is_the_exact_product_of_vectors() -> None:
    found = retrieve(TOY, FakeEncoder(), depth=4)
    vectors = FakeEncoder().encode(DOCUMENTS.texts, "document")
    for query, text in zip(QUERIES.ids, QUERIES.texts, strict=True):
        scores = vectors @ FakeEncoder().encode([text], "query")[0]
        expected = run_of([query] * 4, list(DOCUMENTS.ids), scores).lists[query]
        assert found.lists[query][0] == expected[0]
        assert found.lists[query][1] == pytest.approx(expected[1])
    result = evaluate_model(TOY, FakeEncoder(), mode="retrieve", measures="RR@10")
    assert result.per_query["RR@10"]["q1"] == 1


def test_compare_is_a_paired_test() -> None:
    count = 40
    ids = [f"q{i}" for i in range(count)]
    collection = Collection("many", Texts(Ids(ids), ids), DOCUMENTS, {query: {"a": 1} for query in ids})
    good = evaluate_run(collection, run(**dict.fromkeys(ids, "abc")), "RR@10")
    mixed = evaluate_run(collection, run(**{q: "abc" if i % 2 else "bac" for i, q in enumerate(ids)}), "RR@10")
    better = compare(mixed, good, "RR@10")
    assert better.difference == pytest.approx(0.25)
    assert (better.wins, better.losses, better.queries) == (20, 0, 40)
    assert better.p_value < 0.001
    assert better.low > 0.15
    assert better.high < 0.35
    same = compare(good, good, "RR@10")
    assert (same.p_value, same.t_test, same.difference) == (1, 1, 0)
    # five queries, all better: of the 2^5 sign patterns 2 are as extreme, p = 1/16
    few = Collection("few", collection.queries, DOCUMENTS, {query: {"a": 1} for query in ids[:5]})
    two = compare(
        evaluate_run(few, run(**dict.fromkeys(ids, "bac")), "RR@10"),
        evaluate_run(few, run(**dict.fromkeys(ids, "abc")), "RR@10"),
        "RR@10",
    )
    assert two.p_value == pytest.approx(1 / 16, abs=0.01)
    change = np.array([0.5, 0.0] * 20)
    assert better.t_test == pytest.approx(ttest_rel(change, np.zeros(40)).pvalue)
    assert compare(mixed, good, "RR@10") == better
    with pytest.raises(UsageError, match="different queries"):
        compare(good, evaluate_run(few, run(q1="abc"), "RR@10"), "RR@10")
    with pytest.raises(UsageError, match=r"nDCG@10 was not measured; the result has RR@10"):
        compare(good, good, "nDCG@10")


def test_a_protocol_says_when_the_queries_are_not_its_own() -> None:
    result = evaluate_run(TOY, run(q1="ab", q2="c"), PROTOCOLS["ms-marco-dev-small"])
    assert list(result.measures) == ["nDCG@10", "RR@10", "AP@1000", "R@1000"]
    said = check_protocol("ms-marco-dev-small", result)
    assert said is not None
    assert "3 judged queries" in said
    assert "6980" in said
    assert check_protocol("ms-marco-dev-small", dataclasses.replace(result, queries=6980)) is None
    assert check_protocol("ms-marco-dev-49k", dataclasses.replace(result, queries=6980)) is not None
    assert check_protocol("beir", result) is None, "BEIR's collections differ in size"


def test_trec_dl_counts_grade_two_and_above_except_in_ndcg() -> None:
    graded = Collection("graded", QUERIES, DOCUMENTS, {"q1": {"a": 1, "b": 2}})
    found = evaluate_run(graded, run(q1="ab"), PROTOCOLS["trec-dl"]).measures
    assert found["RR(rel=2)"] == found["RR(rel=2)@10"] == found["AP(rel=2)@1000"] == 0.5
    assert found["nDCG@10"] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))


@pytest.mark.parametrize("measure", ["nDGC@10", "RR@", "", "nDCG@10 foo"])
def test_unknown_measures_are_refused(measure: str) -> None:
    with pytest.raises(UsageError, match="measure"):
        parse_measures(measure)


def test_errors() -> None:
    with pytest.raises(DataError, match=r"answers none of the 3 judged queries \(it has zz\)"):
        evaluate_run(TOY, run(zz="a"))
    with pytest.raises(DataError, match="no query has a document judged above 0"):
        evaluate_run(Collection("none", QUERIES, DOCUMENTS, {"q1": {"a": 0}}), run(q1="a"))
    with pytest.raises(UsageError, match="needs candidates"):
        evaluate_model(TOY, Fake())
    with pytest.raises(UsageError, match="Fake scores pairs and has no vectors"):
        evaluate_model(TOY, Fake(), mode="retrieve")
    with pytest.raises(DataError, match="none of the 1 candidate lists belongs"):
        rerank(TOY, Fake(), run(zz="a"))
    with pytest.raises(DataError, match="1 of 1 ids are unknown, for example 'z'"):
        rerank(TOY, Fake(), run(q1="z"))


def test_a_depth_without_documents_is_refused() -> None:
    with pytest.raises(UsageError, match="depth 0: expected 1 document or more"):
        EvaluateConfig(depth=0)
