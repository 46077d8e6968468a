"""Sequence distances of neighboring cells, and mutual information of tokens."""

import numpy as np
from sklearn.cluster import KMeans

from var_jax.transformer.orders import inverse_permutation

NUM_SHUFFLES = 4  # over which the bias of mutual information is averaged
MAX_HISTOGRAM_CELLS = 2**24  # of the joint histograms computed at once: 64 MiB


def neighbor_distances(order: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the sequence distance of cells that touch in the image.

    Args:
      order: int [n * n], from `var_jax.transformer.orders.prediction_order`.
      side: n, of the map.

    Returns:
      Distances of horizontal neighbors int32 [n, n - 1], and of vertical neighbors int32 [n - 1, n].

    Raises:
      ValueError: if the order has another length.
    """
    if len(order) != side * side:
        raise ValueError(f"an order of a map of side {side} has {side * side} cells, got shape {order.shape}")
    position = inverse_permutation(order).reshape(side, side)
    return abs(np.diff(position, axis=1)), abs(np.diff(position, axis=0))


def group_codes(codes: np.ndarray, counts: np.ndarray, groups: int, seed: int = 0) -> np.ndarray:
    """Cluster the codes by k-means, weighted by their use.

    Args:
      codes: float [V, C].
      counts: int [V], the number of uses of each code; unused codes do not affect the clusters.
      groups: maximum number of groups; there are fewer if fewer codes are used.
      seed: of k-means.

    Returns:
      Group of each code, int32 [V].

    Raises:
      ValueError: if no code is used.
    """
    used = np.flatnonzero(counts)
    if not used.size:
        raise ValueError(f"none of {len(codes)} codes is used: nothing to group")
    groups = min(groups, len(np.unique(codes[used], axis=0)))
    clusters = KMeans(groups, n_init=4, random_state=seed).fit(codes[used], sample_weight=counts[used])
    return clusters.predict(codes).astype(np.int32)


def mutual_information(symbols: np.ndarray, seed: int = 0) -> np.ndarray:
    """Estimate the mutual information of each pair of positions over the images, in bits, corrected for bias.

    The plug-in estimate from the frequencies in N images is too high: two independent positions of G symbols
    each seem to share about (G - 1)^2 / (2 N ln 2) bits.  Therefore the mean estimate of NUM_SHUFFLES
    shuffles of the images, independent at each position, is subtracted.  A shuffle keeps the frequencies at
    each position, so information from the position itself does not count.

    Args:
      symbols: int [N, P], nonnegative, with few distinct values.
      seed: of the shuffles.

    Returns:
      float32 [P, P], symmetric; values for independent positions can be slightly negative; the diagonal is 0,
      since no shuffle changes it.

    Raises:
      ValueError: on another shape, fewer than 2 images, or negative symbols.
    """
    if symbols.ndim != 2 or len(symbols) < 2 or symbols.min() < 0:
        raise ValueError(
            f"symbols must be int [N, P] from 0 up, N at least 2; got {symbols.dtype} {symbols.shape}"
        )
    rng = np.random.default_rng(seed)
    bias = sum(_biased_information(rng.permuted(symbols, axis=0)) for _ in range(NUM_SHUFFLES)) / NUM_SHUFFLES
    return _biased_information(symbols) - bias


def position_entropy(symbols: np.ndarray) -> np.ndarray:
    """Compute the entropy of each position in bits, an upper bound of its mutual information with another.

    Args:
      symbols: int [N, P], nonnegative.

    Returns:
      float64 [P], from the frequencies at each position over the images.
    """
    shares = np.stack([(symbols == symbol).mean(0) for symbol in range(int(symbols.max()) + 1)])
    return _entropy(shares, axes=0)


def _biased_information(symbols: np.ndarray) -> np.ndarray:
    """Compute the plug-in estimate of mutual information in bits, including its bias, float32 [P, P]."""
    images, positions = symbols.shape
    num = int(symbols.max()) + 1
    one_hot = (symbols[..., None] == np.arange(num)).astype(np.float32).reshape(images, positions * num)
    entropy = position_entropy(symbols)
    result = np.empty((positions, positions), np.float32)
    rows = max(1, MAX_HISTOGRAM_CELLS // (num * num * positions))
    for first in range(0, positions, rows):
        part = slice(first, min(first + rows, positions))
        # One matrix product counts the symbols of all pairs of positions.
        joint = one_hot[:, part.start * num : part.stop * num].T @ one_hot / images
        joint_entropy = _entropy(joint.reshape(-1, num, positions, num), axes=(1, 3))
        result[part] = entropy[part, None] + entropy - joint_entropy
    return result


def _entropy(shares: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """Compute the entropy in bits of shares that sum to 1 over `axes`."""
    return -(shares * np.log2(np.maximum(shares, 1e-30))).sum(axes)


def mean_by_image_distance(values: np.ndarray, side: int) -> np.ndarray:
    """Average values [n * n, n * n] of pairs of cells by Manhattan distance 1, 2, ...: float64 [2n - 2]."""
    row, column = np.divmod(np.arange(side * side), side)
    distance = abs(row[:, None] - row) + abs(column[:, None] - column)
    return (np.bincount(distance.ravel(), values.ravel()) / np.bincount(distance.ravel()))[1:]


def mean_by_lag(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Average symmetric values [L, L] of pairs of cells by sequence distance 1, 2, ...: float64 [L - 1]."""
    ordered = values[np.ix_(order, order)]
    return np.array([np.diagonal(ordered, lag).mean(dtype=np.float64) for lag in range(1, len(order))])
