import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.arrays import close
from var_jax.sampling.sampler import filter_logits


def test_golden(golden):
    with_shape = golden("sampling")
    logits = with_shape.pop("logits")
    assert len(with_shape) == 5
    for name, want in with_shape.items():
        top_k, top_p = name.removeprefix("k").split("_p")
        got = jax.nn.softmax(filter_logits(jnp.asarray(logits), int(top_k), float(top_p) or None))
        close(got, want)
        np.testing.assert_array_equal(got > 0, want > 0)


def test_bounds():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    kept = lambda k, p: np.isfinite(filter_logits(logits, k, p or None)).tolist()
    assert kept(0, 0.0) == kept(99, 0.0) == kept(0, 1.0) == [True] * 4
    assert kept(1, 0.0) == kept(0, 0.01) == [True, False, False, False]  # never the largest
    assert kept(2, 0.0) == [True, True, False, False]
    assert kept(0, 0.9) == [True, True, True, False]
    assert jax.jit(filter_logits, static_argnums=1)(logits, 0, 0.9).tolist()[3] == -jnp.inf
    tied = jnp.log(jnp.array([0.4, 0.25, 0.25, 0.1]))  # kept or dropped together
    for k, p in ((2, 0.0), (0, 0.6), (2, 0.7)):
        assert np.isfinite(filter_logits(tied, k, p or None)).tolist() == [True, True, True, False]
