"""Improved precision and recall (Kynkaanniemi et al. 2019), and authenticity, by distances of features."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

NEIGHBOR = 3  # k
BLOCK_BYTES = 2**27  # of a block of distances


def precision_and_recall(
    samples: Float[np.ndarray, "n D"], references: Float[np.ndarray, "m D"], adm_float16: bool = False
) -> tuple[float, float]:
    """Compute precision, the share of samples inside the references' manifold, and recall, the reverse.

    Distances are computed in blocks, so memory does not grow with n m.

    Args:
      samples: features of the samples.
      references: features of the reference images.
      adm_float16: whether to compute distances as ADM's evaluator does, in float16 unless that overflows,
        else in float32, in which its published recall is up to 0.01 higher.  Otherwise in float64.

    Raises:
      ValueError: if a side has too few images for its NEIGHBOR-th neighbor.
    """
    radii = [squared_radii(x, adm_float16) for x in (samples, references)]
    inside = lambda x, y, radius: is_inside(x, y, radius, adm_float16).mean()
    return float(inside(samples, references, radii[1])), float(inside(references, samples, radii[0]))


def authenticity(samples: Float[np.ndarray, "n D"], references: Float[np.ndarray, "m D"]) -> float:
    """Compute the share of samples that are new (Alaa et al. 2022).

    A sample counts as a copy if it is nearer to its nearest reference than that is to any other reference.
    Of held-out images, about half are new by this measure; of copies, none.
    """
    spacing = squared_radii(references, neighbor=1)
    new = []
    for block in _squared_distances(samples, references):
        nearest = block.argmin(1)
        new.append(block[np.arange(len(block)), nearest] >= spacing[nearest])
    return float(np.concatenate(new).mean())


def squared_radii(
    features: Float[np.ndarray, "n D"], adm_float16: bool = False, neighbor: int = NEIGHBOR
) -> Float[np.ndarray, " n"]:
    """Compute the squared distance of each vector to its `neighbor`-th neighbor, itself not counted."""
    if len(features) <= neighbor:
        raise ValueError(f"precision and recall need more than {neighbor} images, got {len(features)}")
    blocks = _squared_distances(features, features, adm_float16)
    nearest = (np.partition(block, neighbor, axis=1)[:, neighbor] for block in blocks)
    return np.concatenate([radii.copy() for radii in nearest])  # copies, since a view would keep its block


def is_inside(
    x: Float[np.ndarray, "n D"],
    centers: Float[np.ndarray, "m D"],
    radii: Float[np.ndarray, " m"],
    adm_float16: bool = False,
) -> Bool[np.ndarray, " n"]:
    """Return which vectors lie within the squared radius of any center."""
    blocks = _squared_distances(x, centers, adm_float16)
    return np.concatenate([(block <= radii).any(1) for block in blocks])


def _squared_distances(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"], adm_float16: bool = False
) -> Iterator[Float[np.ndarray, "block m"]]:
    """Compute |x - y|^2 of all pairs, for some rows of x at a time."""
    rows = max(1, BLOCK_BYTES // (8 * len(y)))
    y = y if adm_float16 else np.asarray(y, np.float64)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        if adm_float16:
            yield _adm_squared_distances(block, y)
        else:
            block = np.asarray(block, np.float64)
            squares = (block**2).sum(1)[:, None] + (y**2).sum(1)
            yield np.maximum(squares - 2 * (block @ y.T), 0)


def _adm_squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    for dtype in (jnp.float16, jnp.float32):
        a, b = (jnp.asarray(array, dtype) for array in (x, y))
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)
        distances = np.asarray(jnp.maximum(squares - 2 * jnp.matmul(a, b.T, precision="highest"), 0))
        if np.isfinite(distances).all():
            break
    return distances
