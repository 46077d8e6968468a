import jax
import jax.numpy as jnp
import numpy as np

from var_jax.scales import Scales
from var_jax.tokenizer.codebook import count_codes, dead_codes, restart

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
    moved = np.asarray(restart(codebook, dead, targets, jax.random.key(0)))
    assert not moved[1::2].any()
    rows = {tuple(row) for row in moved[::2].tolist()}
    assert rows <= {tuple(row) for row in np.asarray(targets).reshape(-1, 2).tolist()} and len(rows) > 5
