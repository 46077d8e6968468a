"""How near each other in a sequence lies what is near in the image, and what tokens tell about each other."""

import numpy as np
from sklearn.cluster import KMeans

from var_jax.transformer.positions import inverse

NUM_SHUFFLES = 4  # that the chance level of mutual information is the mean of
MAX_HISTOGRAM_CELLS = 2**24  # of joint histograms at once: 64 MiB


def neighbor_distances(order: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """How far apart in the sequence cells end up that touch in the image.

    Args:
      order: int [n * n], as `var_jax.transformer.positions.order` gives it.
      side: n, of the map.

    Returns:
      int32 [n, n - 1] of horizontal and int32 [n - 1, n] of vertical neighbours.

    Raises:
      ValueError: where the order is not one of such a map.
    """
    if len(order) != side * side:
        raise ValueError(f"an order of a map of side {side} has {side * side} cells, got shape {order.shape}")
    position = inverse(order).reshape(side, side)
    return abs(np.diff(position, axis=1)), abs(np.diff(position, axis=0))


def group_codes(codes: np.ndarray, counts: np.ndarray, groups: int, seed: int = 0) -> np.ndarray:
    """Puts codes that are near each other into one group, by k-means.

    Codes weigh as much as they are used, and those that are not used at all have no say.

    Args:
      codes: float [V, C].
      counts: int [V], how often each is used.
      groups: the most that there may be; fewer where fewer codes are used.
      seed: of k-means.

    Returns:
      int32 [V]: the group of each code.

    Raises:
      ValueError: where no code is used.
    """
    used = np.flatnonzero(counts)
    if not used.size:
        raise ValueError(f"none of {len(codes)} codes is used: nothing to group")
    groups = min(groups, len(np.unique(codes[used], axis=0)))
    clusters = KMeans(groups, n_init=4, random_state=seed).fit(codes[used], sample_weight=counts[used])
    return clusters.predict(codes).astype(np.int32)


def mutual_information(symbols: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mutual information of each two positions over the images, in bits, beyond chance.

    Put plainly into the formula, the frequencies found in N images give too much: two independent positions
    of G symbols each seem to share about (G - 1)^2 / (2 N ln 2) bits.  So what the same formula finds after
    the images were shuffled, at each position by itself, is taken off: the mean of SHUFFLES.  Shuffling
    leaves the frequencies at each position alone; what a token says by its place alone does not count.

    Args:
      symbols: int [N, P], from 0 up; few different ones.
      seed: of the shuffles.

    Returns:
      float32 [P, P], symmetric; a little below 0 at times where two positions are independent; 0 on the
      diagonal, which no shuffle changes.

    Raises:
      ValueError: on another shape, fewer than 2 images, or symbols below 0.
    """
    if symbols.ndim != 2 or len(symbols) < 2 or symbols.min() < 0:
        raise ValueError(
            f"symbols must be int [N, P] from 0 up, N at least 2; got {symbols.dtype} {symbols.shape}"
        )
    rng = np.random.default_rng(seed)
    chance = (
        sum(_biased_information(rng.permuted(symbols, axis=0)) for _ in range(NUM_SHUFFLES)) / NUM_SHUFFLES
    )
    return _biased_information(symbols) - chance


def position_entropy(symbols: np.ndarray) -> np.ndarray:
    """What a symbol says of its image at each position, in bits: the most that it can share with another.

    Args:
      symbols: int [N, P], from 0 up.

    Returns:
      float64 [P], by the frequencies at each position over the images.
    """
    shares = np.stack([(symbols == symbol).mean(0) for symbol in range(int(symbols.max()) + 1)])
    return _entropy(shares, axes=0)


def _biased_information(symbols: np.ndarray) -> np.ndarray:
    """float32 [P, P]: mutual information of the frequencies, in bits, with its bias."""
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
        together = _entropy(joint.reshape(-1, num, positions, num), axes=(1, 3))
        result[part] = entropy[part, None] + entropy - together
    return result


def _entropy(shares: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """In bits, of shares that add up to 1 over some axes."""
    return -(shares * np.log2(np.maximum(shares, 1e-30))).sum(axes)


def mean_by_image_distance(values: np.ndarray, side: int) -> np.ndarray:
    """Means of values [n * n, n * n] of pairs of cells at Manhattan distance 1, 2, ...: float64 [2n - 2]."""
    row, column = np.divmod(np.arange(side * side), side)
    distance = abs(row[:, None] - row) + abs(column[:, None] - column)
    return (np.bincount(distance.ravel(), values.ravel()) / np.bincount(distance.ravel()))[1:]


def mean_by_lag(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Means of values [L, L], symmetric, of pairs of cells 1, 2, ... apart in a sequence: float64 [L - 1]."""
    ordered = values[np.ix_(order, order)]
    return np.array([np.diagonal(ordered, lag).mean(dtype=np.float64) for lag in range(1, len(order))])
