"""The embedded default: 1797 handwritten digits bundled with scikit-learn, as a TFDS data set.

8x8 pixels of 17 gray levels (Alpaydin & Kaynak 1998), stored as PNG in array_record files.  Preparing them
needs neither internet access nor TensorFlow.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_EVERY = 5  # keeps the variety of classes and writers in both splits


def test_mask(labels: np.ndarray) -> np.ndarray:
    """Return the mask of the test split, bool [N]: every fifth digit of each class in `labels` [N]."""
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return test


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the data set `digits`, with a fixed split: train 1442, test 355 images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8x8 pixels, bundled with scikit-learn.",
            features=features,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool = False):
        from sklearn.datasets import load_digits  # takes a second to import, and only the first run needs it

        digits = load_digits()
        for i in np.flatnonzero(test_mask(digits.target) == test):
            image, label = digits.images[i], digits.target[i]
            buffer = io.BytesIO()
            Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
            yield int(i), {"image": buffer.getvalue(), "label": int(label)}
