"""Test the metrics on features against the published functions (goldens/README.md)."""

import tracemalloc

import numpy as np
import pytest

from tests.evaluation.test_inception import arrays, inception_rule, weights  # noqa: F401  (fixtures)
from var_jax.evaluation import precision_recall
from var_jax.evaluation.frechet import Gaussian, Moments, frechet_at_infinity, frechet_distance
from var_jax.evaluation.inception_score import inception_score, inception_score_torch_fidelity
from var_jax.evaluation.kid import kernel_distance, squared_mmd
from var_jax.evaluation.precision_recall import is_inside, precision_and_recall, squared_radii

KINDS = ("wide", "middle", "narrow")


@pytest.fixture(scope="module")
def features(inception_rule):  # noqa: F811
    """Return the golden features of a kind: samples and references."""
    return lambda kind: tuple(inception_rule.features(kind, role) for role in ("samples", "reference"))


def moments(x, parts: int = 1) -> Moments:
    result = Moments()
    for part in np.array_split(x, parts):
        result.add(part)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_frechet_distance(kind, arrays, features):  # noqa: F811
    samples, references = features(kind)
    distance = frechet_distance(moments(samples), moments(references))
    assert distance == pytest.approx(float(arrays[f"{kind}_fid"]), rel=1e-6)
    for publisher in ("adm", "pytorch_fid", "torch_fidelity"):
        assert distance == pytest.approx(float(arrays[f"{kind}_fid_{publisher}"]), rel=2e-6)
    if kind == "wide":  # takes long
        return
    chunked = moments(samples[:100], 3).merge(moments(samples[100:], 7))
    assert frechet_distance(chunked, moments(references, 5)) == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_of_special_sets(arrays, features):  # noqa: F811
    samples, references = features("narrow")
    assert frechet_distance(moments(references), moments(references)) == pytest.approx(0, abs=1e-6)
    dead = [np.where(np.arange(64) < 5, 0, x) for x in (samples, references)]
    assert frechet_distance(*map(moments, dead)) == pytest.approx(float(arrays["dead_fid"]), rel=1e-6)
    few = moments(samples[:30]), moments(references[:40])
    assert frechet_distance(*few) == pytest.approx(float(arrays["few_fid"]), rel=1e-6)
    statistics = [
        Gaussian(arrays[f"narrow_{role}_mu"], arrays[f"narrow_{role}_sigma"])
        for role in ("samples", "reference")
    ]
    assert frechet_distance(*statistics) == pytest.approx(float(arrays["narrow_fid"]), rel=1e-6)


def test_the_distance_at_infinity_is_that_of_the_distributions():
    """Gaussians with means 0.5 apart in 16 dimensions: 4.  Finite sets are further apart."""
    rng = np.random.default_rng(1)
    samples, references = rng.standard_normal((3000, 16)), Gaussian(np.full(16, 0.5), np.eye(16))
    few = frechet_distance(moments(samples[:300]), references)
    assert few > 4.25 and abs(frechet_at_infinity(samples, references, smallest=150) - 4) < 0.15


def test_inception_score(arrays, weights, features):  # noqa: F811
    logits = features("wide")[0].astype(np.float64) @ weights["fc.weight"].T.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits - logits.max()).sum(1, keepdims=True)) - logits.max()
    for i, size in enumerate(arrays["is_split_size"]):
        assert inception_score(log_probs, int(size)) == pytest.approx(arrays["wide_is"][i], rel=1e-6)
        assert inception_score(log_probs, int(size)) == pytest.approx(arrays["wide_is_adm"][i], rel=1e-6)
    for i, splits in enumerate(arrays["is_splits"]):
        for name, shuffle in (("wide_is_torch_fidelity", True), ("wide_is_torch_fidelity_ordered", False)):
            got = inception_score_torch_fidelity(log_probs, int(splits), shuffle)
            np.testing.assert_allclose(got, arrays[name][i], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_recall(kind, arrays, features, monkeypatch):  # noqa: F811
    samples, references = features(kind)
    expected = tuple(arrays[f"{kind}_precision_recall"])
    assert precision_and_recall(samples, references) == expected
    np.testing.assert_allclose(arrays[f"{kind}_precision_recall_torch_fidelity"], expected, rtol=1e-7)
    monkeypatch.setattr(precision_recall, "BLOCK_BYTES", 8 * len(references) * 97)  # 97 rows at once
    radii = [squared_radii(x) for x in (samples, references)]
    for x, role in zip(radii, ("samples", "reference"), strict=True):
        np.testing.assert_allclose(x, arrays[f"{kind}_radii_{role}"], rtol=1e-5)
    np.testing.assert_array_equal(is_inside(samples, references, radii[1]), arrays[f"{kind}_samples_inside"])
    np.testing.assert_array_equal(
        is_inside(references, samples, radii[0]), arrays[f"{kind}_references_inside"]
    )


def test_precision_and_recall_as_adm_rounds_them(arrays, features):  # noqa: F811
    samples, references = features("narrow")
    got = precision_and_recall(samples, references, adm_float16=True)
    np.testing.assert_allclose(got, arrays["narrow_precision_recall_adm"], atol=0.02)
    overflowing = precision_and_recall(8 * samples, 8 * references, adm_float16=True)
    np.testing.assert_allclose(overflowing, arrays["narrow_precision_recall_adm_float32"], atol=1e-3)


def test_too_few_images_have_no_manifold():
    with pytest.raises(ValueError, match="precision and recall need more than 3 images, got 3"):
        precision_and_recall(np.ones((3, 2)), np.ones((9, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_distance(kind, arrays, features):  # noqa: F811
    samples, references = features(kind)
    subsets, size = int(arrays["kid_subsets"]), int(arrays["kid_subset_size"])
    got = kernel_distance(samples, references, subsets, size)
    np.testing.assert_allclose(got, arrays[f"{kind}_kid"], rtol=1e-6)
    n = min(len(samples), len(references))
    whole = squared_mmd(samples[:n], references[:n])
    assert whole == pytest.approx(float(arrays[f"{kind}_kid_whole"]), rel=1e-6)


def test_memory_of_distances_is_that_of_blocks(monkeypatch):
    x = np.random.default_rng(0).standard_normal((2000, 16))
    monkeypatch.setattr(precision_recall, "BLOCK_BYTES", 2**20)  # of 32 MB in all
    tracemalloc.start()
    squared_radii(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
