import numpy as np
import pytest

from experiments.locality import measures
from experiments.locality.measures import (
    group_codes,
    mean_by_image_distance,
    mean_by_lag,
    mutual_information,
    neighbor_distances,
)
from var_jax.transformer.orders import ORDERS, prediction_order


def test_distances_of_simple_orders():
    for name, expected in (("raster", (1, 7)), ("column", (7, 1))):
        horizontal, vertical = neighbor_distances(prediction_order(name, 7), 7)
        assert horizontal.shape == (7, 6) and vertical.shape == (6, 7)
        assert (horizontal == expected[0]).all() and (vertical == expected[1]).all()
    horizontal, vertical = neighbor_distances(prediction_order("snake", 3), 3)
    assert (horizontal == 1).all() and vertical.tolist() == [[5, 3, 1], [1, 3, 5]]
    horizontal, vertical = neighbor_distances(prediction_order("hilbert", 2), 2)
    assert horizontal.tolist() == [[1], [1]] or vertical.tolist() == [[1, 1]]
    assert sorted([*horizontal.ravel(), *vertical.ravel()]) == [1, 1, 1, 3]
    with pytest.raises(ValueError, match=r"side 3 has 9 cells, got shape \(16,\)"):
        neighbor_distances(prediction_order("raster", 4), 3)


def test_independent_tokens_share_nothing_unlike_the_plug_in_estimate():
    tokens = np.random.default_rng(0).integers(16, size=(500, 30))
    off_diagonal = ~np.eye(30, dtype=bool)
    assert measures._biased_information(tokens)[off_diagonal].mean() > 0.3  # about 15^2 / (2 * 500 * ln 2)
    result = mutual_information(tokens)
    assert abs(result[off_diagonal].mean()) < 0.005 and abs(result[off_diagonal]).max() < 0.15


def test_equal_tokens_share_their_entropy_and_a_channel_what_it_lets_through():
    rng = np.random.default_rng(0)
    first = rng.choice(4, size=20000, p=[0.5, 0.25, 0.125, 0.125])  # 1.75 bits
    bit = first == 0  # of entropy 1
    flipped = bit ^ (rng.random(20000) < 0.11)  # a channel of capacity 1/2
    result = mutual_information(np.stack([first, first, 3 - first, bit, flipped], axis=1))
    np.testing.assert_allclose(result[0, 1:4], [1.75, 1.75, 1], atol=0.02)
    assert result[3, 4] == pytest.approx(0.5, abs=0.02)
    np.testing.assert_allclose(result, result.T, atol=1e-6)


def test_information_from_the_position_alone_does_not_count():
    rng = np.random.default_rng(0)
    tokens = rng.choice(2, size=(2000, 8), p=[0.95, 0.05])
    tokens[:, 4:] = 1 - tokens[:, 4:]  # the border and the middle have other tokens
    assert abs(mutual_information(tokens)).max() < 0.01


def test_computing_the_pairs_in_parts_changes_nothing(monkeypatch):
    tokens = np.random.default_rng(0).integers(3, size=(50, 10))
    at_once = mutual_information(tokens)
    monkeypatch.setattr(measures, "MAX_HISTOGRAM_CELLS", 3 * 3 * 10 * 4)  # 4 rows, the last part is of 2
    np.testing.assert_allclose(mutual_information(tokens), at_once, atol=1e-6)


@pytest.mark.parametrize("wrong", [np.zeros(4, int), np.zeros((1, 4), int), np.full((3, 4), -1)])
def test_invalid_symbols_are_refused(wrong):
    with pytest.raises(ValueError, match=r"symbols must be int \[N, P\] from 0 up"):
        mutual_information(wrong)


def test_groups_hold_near_codes_and_ignore_unused_ones():
    codes = np.array([[0, 0], [0, 1], [9, 0], [9, 1], [500, 500]], np.float32)
    result = group_codes(codes, np.array([3, 1, 2, 5, 0]), groups=2)
    assert result.dtype == np.int32 and result[0] == result[1] != result[2] == result[3]
    assert set(result) == {0, 1}
    assert set(group_codes(codes, np.array([1, 0, 0, 1, 0]), groups=16)) == {0, 1}
    with pytest.raises(ValueError, match="none of 5 codes is used"):
        group_codes(codes, np.zeros(5, int), groups=2)


@pytest.mark.parametrize("name", ORDERS)
def test_means_over_pairs_by_distance_and_by_lag(name):
    row, column = np.divmod(np.arange(16), 4)
    distance = abs(row[:, None] - row) + abs(column[:, None] - column)
    np.testing.assert_allclose(mean_by_image_distance(distance, 4), np.arange(1, 7))
    cells = prediction_order(name, 4)
    result = mean_by_lag(distance, cells)
    for lag in range(1, 16):
        assert result[lag - 1] == pytest.approx(
            np.mean([distance[cells[i], cells[i + lag]] for i in range(16 - lag)])
        )
