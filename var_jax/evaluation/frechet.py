"""Frechet distance of two sets of images in the features of a network (FID: Heusel et al. 2017)."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Moments:
    """Sums over features [D] that come batch by batch, in float64.

    Attributes:
      count: features so far.
      total: [D], their sum.
      products: [D, D], the sum of their outer products.
    """

    count: int = 0
    total: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        """Takes features [n, D] in."""
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], without bias.  Raises ValueError on fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images on each side, got {self.count}")
        return (self.products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), of two Gaussians of the same moments.

    The trace of the root comes from the eigenvalues of the product, which are real and not negative but for
    rounding, also where a covariance has no full rank (fewer images than features).
    """
    roots = np.sqrt(np.maximum(np.linalg.eigvals(a.covariance @ b.covariance).real, 0))
    apart = ((a.mean - b.mean) ** 2).sum()
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots.sum())
