"""The model card: provenance by the cache's fingerprint, what was trained on what, figures, how to load."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from structkd.ranking.card import card
from structkd.ranking.data.collection import Collection
from structkd.ranking.distillation import DistillConfig, distill
from structkd.ranking.models.bi_encoder import BiScorer
from structkd.ranking.models.static import StaticScorer
from structkd.ranking.models.students import load_student
from structkd.ranking.models.tk import TkConfig, TkModel, TkScorer
from structkd.ranking.teachers.sources import Bm25Scorer, EnsembleScorer, RunScorer
from structkd.ranking.training.live import LiveConfig, cached_live
from structkd.scores.cache import CachedScorer
from structkd.trec import Run, write_run


def test_distill_writes_a_card_with_the_fingerprint_of_the_cache(small: Collection, tmp_path: Path) -> None:
    teacher = CachedScorer(Bm25Scorer(small.documents), tmp_path / "cache")
    config = DistillConfig(epochs=1, objective="kl", batch_lists=4)
    result = distill(StaticScorer.fresh(small.documents), teacher, small, config, out=tmp_path / "run")
    text = (tmp_path / "run" / "student" / "README.md").read_text()
    assert f"| fingerprint | {teacher.store().spec.fingerprint} |" in text
    assert f"| weights sha256 | {result.student.spec.weights_sha256} |" in text
    for line in (
        "library_name: sentence-transformers", "| model | bm25 |", "| objective | kl |", "| seed | 0 |",
        "| collection | small (12 queries, 40 documents) |", 'model = SentenceTransformer("FOLDER")',
    ):  # fmt: skip
        assert line in text
    measures = result.metrics["best"]["measures"]
    assert f"{next(iter(measures.values())):.4f}" in text
    SentenceTransformer(str(tmp_path / "run" / "student"), device="cpu").encode(["alpha"])
    assert load_student(tmp_path / "run").kind == "static"


def test_members_of_an_ensemble_and_own_formats_are_named(small: Collection, tmp_path: Path) -> None:
    write_run(tmp_path / "one.run", Run({"q00": (["d00"], np.asarray([1.0]))}))
    members = [Bm25Scorer(small.documents), RunScorer(tmp_path / "one.run")]
    config = TkConfig(dimension=16, heads=2, layers=1, feed_forward=16, buckets=8)
    student = TkScorer(TkModel.fresh(small.documents, config))
    text = card(student, [EnsembleScorer(members), members[0]], small, {}, {"steps": 3})
    for member in members:
        assert text.count(member.spec.fingerprint) == 1
    assert "# tk student of bm25, run:one.run" in text
    assert 'ranking.load_student("FOLDER")' in text
    assert "nothing was measured" in text
    assert "sentence_transformers" not in text


@pytest.mark.parametrize("kind", ["tas-balanced", "tct"])
def test_in_batch_distillation_ends_with_a_card_of_both_teachers(
    kind: str, small: Collection, tiny: str, tmp_path: Path
) -> None:
    live = cached_live(BiScorer(tiny), tmp_path / "live")
    config = DistillConfig(epochs=2, batch_lists=4)
    student = StaticScorer.fresh(small.documents)
    wish = LiveConfig(in_batch=kind)
    teacher = Bm25Scorer(small.documents)
    result = distill(student, teacher, small, config, out=tmp_path / "run", live=wish, live_teacher=live)
    text = (tmp_path / "run" / "student" / "README.md").read_text()
    assert live.spec.fingerprint in text
    assert teacher.spec.fingerprint in text
    assert f"| in_batch | {kind} |" in text
    assert live.asked > 0
    again = distill(
        StaticScorer.fresh(small.documents), teacher, small, config, out=tmp_path / "run", live=wish, live_teacher=live
    )
    assert again.metrics == result.metrics
