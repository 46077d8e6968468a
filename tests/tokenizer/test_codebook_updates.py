import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tokenizer.test_quantizer import random_quantizer
from var_jax.scales import Scales
from var_jax.tokenizer.codebook_updates import (
    codebook_use,
    count_codes,
    dead_codes,
    draw_targets,
    kmeans,
    moving_mean,
    restart,
)

SCALES = Scales((1, 2))


def test_counts_per_scale_leave_padding_out():
    tokens = jnp.array([[0, 1, 1, 2, 2], [3, 3, 3, 3, 3]])
    counts = count_codes(tokens, SCALES, 4)
    np.testing.assert_array_equal(counts, [[1, 0, 0, 1], [0, 2, 2, 4]])
    counts = count_codes(tokens, SCALES, 4, jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(counts, [[1, 0, 0, 0], [0, 2, 2, 0]])


def test_dead_codes_are_those_below_their_even_share():
    hits = jnp.array([[1.0, 0.0, 0.0, 0.0], [10.0, 0.1, 5.0, 0.0]])
    np.testing.assert_array_equal(dead_codes(hits, 0.03), [False, True, False, True])


def test_restart_moves_dead_codes_onto_targets_of_any_scale():
    codebook = jnp.zeros((64, 2))
    targets = jnp.arange(20.0).reshape(2, 5, 2) + 1
    dead = jnp.arange(64) % 2 == 0
    moved = np.asarray(restart(codebook, dead, targets, SCALES, jax.random.key(0)))
    assert not moved[1::2].any()
    rows = {tuple(row) for row in moved[::2].tolist()}
    assert rows <= {tuple(row) for row in np.asarray(targets).reshape(-1, 2).tolist()} and len(rows) > 5


def test_targets_are_drawn_from_all_scales_alike():
    scales = Scales((1, 4))
    targets = jnp.asarray(scales.levels, jnp.float32)[None, :, None] * jnp.ones((3, 17, 2))
    sample = draw_targets(targets, scales, 1000, jax.random.key(0))
    assert 0.45 < float(sample.mean()) < 0.55  # uniform positions would give 16/17


def test_perplexity_distinct_and_the_most_possible():
    counts = np.array([[4, 4, 0, 0], [8, 8, 8, 8]], np.float32)
    use = codebook_use(counts, (1, 2), num_images=8)
    assert use["perplexity_0"] == pytest.approx(2) and use["distinct_0"] == 2 and use["most_0"] == 4
    assert use["perplexity_1"] == pytest.approx(4) and use["distinct_1"] == 4
    shares = np.array([12, 12, 8, 8]) / 40
    assert use["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_few_images_cannot_use_many_codes():
    use = codebook_use(np.zeros((2, 100)), (1, 2), num_images=3)
    assert (use["most_0"], use["most_1"], use["most"]) == (3, 12, 15)


def test_a_code_is_the_moving_mean_of_its_targets_and_stays_until_it_has_any():
    codebook = jnp.array([[9.0, 9.0], [5.0, 5.0], [7.0, 7.0]])
    uses = jnp.zeros(3)
    first = (jnp.array([[0, 0]]), jnp.array([[[1.0, 0.0], [3.0, 0.0]]]))
    codebook, uses = moving_mean(codebook, uses, *first, decay=0.5)
    np.testing.assert_allclose(codebook, [[2, 0], [5, 5], [7, 7]])
    second = (jnp.array([[0, 1]]), jnp.array([[[8.0, 0.0], [1.0, 1.0]]]))
    codebook, uses = moving_mean(codebook, uses, *second, decay=0.5)
    np.testing.assert_allclose(codebook, [[(0.5 * 4 + 8) / (0.5 * 2 + 1), 0], [1, 1], [7, 7]])
    np.testing.assert_allclose(uses, [2, 1, 0])
    slow, _ = moving_mean(codebook, jnp.full(3, 100.0), *second, decay=0.5)  # codes with many uses
    assert float(jnp.abs(slow - codebook).max()) < 0.1


def test_kmeans_finds_the_groups_that_are_there():
    """Features of one 4x4 map are near one of eight points, which become codes."""
    points = 10 * jax.random.normal(jax.random.key(0), (8, 8))
    group = jax.random.randint(jax.random.key(1), (64, 4, 4), 0, 8)
    features = points[group] + 0.01 * jax.random.normal(jax.random.key(2), (64, 4, 4, 8))
    quantizer = random_quantizer((4,), num_phis=0, num_codes=64)
    codebook = kmeans(quantizer, features, jax.random.key(3), jnp.array(True))
    fitted = quantizer.replace(codebook=codebook)(features)
    assert float(jnp.abs(fitted.f_hat - features).max()) < 0.1
    distance = jnp.linalg.norm(points[:, None] - codebook, axis=-1)
    assert float(distance.min(1).max()) < 0.1


def test_kmeans_lowers_what_is_left_after_all_maps_and_goes_on_from_the_codes_it_is_given():
    features = jax.random.normal(jax.random.key(1), (32, 4, 4, 8))
    quantizer = random_quantizer((1, 2, 4), num_phis=0, num_codes=128)
    error = lambda codebook: float(
        jnp.mean((quantizer.replace(codebook=codebook)(features).f_hat - features) ** 2)
    )
    fitted = kmeans(quantizer, features, jax.random.key(2), jnp.array(True))
    continued = kmeans(quantizer.replace(codebook=fitted), features, jax.random.key(3), jnp.array(False))
    assert error(continued) < error(fitted) < 0.5 * error(quantizer.codebook)
    tokens = quantizer.replace(codebook=continued).tokenize(features)
    assert float(codebook_use(count_codes(tokens, quantizer.scales, 128), (1, 2, 4), 32)["distinct"]) > 100
