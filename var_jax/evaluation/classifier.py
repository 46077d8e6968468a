"""Evaluate samples of small images with a small classifier: accuracy, Frechet distance, diversity, copies.

The classifier is scikit-learn's perceptron with one hidden layer on the pixels.  Its hidden layer gives the
features of a Frechet distance for images on which Inception's are meaningless: digits, icons, textures.
"""

import numpy as np

from var_jax.evaluation.frechet import Moments, frechet_distance

HIDDEN_SIZE = 64


class Classifier:
    """Perceptron with one hidden layer, fitted to images and labels.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from sklearn.neural_network import MLPClassifier  # imported here, since it takes a second

        self._network = MLPClassifier((HIDDEN_SIZE,), alpha=1e-2, max_iter=300, random_state=0)
        self._network.fit(_flatten(images), labels)

    def classes(self, images: np.ndarray) -> np.ndarray:
        """Predict the classes of images uint8 [N, H, W, 3]: int [N]."""
        return self._network.predict(_flatten(images))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Compute the hidden activations of images uint8 [N, H, W, 3]: float [N, 64]."""
        weights, bias = self._network.coefs_[0], self._network.intercepts_[0]
        return np.maximum(_flatten(images) @ weights + bias, 0)

    def log_probs(self, images: np.ndarray) -> np.ndarray:
        """Compute the logarithms of the probabilities of classes, of images uint8 [N, H, W, 3]."""
        return self._network.predict_log_proba(_flatten(images))

    def frechet(self, a: np.ndarray, b: np.ndarray) -> float:
        """Compute the Frechet distance of two sets of images uint8 [n, H, W, 3] in these features."""
        moments_a, moments_b = Moments(), Moments()
        moments_a.add(self.features(a))
        moments_b.add(self.features(b))
        return frechet_distance(moments_a, moments_b)


class SampleJudge:
    """Evaluator of samples relative to training and held-out images.

    Frechet distances are of as many samples as there are held-out images, since the distance decreases with
    the number of images.

    Args:
      real: training images uint8 [N, H, W, 3] and labels int [N].
      held_out: held-out images uint8 [n, H, W, 3] and labels int [n].

    Attributes:
      held_out: the held-out images.
      held_out_labels: their labels.
    """

    def __init__(self, real: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]):
        self._images, self._labels = real
        self.held_out, self.held_out_labels = held_out
        self._classifier = Classifier(*real)
        self._real_std = within_class_std(*real)
        self._held_out_distance = self._distance_to_nearest(self.held_out)

    def figures(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the metrics of samples uint8 [N, H, W, 3] of labels [N].

        Returns:
          called_right: fraction of the samples that the classifier assigns to their label.
          frechet: Frechet distance to the training images in its features, of evenly chosen samples, as many
            as there are held-out images (or all if there are fewer).
          spread: standard deviation within a class, divided by that of the training images.
          nearest: median distance to the nearest training image, divided by that of the held-out images.
        """
        subset = np.linspace(0, len(images) - 1, min(len(images), len(self.held_out))).astype(int)
        return {
            "called_right": float((self._classifier.classes(images) == labels).mean()),
            "frechet": self._classifier.frechet(images[subset], self._images),
            "spread": within_class_std(images, labels) / self._real_std,
            "nearest": self._distance_to_nearest(images) / self._held_out_distance,
        }

    def _distance_to_nearest(self, images: np.ndarray) -> float:
        """Compute the median distance of images to the nearest training image."""
        from scipy.spatial.distance import cdist  # imported here, since it takes a third of a second

        return float(np.median(cdist(_flatten(images), _flatten(self._images)).min(1)))


def within_class_std(images: np.ndarray, labels: np.ndarray) -> float:
    """Compute the standard deviation of pixels within a class, averaged over pixels and classes."""
    within = [images[labels == label].astype(np.float32).std(0).mean() for label in np.unique(labels)]
    return float(np.mean(within))


def _flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255
