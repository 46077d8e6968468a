import numpy as np
import pytest

from var_jax.sampling.editing import mask_from_pixels, mask_from_scale
from var_jax.scales import SCALES_256, SCALES_512, Scales

SCALES = Scales((1, 2, 4))


def published(cells: np.ndarray, sides) -> np.ndarray:
    """Return the tokens that the published demonstration resamples, from a mask bool [h, h] on the last map.

    Its interpolation, written out cell by cell: two neighbors each way, half-pixel centers, clamped borders.
    """
    h, keep, resample = len(cells), 1.0 - cells, []
    for side in sides:
        for y in range(side):
            for x in range(side):
                (top, below), (left, right) = (divmod(max((i + 0.5) * h / side - 0.5, 0), 1) for i in (y, x))
                rows, columns = ([int(i), min(int(i) + 1, h - 1)] for i in (top, left))
                weights = np.outer([1 - below, below], [1 - right, right])
                share = (weights * keep[np.ix_(rows, columns)]).sum()
                resample.append(not share > 0.5 and side * side > 3)
    return np.array(resample)


@pytest.mark.parametrize(("sides", "pixels"), [(SCALES_256, 256), (SCALES_512, 512), ((1, 2, 4), 8)])
def test_a_box_gives_the_mask_of_the_published_demonstration(sides, pixels):
    """Its masks are boxes on the grid of the last map; here one of pixels that covers the same cells."""
    cell = pixels // sides[-1]
    for box in ((40, 200), (64, 192), (0, 256), (251, 256)):
        low, high = (round(edge * pixels / 256) for edge in box)
        mask = np.zeros((1, pixels, pixels), bool)
        mask[:, low:high, low:high] = True
        cells = np.zeros((sides[-1], sides[-1]), bool)
        cells[low // cell : -(-high // cell), low // cell : -(-high // cell)] = True
        np.testing.assert_array_equal(mask_from_pixels(mask, Scales(sides))[0], published(cells, sides))


@pytest.mark.parametrize("mask", ["pixel", "row", "column"])
def test_a_thin_mask_reaches_every_cell_that_it_touches_and_no_other(mask):
    where = {"pixel": np.s_[37, 200], "row": np.s_[37], "column": np.s_[:, 200]}[mask]
    pixels, cells = np.zeros((1, 256, 256), bool), np.zeros((16, 16), bool)
    pixels[0][where] = True
    cells[{"pixel": np.s_[2, 12], "row": np.s_[2], "column": np.s_[:, 12]}[mask]] = True
    last = mask_from_pixels(pixels, Scales(SCALES_256))[0, -256:].reshape(16, 16)
    np.testing.assert_array_equal(last, cells)


def test_the_lower_half_of_a_mask_is_the_lower_half_of_every_map_but_the_first():
    mask = np.zeros((1, 8, 8), bool)
    mask[:, 4:] = True
    resample = mask_from_pixels(mask, SCALES)[0]
    assert resample[:1].tolist() == [False]
    assert resample[1:5].reshape(2, 2).tolist() == [[False, False], [True, True]]
    assert resample[5:].reshape(4, 4).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_a_coarse_token_is_known_only_if_more_than_half_of_its_cell_is():
    mask = np.zeros((1, 6, 6), bool)
    mask[:, :3] = True
    middle = mask_from_pixels(mask, Scales((1, 3, 6)))[0, 1:10].reshape(3, 3)[1]
    assert middle.tolist() == [True] * 3  # exactly one half: resampled
    assert not mask_from_pixels(np.zeros((2, 6, 6), bool), SCALES).any()
    assert mask_from_pixels(np.ones((2, 6, 6), bool), SCALES)[:, 1:].all()


def test_images_have_masks_of_their_own():
    mask = np.zeros((2, 8, 8), bool)
    mask[1] = True
    resample = mask_from_pixels(mask, SCALES)
    assert not resample[0].any() and resample[1, 1:].all()


def test_from_a_scale_on():
    assert mask_from_scale(1, 2, SCALES).sum(1).tolist() == [20, 20]
    assert mask_from_scale(0, 1, SCALES).all()
    for wrong in (3, -1, 1.0, True, "1"):
        with pytest.raises(ValueError, match=f"from_scale must be a whole number in 0 .. 2, got {wrong!r}"):
            mask_from_scale(wrong, 1, SCALES)
