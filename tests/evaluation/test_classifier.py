import numpy as np
import pytest
from sklearn.datasets import load_digits

from var_jax.evaluation.classifier import Classifier, SampleJudge, within_class_std


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, -1)
    return images[:1200], data.target[:1200], images[1200:], data.target[1200:]


def test_it_knows_digits_and_tells_noise_from_them(digits):
    images, labels, others, other_labels = digits
    classifier = Classifier(images, labels)
    assert (classifier.classes(others) == other_labels).mean() > 0.93
    noise = np.random.default_rng(0).integers(0, 256, others.shape).astype(np.uint8)
    near, far = (classifier.frechet(x, images) for x in (others, noise))
    assert near < 0.1 * far and classifier.frechet(images, images) == pytest.approx(0, abs=1e-3)
    assert classifier.features(others).shape == (len(others), 64)


def test_spread_is_within_classes(digits):
    images, labels, *_ = digits
    alone = np.stack(
        [images[labels == label][0] for label in labels]
    )  # one image of each class, again and again
    assert within_class_std(alone, labels) == 0
    by_hand = [images[labels == c].astype(float).std(0).mean() for c in range(10)]
    assert within_class_std(images, labels) == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_a_jury_tells_copies_from_new_images(digits):
    images, labels, others, other_labels = digits
    jury = SampleJudge((images, labels), (others, other_labels))
    held_out, copies = jury.figures(others, other_labels), jury.figures(images, labels)
    assert held_out["nearest"] == 1 and copies["nearest"] == 0
    assert copies["spread"] == 1 and copies["called_right"] > 0.99
    assert copies["frechet"] > 0.01  # of as many as are held out, not of all, which would be 0
