"""A small classifier of small pictures, to judge samples by: does it call them what was asked for?

A perceptron with one hidden layer on the pixels, by scikit-learn.  Its hidden layer gives features for a
Frechet distance where Inception's mean nothing: digits, icons, textures.
"""

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.neural_network import MLPClassifier

from var_jax.evaluation.frechet import Moments, frechet_distance

HIDDEN_SIZE = 64


class Classifier:
    """Fitted to real pictures.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._network = MLPClassifier((HIDDEN_SIZE,), alpha=1e-2, max_iter=300, random_state=0)
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
        for result, images in zip(moments, (a, b), strict=True):
            result.add(self.features(images))
        return frechet_distance(*moments)


class SampleJudge:
    """Judges samples beside held-out images, all by as many as these are, since a Frechet distance falls with
    the number of images.

    Args:
      real: training images uint8 [N, H, W, 3] and labels int [N].
      held_out: the same of held-out images.

    Attributes:
      held_out, held_out_labels: as given.
    """

    def __init__(self, real: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]):
        self._images, self._labels = real
        self.held_out, self.held_out_labels = held_out
        self._classifier = Classifier(*real)
        self._spread = within_class_std(*real)
        self._nearest = self._to_nearest(self.held_out)

    def figures(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Of images uint8 [N, H, W, 3] that were to be of labels [N].

        Returns:
          called_right: share that the classifier calls what was asked for.
          frechet: distance to the training images in its features, of as many images as are held out (evenly
            chosen; all where there are fewer).
          spread: standard deviation within a class, of that of the training images.
          nearest: median distance to the nearest training image, of that of a held-out image.
        """
        some = np.linspace(0, len(images) - 1, min(len(images), len(self.held_out))).astype(int)
        return {
            "called_right": float((self._classifier.classes(images) == labels).mean()),
            "frechet": self._classifier.frechet(images[some], self._images),
            "spread": within_class_std(images, labels) / self._spread,
            "nearest": self._to_nearest(images) / self._nearest,
        }

    def _to_nearest(self, images: np.ndarray) -> float:
        return float(np.median(cdist(_flat(images), _flat(self._images)).min(1)))


def within_class_std(images: np.ndarray, labels: np.ndarray) -> float:
    """Standard deviation of a pixel within a class, mean over pixels and classes, in grey levels."""
    within = [images[labels == label].astype(np.float32).std(0).mean() for label in np.unique(labels)]
    return float(np.mean(within))


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255
