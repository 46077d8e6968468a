"""A small classifier of small pictures, to judge samples by: does it call them what was asked for?

A perceptron with one hidden layer on the pixels, by scikit-learn.  Its hidden layer gives features for a
Frechet distance where Inception's mean nothing: digits, icons, textures.
"""

import numpy as np
from sklearn.neural_network import MLPClassifier

from var_jax.evaluation.frechet import Moments, frechet_distance

HIDDEN = 64


class Classifier:
    """Fitted to real pictures.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._network = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=300, random_state=0)
        self._network.fit(_flat(images), labels)

    def classes(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 3] -> int [N]."""
        return self._network.predict(_flat(images))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [N, H, W, 3] -> what the hidden layer makes of them, float [N, 64]."""
        weights, bias = self._network.coefs_[0], self._network.intercepts_[0]
        return np.maximum(_flat(images) @ weights + bias, 0)

    def frechet(self, a: np.ndarray, b: np.ndarray) -> float:
        """Frechet distance of two sets of images in these features."""
        moments = Moments(), Moments()
        for found, images in zip(moments, (a, b), strict=True):
            found.add(self.features(images))
        return frechet_distance(*moments)


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """Standard deviation of a pixel within a class, mean over pixels and classes, in grey levels."""
    within = [images[labels == label].astype(np.float32).std(0).mean() for label in np.unique(labels)]
    return float(np.mean(within))


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255
