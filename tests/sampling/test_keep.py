import numpy as np
import pytest

from var_jax.sampling.keep import anew_from_scale, anew_under_mask
from var_jax.scales import Scales

SCALES = Scales((1, 2, 4))


def test_the_lower_half_of_a_mask_is_the_lower_half_of_every_map_but_the_first():
    mask = np.zeros((1, 8, 8), bool)
    mask[:, 4:] = True
    anew = anew_under_mask(mask, SCALES)[0]
    assert anew[:1].tolist() == [False]
    assert anew[1:5].reshape(2, 2).tolist() == [[False, False], [True, True]]
    assert anew[5:].reshape(4, 4).tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_a_cell_is_kept_only_where_more_than_half_of_it_is():
    mask = np.zeros((1, 6, 6), bool)
    mask[:, :3] = True
    middle = anew_under_mask(mask, Scales((1, 3)))[0, 1:].reshape(3, 3)[1]
    assert middle.tolist() == [True] * 3  # exactly one half: anew
    assert not anew_under_mask(np.zeros((2, 6, 6), bool), SCALES).any()
    assert anew_under_mask(np.ones((2, 6, 6), bool), SCALES)[:, 1:].all()


def test_images_have_masks_of_their_own():
    mask = np.zeros((2, 8, 8), bool)
    mask[1] = True
    anew = anew_under_mask(mask, SCALES)
    assert not anew[0].any() and anew[1, 1:].all()


def test_from_a_scale_on():
    assert anew_from_scale(1, 2, SCALES).sum(1).tolist() == [20, 20]
    assert anew_from_scale(0, 1, SCALES).all()
    with pytest.raises(ValueError, match="must be in 0 .. 2, found 3"):
        anew_from_scale(3, 1, SCALES)
