import jax
import jax.numpy as jnp
import numpy as np

from var_jax.tokenizer.losses import entropy_penalty

CODES = jnp.eye(4)


def test_entropy_is_least_where_targets_are_sure_and_codes_are_all_wanted():
    sure = entropy_penalty(CODES[None], CODES, 0.01)
    np.testing.assert_allclose(sure, -np.log(4), atol=1e-4)
    one_for_all = entropy_penalty(jnp.tile(CODES[:1], (1, 4, 1)), CODES, 0.01)
    unsure = entropy_penalty(jnp.zeros((1, 4, 4)), CODES, 0.01)
    np.testing.assert_allclose([one_for_all[0], unsure[0]], 0, atol=1e-4)


def test_entropy_of_a_batch_by_hand():
    targets = jax.random.normal(jax.random.key(0), (3, 5, 4))
    distance = ((np.asarray(targets)[:, :, None] - np.asarray(CODES)) ** 2).sum(-1)
    p = np.exp(-distance / 0.7)
    p /= p.sum(-1, keepdims=True)
    mean = p.mean((0, 1))
    want = -(p * np.log(p)).sum(-1).mean(-1) + (mean * np.log(mean)).sum()
    np.testing.assert_allclose(entropy_penalty(targets, CODES, 0.7), want, rtol=1e-4)


def test_its_gradient_spreads_targets_that_crowd_on_one_code():
    targets = 0.1 * jax.random.normal(jax.random.key(0), (8, 2, 4)).at[..., 0].add(3.0)
    penalty = lambda x: entropy_penalty(x, CODES, 1.0).mean()
    moved = targets - 5 * jax.grad(penalty)(targets)
    assert float(penalty(moved)) < float(penalty(targets)) - 0.005
