"""Masks of the tokens to resample: those under a pixel mask, or those of the finer maps."""

import numpy as np
from jaxtyping import Bool

from var_jax.sampling.options import check_integer
from var_jax.scales import Scales
from var_jax.tokenizer.resize import area_matrix, bilinear_matrix


def mask_from_pixels(mask: Bool[np.ndarray, "B H W"], scales: Scales) -> Bool[np.ndarray, "B L"]:
    """Convert a pixel mask to a mask of the tokens to resample, as in the published zero-shot editing.

    On the last map a token is resampled if a masked pixel touches its cell.  From there the mask of known
    tokens is resized bilinearly to every other map, where tokens with a value above one half are known; the
    token of a 1x1 map is always known.

    Args:
      mask: True where pixels are to be resampled.
      scales: schedule of the token maps.

    Returns:
      True where a token is to be resampled.

    Source: `get_edit_mask` and `replace_embedding` in demo_zero_shot_edit.ipynb of FoundationVision/VAR,
    where the mask is given on the grid of the last map.
    """
    rows, columns = (area_matrix(size, scales.side) for size in mask.shape[1:])
    touched = np.einsum("th,bhw,uw->btu", rows, mask.astype(np.float32), columns) > 0
    known = 1 - touched.astype(np.float32)
    maps = []
    for side in scales.sides:
        resize = bilinear_matrix(scales.side, side)
        resample = np.einsum("th,bhw,uw->btu", resize, known, resize) <= 0.5
        maps.append(resample.reshape(len(known), -1) & (side > 1))
    return np.concatenate(maps, axis=1)


def mask_from_scale(first: int, batch: int, scales: Scales) -> Bool[np.ndarray, "B L"]:
    """Return a mask that resamples all tokens of the maps from scale `first` on (0 is the coarsest).

    Raises:
      ValueError: if `first` is not a scale of the schedule.
    """
    check_integer("from_scale", first, 0, len(scales) - 1)
    return np.broadcast_to(scales.levels >= first, (batch, scales.length))
