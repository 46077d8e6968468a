"""Kernel Inception Distance (Binkowski et al. 2018), unbiased in the number of images."""

import numpy as np
from jaxtyping import Float

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


def kernel_distance(
    samples: Float[np.ndarray, "n D"],
    references: Float[np.ndarray, "m D"],
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
) -> tuple[float, float]:
    """Compute mean and standard deviation of KID over random subsets, as torch-fidelity does.

    Args:
      samples: features of the samples.
      references: features of the reference images.
      subsets: number of subsets; each draws without replacement.
      subset_size: images of each side in a subset; at most half of the smaller side are taken.
    """
    size = min(subset_size, len(samples) // 2, len(references) // 2)
    rng = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        chosen = [x[rng.choice(len(x), size, replace=False)] for x in (samples, references)]
        values.append(squared_mmd(*chosen))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "n D"]) -> float:
    """Compute the unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, in float64."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = sum(k.sum() - np.trace(k) for k in (kernel(a, a), kernel(b, b)))
    return float(within / (len(a) * (len(a) - 1)) - 2 * kernel(a, b).mean())
