import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close
from var_jax.scales import Scales
from var_jax.transformer import positions
from var_jax.transformer.attention import attend, choose_attention, einsum
from var_jax.transformer.config import NextTokenConfig
from var_jax.transformer.orders import prediction_order
from var_jax.transformer.positions import (
    TokenCoords,
    distance_buckets,
    order_coords,
    rotary_angles,
    scale_coords,
)


def shifted(coords: TokenCoords, rows: float, columns: float, line: float) -> TokenCoords:
    by = np.array([rows, columns], np.float32)
    return TokenCoords(
        coords.query + by, coords.key + by, coords.query_index + line, coords.key_index + line, coords.side
    )


@pytest.mark.parametrize("kind", ["rotary_1d", "rotary_2d"])
@pytest.mark.parametrize("where", ["scales", "order"])
def test_rotary_scores_depend_on_distances_alone(kind, where):
    coords = scale_coords(Scales((1, 2, 4)))
    if where == "order":
        coords = order_coords(prediction_order("hilbert", 4), 4)
    q, k = (jax.random.normal(jax.random.key(i), (2, len(coords.query), 3, 8)) for i in (0, 1))

    def scores(coords):
        rotated = [
            positions.rotate(x, a) for x, a in zip((q, k), rotary_angles(coords, kind, 8), strict=True)
        ]
        return jnp.einsum("bqnh,bknh->bnqk", *rotated)

    unshifted = scores(coords)
    close(scores(shifted(coords, 3, 5, 7)), unshifted, 1e-5)
    plain = jnp.einsum("bqnh,bknh->bnqk", q, k)
    assert np.abs(unshifted - plain).max() > 0.5  # and distances do change them
    # Rotation preserves lengths, so normalized attention stays normalized.
    rotated = positions.rotate(q, rotary_angles(coords, kind, 8)[0])
    close(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(q, axis=-1), 1e-6)


def test_rotary_2d_turns_half_by_the_row_and_half_by_the_column():
    coords = order_coords(prediction_order("raster", 4), 4)
    angles, _ = rotary_angles(coords, "rotary_2d", 8)
    by_row, by_column = angles.reshape(4, 4, 2, 2).swapaxes(0, 2)[0], angles.reshape(4, 4, 2, 2)[0, :, 1]
    np.testing.assert_array_equal(by_row[0], by_row[3])  # the same in every column
    np.testing.assert_allclose(by_column[:, 0], np.arange(4))  # a radian a cell, at the shortest wavelength


def test_relative_positions_depend_on_distances_alone():
    coords = order_coords(prediction_order("spiral_in", 8), 8)
    result = distance_buckets(coords)
    np.testing.assert_array_equal(distance_buckets(shifted(coords, 3, 5, 7)), result)
    rows, columns = np.moveaxis(coords.query[:, None] - coords.key[None], -1, 0)
    assert len(np.unique(result)) > 100
    for row, column in ((0, 0), (1, -2), (-3, 3)):  # small distances have a bucket each
        same = (rows == row) & (columns == column)
        (bucket,) = np.unique(result[same])
        np.testing.assert_array_equal(result == bucket, same)
    assert result.min() >= 0 and result.max() < positions.BUCKETS
    scales = scale_coords(Scales((1, 2, 3, 4)))  # distances are not integers
    np.testing.assert_array_equal(distance_buckets(shifted(scales, 3, 5, 7)), distance_buckets(scales))


def test_scales_line_up():
    coords = scale_coords(Scales((1, 2, 4)))
    np.testing.assert_array_equal(coords.query[0], [1.5, 1.5])
    np.testing.assert_array_equal(coords.query[1:5], [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
    np.testing.assert_array_equal(coords.query[5:9], [[0, 0], [0, 1], [0, 2], [0, 3]])
    weights = positions.interpolation(coords.query[:, 0], 4)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_array_equal(weights[0], [0, 0.5, 0.5, 0])  # the middle is between rows 1 and 2


def test_a_query_stands_at_its_cell_and_a_key_at_the_one_before():
    cells = prediction_order("column", 3)
    coords = order_coords(cells, 3)
    np.testing.assert_array_equal(coords.query[:4], [[0, 0], [1, 0], [2, 0], [0, 1]])
    np.testing.assert_array_equal(coords.key[:4], [[-1, -1], [0, 0], [1, 0], [2, 0]])
    np.testing.assert_array_equal(coords.query_index - coords.key_index, 1)


def test_sinusoids_are_as_large_as_learned_positions_and_tell_all_cells():
    table = positions.sinusoids(order_coords(prediction_order("raster", 8), 8), 64)
    assert np.sqrt((table**2).mean()) == pytest.approx((1 / (3 * 64)) ** 0.5, rel=1e-3)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + np.eye(64)
    assert distances.min() > 0.01


@pytest.mark.parametrize("implementation", ["einsum", "grouped"])
def test_a_bias_is_added_to_the_scores(implementation):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 84, 3, 8)) for i in range(3))
    mask, bias = Scales((1, 3, 5, 7)).mask, jax.random.normal(jax.random.key(3), (3, 84, 84))
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * 0.3 + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    close(attend(q, k, v, 0.3, mask, implementation, bias), jnp.einsum("bnqk,bknh->bqnh", weights, v), 1e-5)


def test_attention_is_chosen_by_what_it_must_know():
    row = NextTokenConfig(depth=2, width=32, num_heads=4, scales=(4,), mask="row").masks
    axial = NextTokenConfig(depth=2, width=32, num_heads=4, scales=(4,), mask="axial").masks
    causal = NextTokenConfig(depth=2, width=32, num_heads=4, scales=(4,)).masks
    half = jnp.bfloat16
    assert choose_attention("auto", "tpu", half, 64, causal) == "splash"
    assert choose_attention("auto", "tpu", half, 64, row) == "splash"
    assert choose_attention("auto", "tpu", half, 64, axial) == "einsum"
    assert choose_attention("auto", "tpu", half, 64, causal, bias=True) == "grouped"
    assert choose_attention("auto", "gpu", half, 64, causal) == "triton"
    assert choose_attention("auto", "gpu", half, 24, causal) == "grouped"  # cuDNN has no group without a mask
    assert choose_attention("auto", "gpu", half, 24, (Scales((1, 4, 16)).mask,)) == "cudnn"
    assert choose_attention("auto", "gpu", half, 64, row) == "einsum"
    assert choose_attention("auto", "gpu", half, 64, causal, bias=True) == "grouped"
    assert choose_attention("auto", "cpu", jnp.float32, 64, axial, bias=True) == "einsum"
    with pytest.raises(ValueError, match="grouped does not support the mask .* use einsum or splash"):
        choose_attention("grouped", "cpu", half, 64, row)


def test_a_mask_known_only_when_the_program_runs_is_for_einsum():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 84, 3, 8)) for i in range(3))
    mask = Scales((1, 3, 5, 7)).mask
    result = jax.jit(lambda mask: attend(q, k, v, 0.3, mask, "grouped"))(jnp.asarray(mask))
    close(result, einsum(q, k, v, 0.3, mask), 1e-6)
