"""Networks in whose features samples are scored: Inception-v3, or a classifier trained on small images."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from var_jax.errors import ConfigError
from var_jax.evaluation.classifier import Classifier
from var_jax.evaluation.frechet import Moments
from var_jax.evaluation.inception import Features, Inception, resize_tf1
from var_jax.sharding import batch_sharding, make_mesh, replicated

Extractor = Callable[[UInt8[np.ndarray, "n h w 3"]], Features]
MAX_CLASSIFIER_PIXELS = 10**8  # of all images that a small classifier is trained on


def inception_extractor(variables: dict, batch: int) -> Extractor:
    """Return a function of images uint8 [n, h, w, 3] that computes the features of Inception-v3 in numpy.

    The images are divided over all devices of all hosts; each host passes all images and gets all features.

    Args:
      variables: of the network (`interop.inception_weights.load_inception`).
      batch: images at once, rounded up to a multiple of the devices; the last batch is padded.
    """
    mesh = make_mesh(data=-1, fsdp=1)
    sharding = batch_sharding(mesh)
    variables = jax.device_put(variables, replicated(mesh))
    network = jax.jit(
        lambda variables, images: Inception().apply(variables, resize_tf1(images)),
        out_shardings=replicated(mesh),
    )

    batch += -batch % mesh.size

    def extract_batch(images: np.ndarray) -> Features:
        padded = np.pad(images, ((0, batch - len(images)), (0, 0), (0, 0), (0, 0)))
        shards = jax.make_array_from_callback(padded.shape, sharding, padded.__getitem__)
        return jax.tree.map(lambda x: np.asarray(x)[: len(images)], network(variables, shards))

    def extract(images: np.ndarray) -> Features:
        parts = [extract_batch(images[i : i + batch]) for i in range(0, len(images), batch)]
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    return extract


def fit_classifier(batches: Iterable[dict], count: int, side: int) -> Classifier:
    """Train a small classifier on the images of a data set.

    Args:
      batches: {"image": uint8 [b, side, side, 3], "label": [b], "valid": [b]}.
      count: number of images.
      side: of the images.

    Raises:
      ConfigError: if they are too many or too large for a network that sees pixels.
    """
    check_classifier_size(count, side)
    valid = [{name: x[batch["valid"] > 0] for name, x in batch.items()} for batch in batches]
    return Classifier(*(np.concatenate([batch[name] for batch in valid]) for name in ("image", "label")))


def check_classifier_size(count: int, side: int) -> None:
    """Raise ConfigError if images are too many or too large for a classifier that sees pixels."""
    if count * side**2 > MAX_CLASSIFIER_PIXELS:
        raise ConfigError(
            f"{count} images of {side} pixels are too many for a small classifier; give the weights of "
            "Inception-v3"
        )


def classifier_extractor(classifier: Classifier) -> Extractor:
    """Return a function of images uint8 [n, h, w, 3] that computes the features of a small classifier."""

    def extract(images: np.ndarray) -> Features:
        return Features(classifier.features(images), None, classifier.log_probs(images))

    return extract


class FeatureSet:
    """Features of a set of images, added batch by batch.

    Attributes:
      pool: Gaussian of the features of whole images.
      spatial: Gaussian of the features with positions; empty if the network has none.
    """

    def __init__(self):
        self.pool, self.spatial = Moments(), Moments()
        self._vectors: list[np.ndarray] = []
        self._log_probs: list[np.ndarray] = []

    def add(self, features: Features, keep: np.ndarray | slice = slice(None)) -> None:
        """Add a batch; of its vectors and probabilities, keep those of the images that `keep` selects."""
        self.pool.add(features.pool)
        if features.spatial is not None:
            self.spatial.add(features.spatial)
        self._vectors.append(np.asarray(features.pool[keep], np.float32))
        self._log_probs.append(np.asarray(features.log_probs[keep], np.float32))

    def select(self, chosen: slice) -> "FeatureSet":
        """Return the pooled features and probabilities of some of the images that were kept."""
        result = FeatureSet()
        result.add(Features(self.vectors[chosen], None, self.log_probs[chosen]))
        return result

    @property
    def vectors(self) -> Float[np.ndarray, "n D"]:
        """Features of whole images, of the images that were kept."""
        return np.concatenate(self._vectors)

    @property
    def log_probs(self) -> Float[np.ndarray, "n classes"]:
        """Logarithms of the probabilities of classes, of the images that were kept."""
        return np.concatenate(self._log_probs)


def extract_features(
    extractor: Extractor, images: UInt8[np.ndarray, "N h w 3"], batch: int, name: str
) -> FeatureSet:
    """Compute the features of images, which may be memory-mapped, in batches, with a progress bar."""
    result = FeatureSet()
    with tqdm(total=len(images), unit="image", desc=name, mininterval=1) as progress:
        for start in range(0, len(images), batch):
            part = np.asarray(images[start : start + batch])
            result.add(extractor(part))
            progress.update(len(part))
    return result
