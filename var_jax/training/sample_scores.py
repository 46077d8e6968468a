"""Score a transformer's samples while it trains: FID in features of Inception-v3 or of a classifier."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from var_jax.data.loader import eval_batches
from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels
from var_jax.evaluation.extractors import (
    Extractor,
    classifier_extractor,
    fit_classifier,
    inception_extractor,
)
from var_jax.evaluation.frechet import Gaussian, Moments, frechet_distance
from var_jax.evaluation.scores import reference_of_data
from var_jax.sampling.sampler import image_keys
from var_jax.training.preview import run_in_chunks

BATCH = 64  # images at once through the network


def sample_conditions(source: Source, count: int) -> np.ndarray:
    """Return the conditions of samples to score: all classes in turn, or those of the first images.

    Args:
      source: training data.
      count: number of samples.
    """
    if source.condition_shape:
        return np.stack([source[i % source.num_records]["condition"] for i in range(count)])
    return np.arange(count, dtype=np.int32) % source.num_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleScorer:
    """Network and reference of the FID of a run's samples, set up at their first use.

    Attributes:
      inception: variables of Inception-v3; None for a small classifier that is trained on the data.
      statistics: Gaussian of the features of reference images; None for that of the training images.
      source: training images.
      transform: their center crop.
    """

    inception: dict | None
    statistics: Gaussian | None
    source: Source
    transform: ToPixels | None

    @functools.cached_property
    def extractor(self) -> Extractor:
        """Network in whose features samples are compared."""
        if self.inception is not None:
            return inception_extractor(self.inception, BATCH)
        count, side = self.source.num_records, self.transform.size
        return classifier_extractor(fit_classifier(self._batches(), count, side))

    @functools.cached_property
    def reference(self) -> Gaussian:
        """Gaussian of the features of the reference images."""
        if self.statistics is not None:
            return self.statistics
        count = self.source.num_records
        return reference_of_data(self._batches(), count, self.extractor, max_images=0).pool

    def _batches(self):
        return eval_batches(self.source, self.transform, BATCH)

    def score(
        self,
        program: tuple[Callable, tuple],
        params: dict,
        frozen: dict,
        labels: np.ndarray,
        seed: int,
        is_stopping: Callable[[], bool],
    ) -> dict[str, float]:
        """Draw samples on the mesh and compute their FID; all processes call it.

        Args:
          program: `samples` of `Task.preview_programs`.
          params: parameters to sample with.
          frozen: `Task.frozen` on the mesh.
          labels: int32 [N], or other conditions.
          seed: seed of the samples.
          is_stopping: whether to stop early.

        Returns:
          fid and num_samples; {} if it stopped early.
        """
        moments = Moments()
        chunk = program[1][2].shape[0]
        for start in range(0, len(labels), chunk):
            if is_stopping():
                return {}
            indices = np.arange(start, min(start + chunk, len(labels)))
            keys = np.asarray(jax.random.key_data(image_keys(seed, indices)))
            images, _ = run_in_chunks(program, params, frozen, labels[indices], keys)
            moments.add(self.extractor(images).pool)
        return {"fid": frechet_distance(moments, self.reference), "num_samples": moments.count}
