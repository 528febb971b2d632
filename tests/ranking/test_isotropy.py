"""Softly whitened labels: values against scikit-learn, what the mean cosine says, equal and mean rows."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from structkd.ranking.self_distillation.isotropy import ANISOTROPIC, Whitening, mean_cosine


def leaning(texts: int = 300, dimension: int = 12) -> np.ndarray:
    """Vectors with a common direction and unequal variances."""
    generator = np.random.default_rng(0)
    return (generator.normal(size=(texts, dimension)) * np.linspace(0.2, 2, dimension) + 3).astype(np.float32)


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_cosines_are_those_of_principal_components_scaled_by_a_power_of_their_variance(power: float) -> None:
    vectors = leaning()
    pca = PCA().fit(vectors.astype(np.float64))
    variances = pca.explained_variance_ * (len(vectors) - 1) / len(vectors)
    components = pca.transform(vectors) * variances ** (-power / 2)
    expected = np.diag(cosine_similarity(components[:150], components[150:]))
    found = Whitening.fit(vectors, power).cosines(vectors[:150], vectors[150:])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_full_whitening_gives_every_direction_variance_one() -> None:
    vectors = leaning()
    whitening = Whitening.fit(vectors, 1.0)
    np.testing.assert_allclose(
        np.cov(((vectors - whitening.centre) @ whitening.axes).T, bias=True), np.eye(12), atol=1e-3
    )


def test_the_mean_cosine_is_the_mean_over_all_couples_and_tells_the_common_direction() -> None:
    vectors = leaning(40)
    assert mean_cosine(vectors) == pytest.approx(float(cosine_similarity(vectors.astype(np.float64)).mean()), abs=1e-6)
    assert mean_cosine(vectors) > ANISOTROPIC > mean_cosine(vectors - vectors.mean(0))


def test_a_direction_without_variance_and_the_mean_itself_stay_finite() -> None:
    vectors = leaning()
    vectors[:, 3] = 1.0
    whitening = Whitening.fit(vectors, 1.0)
    assert np.isfinite(whitening.axes).all()
    mean = np.repeat(whitening.centre[None], 2, 0)
    assert whitening.cosines(mean, vectors[:2]).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(whitening.cosines(vectors, vectors), 1, atol=1e-5)
    same = np.ones((9, 4), dtype=np.float32)
    assert np.isfinite(Whitening.fit(same).cosines(same, same)).all()


def test_what_was_saved_labels_alike(tmp_path: Path) -> None:
    vectors = leaning()
    whitening = Whitening.fit(vectors)
    whitening.save(tmp_path / "cycle/whitening-1.npz")
    again = Whitening.load(tmp_path / "cycle/whitening-1.npz")
    np.testing.assert_array_equal(again.cosines(vectors, vectors[::-1]), whitening.cosines(vectors, vectors[::-1]))
