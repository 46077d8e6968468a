"""Compute the Frechet distance of two sets of images in features of a network (FID: Heusel et al. 2017)."""

import dataclasses

import numpy as np


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


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute the Frechet distance of two Gaussians from their moments.

    It is |mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the matrix root is the sum of the roots of the product's eigenvalues, which are real and
    nonnegative up to rounding, also if a covariance is rank-deficient (fewer images than features).
    """
    roots = np.sqrt(np.maximum(np.linalg.eigvals(a.covariance @ b.covariance).real, 0))
    mean_term = ((a.mean - b.mean) ** 2).sum()
    return float(mean_term + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots.sum())
