"""Which tokens of an image are drawn anew: those under a mask, or those of the finer maps."""

import numpy as np

from var_jax.scales import Scales
from var_jax.tokenizer.resize import bilinear_matrix


def anew_under_mask(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """Tokens to draw anew where pixels are masked, as in the published zero-shot editing.

    At each scale the mask of what to keep is resized bilinearly, and what comes out above one half is
    kept; a 1x1 map is always kept.

    Args:
      mask: bool [B, H, W], True where the image is to be made anew.

    Returns:
      bool [B, L].
    """
    keep = 1 - np.asarray(mask, np.float32)
    maps = []
    for side in scales.sides:
        if side == 1:
            maps.append(np.zeros((len(keep), 1), bool))
            continue
        rows, columns = (bilinear_matrix(size, side) for size in keep.shape[1:])
        small = np.einsum("th,bhw,uw->btu", rows, keep, columns)
        maps.append(small.reshape(len(keep), -1) <= 0.5)
    return np.concatenate(maps, axis=1)


def anew_from_scale(first: int, batch: int, scales: Scales) -> np.ndarray:
    """bool [B, L]: all tokens of the maps from number `first` on (0 is the coarsest).

    Raises:
      ValueError: where there is no such map.
    """
    if not 0 <= first < len(scales):
        raise ValueError(f"the first scale to draw anew must be in 0 .. {len(scales) - 1}, found {first}")
    return np.broadcast_to(scales.levels >= first, (batch, scales.length))
