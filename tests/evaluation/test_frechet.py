import numpy as np
import pytest
import scipy.linalg

from var_jax.evaluation.frechet import Moments, frechet_distance


def moments(features, parts=3):
    accumulator = Moments()
    for part in np.array_split(features, parts):
        accumulator.add(part)
    return accumulator


def test_moments_of_batches_are_those_of_all_features():
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32) + 100
    np.testing.assert_allclose(moments(features).covariance, np.cov(features, rowvar=False), rtol=1e-5)
    np.testing.assert_allclose(moments(features).mean, features.mean(0), rtol=1e-6)


def test_distance_equals_that_from_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((60, 5)) + 0.5
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)


def test_gaussians_of_known_distance_and_fewer_images_than_features():
    steps = np.array([[1.0], [-1.0]]) * np.sqrt(0.5)  # variance 1
    a, b = np.hstack([steps, 0 * steps]), np.hstack([3 * steps, 0 * steps + 2])
    assert frechet_distance(moments(a, 1), moments(b, 1)) == pytest.approx((3 - 1) ** 2 + 2**2)
    with pytest.raises(ValueError, match="needs at least 2 images on each side, got 1"):
        frechet_distance(moments(a[:1], 1), moments(b, 1))
