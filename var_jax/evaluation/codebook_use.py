"""How much of the codebook is used, per scale, over many images.

One batch of B images can hit at most B s_k^2 codes at scale k, so use is only meaningful beside the
most that the images seen could have used.
"""

import numpy as np


def codebook_use(counts: np.ndarray, scales_sides: tuple[int, ...], num_images: int) -> dict[str, float]:
    """Use of the codes from how often each was chosen.

    Args:
      counts: [K, V], times that each code was chosen at each scale.
      scales_sides: of the K maps.
      num_images: that the counts are over.

    Returns:
      For scale k `perplexity_k` (exponential of the entropy of the shares), `distinct_k` (codes used at
      all) and `most_k` (the most codes that so many images could have used), and the three over all
      scales, without a number.
    """
    use = {}
    rows = [(f"_{k}", counts[k], side * side) for k, side in enumerate(scales_sides)]
    rows.append(("", counts.sum(0), sum(side * side for side in scales_sides)))
    for suffix, row, positions in rows:
        shares = row[row > 0] / max(row.sum(), 1)
        use[f"perplexity{suffix}"] = float(np.exp(-(shares * np.log(shares)).sum()))
        use[f"distinct{suffix}"] = float((row > 0).sum())
        use[f"most{suffix}"] = float(min(counts.shape[1], num_images * positions))
    return use
