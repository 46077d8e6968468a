import numpy as np
import pytest

from var_jax.transformer.orders import ORDERS, inverse_permutation, prediction_order

SIDES = (1, 2, 3, 4, 5, 8, 16)
# Position in the sequence of each cell of a 4 x 4 map, drawn by hand.
BY_HAND = {
    "raster": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
    "column": [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
    "snake": [[0, 1, 2, 3], [7, 6, 5, 4], [8, 9, 10, 11], [15, 14, 13, 12]],
    "spiral_in": [[0, 1, 2, 3], [11, 12, 13, 4], [10, 15, 14, 5], [9, 8, 7, 6]],
    "spiral_out": [[15, 14, 13, 12], [4, 3, 2, 11], [5, 0, 1, 10], [6, 7, 8, 9]],
    "z_curve": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
    "hilbert": [[0, 1, 14, 15], [3, 2, 13, 12], [4, 7, 8, 11], [5, 6, 9, 10]],
}


def steps(name: str, side: int) -> np.ndarray:
    """Compute the Manhattan distance in the image from each token to the next."""
    row, column = np.divmod(prediction_order(name, side), side)
    return abs(np.diff(row)) + abs(np.diff(column))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ORDERS)
def test_every_order_goes_to_every_cell_once_and_can_be_undone(name, side):
    result = prediction_order(name, side)
    assert result.shape == (side * side,) and result.dtype == np.int32
    assert sorted(result.tolist()) == list(range(side * side))
    back = inverse_permutation(result)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back[result], np.arange(side * side))
    np.testing.assert_array_equal(result[back], np.arange(side * side))


@pytest.mark.parametrize("name", BY_HAND)
def test_orders_of_a_small_map_are_those_drawn_by_hand(name):
    np.testing.assert_array_equal(inverse_permutation(prediction_order(name, 4)).reshape(4, 4), BY_HAND[name])
    assert set(BY_HAND) == {*ORDERS} - {"random"}


@pytest.mark.parametrize("name", ["snake", "spiral_in", "spiral_out", "hilbert"])
def test_the_next_token_is_a_neighbour_in_the_image(name):
    for side in (*range(2, 25), 32):  # powers of two, other even and odd ones
        assert (steps(name, side) == 1).all(), side


@pytest.mark.parametrize("name", ["z_curve", "hilbert"])
def test_each_quarter_and_its_quarters_are_filled_before_the_next(name):
    position = inverse_permutation(prediction_order(name, 16)).reshape(16, 16)
    for size in (2, 4, 8):
        blocks = position.reshape(16 // size, size, 16 // size, size).swapaxes(1, 2).reshape(-1, size * size)
        assert (np.ptp(blocks, axis=1) == size * size - 1).all()


def test_of_no_power_of_two_the_z_curve_leaves_out_the_cells_outside():
    row, column = np.divmod(prediction_order("z_curve", 8), 8)
    inside = (row < 5) & (column < 5)
    np.testing.assert_array_equal(prediction_order("z_curve", 5), row[inside] * 5 + column[inside])


def test_random_depends_on_the_seed_alone():
    cells = prediction_order("random", 8, seed=3)
    np.testing.assert_array_equal(cells, prediction_order("random", 8, seed=3))
    assert (cells != prediction_order("random", 8, seed=4)).any()
    # Trained models depend on this permutation, so it must never change.
    assert prediction_order("random", 3, seed=0).tolist() == [7, 2, 1, 4, 8, 6, 3, 0, 5]
    np.testing.assert_array_equal(prediction_order("hilbert", 8, seed=3), prediction_order("hilbert", 8))


def test_orders_are_shared_and_cannot_be_written_to():
    assert prediction_order("raster", 8) is prediction_order("raster", 8)
    with pytest.raises(ValueError, match="read-only"):
        prediction_order("raster", 8)[0] = 1


def test_nonsense_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=f"one of {', '.join(ORDERS)}; got 'zigzag'"):
        prediction_order("zigzag", 4)
    with pytest.raises(ValueError, match="side of a map must be at least 1, got 0"):
        prediction_order("raster", 0)
    for wrong in ([0, 0, 1], [1, 2, 3], [[0, 1], [2, 3]]):
        with pytest.raises(ValueError, match="must be a permutation"):
            inverse_permutation(np.array(wrong))
