"""Which tokens of an image are drawn anew: those under a mask, or those of the finer maps."""

import numpy as np

from var_jax.sampling.options import check_integer
from var_jax.scales import Scales
from var_jax.tokenizer.resize import area_matrix, bilinear_matrix


def mask_from_pixels(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """Tokens to draw anew where pixels are masked, as in the published zero-shot editing.

    The mask lives on the grid of the last map: a cell is drawn anew if a masked pixel touches it.  From there
    the mask of what to keep is resized bilinearly to every other map, and what comes out above one half is
    kept; a 1x1 map is always kept.

    Args:
      mask: bool [B, H, W], True where the image is to be made anew.

    Returns:
      bool [B, L].

    Source: `get_edit_mask` and `replace_embedding` in demo_zero_shot_edit.ipynb of FoundationVision/VAR,
    where the mask is given on the grid of the last map.
    """
    rows, columns = (area_matrix(size, scales.side) for size in mask.shape[1:])
    touching_tokens = np.einsum("th,bhw,uw->btu", rows, mask.astype(np.float32), columns) > 0
    keep = 1 - touching_tokens.astype(np.float32)
    maps = []
    for side in scales.sides:
        resize = bilinear_matrix(scales.side, side)
        resample = np.einsum("th,bhw,uw->btu", resize, keep, resize) <= 0.5
        maps.append(resample.reshape(len(keep), -1) & (side > 1))
    return np.concatenate(maps, axis=1)


def mask_from_scale(first: int, batch: int, scales: Scales) -> np.ndarray:
    """bool [B, L]: all tokens of the maps from number `first` on (0 is the coarsest).

    Raises:
      ValueError: where there is no such map.
    """
    check_integer("from_scale", first, 0, len(scales) - 1)
    return np.broadcast_to(scales.levels >= first, (batch, scales.length))
