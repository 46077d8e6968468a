import numpy as np
import pytest
from sklearn.datasets import load_digits

from var_jax.evaluation.classifier import Classifier, SampleJudge, within_class_std


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, -1)
    return images[:1200], data.target[:1200], images[1200:], data.target[1200:]


def test_the_classifier_recognizes_digits_and_its_distance_separates_noise(digits):
    images, labels, others, other_labels = digits
    classifier = Classifier(images, labels)
    assert (classifier.classes(others) == other_labels).mean() > 0.93
    noise = np.random.default_rng(0).integers(0, 256, others.shape).astype(np.uint8)
    near, far = (classifier.frechet(x, images) for x in (others, noise))
    assert near < 0.1 * far and classifier.frechet(images, images) == pytest.approx(0, abs=1e-3)
    assert classifier.features(others).shape == (len(others), 64)


def test_within_class_std_ignores_differences_between_classes(digits):
    images, labels, *_ = digits
    repeated = np.stack([images[labels == label][0] for label in labels])  # one image of each class
    assert within_class_std(repeated, labels) == 0
    expected = [images[labels == c].astype(float).std(0).mean() for c in range(10)]
    assert within_class_std(images, labels) == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_sample_judge_separates_copies_from_new_images(digits):
    images, labels, others, other_labels = digits
    judge = SampleJudge((images, labels), (others, other_labels))
    held_out, copies = judge.figures(others, other_labels), judge.figures(images, labels)
    assert held_out["nearest"] == 1 and copies["nearest"] == 0
    assert copies["spread"] == 1 and copies["called_right"] > 0.99
    assert copies["frechet"] > 0.01  # of as many as are held out; of all samples it would be 0
