"""Compute the Frechet distance of two sets of images in features of a network (FID: Heusel et al. 2017)."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass
class Moments:
    """Mean and covariance of feature vectors [D], accumulated batch by batch in float64.

    Attributes:
      count: number of features added.
      total: [D], their sum.
      products: [D, D], the sum of their outer products.
    """

    count: int = 0
    total: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        """Add a batch of features [n, D]."""
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of features."""
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance matrix [D, D].

        Raises:
          ValueError: if fewer than two features were added.
        """
        if self.count < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images on each side, got {self.count}")
        return (self.products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(a: Moments | Gaussian, b: Moments | Gaussian) -> float:
    """Compute the Frechet distance of two Gaussians.

    It is |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)).  The trace of the matrix root is the sum
    of the singular values of C_a^(1/2) C_b^(1/2), which is exact also for fewer images than features.
    """
    root = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    mean_term = ((a.mean - b.mean) ** 2).sum()
    return float(mean_term + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Factor a covariance as R R^T, without the directions in which it is rounding error."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_at_infinity(
    samples: Float[np.ndarray, "n D"], references: Moments | Gaussian, smallest: int = 5000, points: int = 15
) -> float:
    """Extrapolate the Frechet distance to infinitely many samples (Chong & Forsyth 2020).

    The distance of n samples is linear in 1 / n.  It is computed for random subsets of the samples, and the
    line is continued to 1 / n = 0.

    Args:
      samples: features of the samples.
      references: of the reference images.
      smallest: number of samples in the smallest subset; at most half of them are taken.
      points: number of subsets.
    """
    rng = np.random.default_rng(0)
    sizes = np.linspace(min(smallest, len(samples) // 2), len(samples), points).astype(int)
    distances = []
    for size in sizes:
        moments = Moments()
        moments.add(samples[rng.permutation(len(samples))[:size]])
        distances.append(frechet_distance(moments, references))
    return float(np.polyfit(1 / sizes, distances, 1)[1])
