from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close
from var_jax.sampling.filter_logits import (
    filter_logits,
    threshold_by_bisection,
    threshold_by_kernel,
    threshold_by_sorting,
)
from var_jax.sharding import make_mesh

interpreted_kernel = partial(threshold_by_kernel, interpret=True)
THRESHOLDS = [threshold_by_sorting, threshold_by_bisection, interpreted_kernel]  # on a CPU, a TPU, a GPU


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_golden(golden, threshold):
    arrays = golden("sampling")
    logits = jnp.asarray(arrays.pop("logits"))
    assert len(arrays) == 5
    for name, want in arrays.items():
        top_k, top_p = name.removeprefix("k").split("_p")
        k, p = min(int(top_k), logits.shape[-1]) or logits.shape[-1], float(top_p) or None
        got = jax.nn.softmax(jnp.where(logits < threshold(logits, k, p), -jnp.inf, logits))
        close(got, want)
        np.testing.assert_array_equal(got > 0, want > 0)
        np.testing.assert_array_equal(got, jax.nn.softmax(filter_logits(logits, int(top_k), p)))


@pytest.mark.parametrize("threshold", THRESHOLDS[1:])
@pytest.mark.parametrize("decimals", [1, 8])  # rounded logits have many ties
@pytest.mark.parametrize("top_k", [1, 7, 100, 256])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.96, 1.0])
def test_bisection_keeps_what_sorting_keeps(threshold, decimals, top_k, top_p):
    rng = np.random.default_rng(top_k)
    spreads = 10.0 ** rng.uniform(-2, 2, (200, 1))
    logits = np.round(spreads * rng.standard_normal((200, 256)), decimals).astype(np.float32)
    logits[::7, ::3] = -0.0
    by_sorting, by_bisection = (
        logits >= np.asarray(jax.jit(threshold, static_argnums=(1, 2))(logits, top_k, top_p))
        for threshold in (threshold_by_sorting, threshold)
    )
    differ = np.flatnonzero((by_sorting != by_bisection).any(1))
    if top_p is None:
        assert not differ.size
    for row in differ:  # only where the tail is within rounding of 1 - top_p
        largest = np.sort(logits[row].astype(np.float64))[-top_k:]
        weights = np.exp(largest - largest[-1])
        assert np.abs(np.cumsum(weights) / weights.sum() - (1 - top_p)).min() < 3e-7
    assert differ.size < 20


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_the_kernel_reads_rows_of_any_length(top_p):
    logits = jax.random.normal(jax.random.key(0), (2, 3, 200))
    kept = [logits >= threshold(logits, 150, top_p) for threshold in THRESHOLDS]
    np.testing.assert_array_equal(kept[2], kept[0])
    assert 0 < kept[2].sum(-1).min() <= kept[2].sum(-1).max() <= 150


def test_each_device_runs_the_kernel_on_its_own_images():
    logits = jax.random.normal(jax.random.key(1), (8, 3, 64))
    with jax.set_mesh(make_mesh()):
        thresholds = jax.jit(lambda logits, top_p: interpreted_kernel(logits, 50, top_p))(logits, 0.9)
    assert thresholds.sharding.shard_shape(thresholds.shape) == (1, 3, 1)
    kept = [logits >= np.asarray(x) for x in (thresholds, threshold_by_sorting(logits, 50, 0.9))]
    np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_bounds(threshold):
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    kept = lambda logits, k, p: (logits >= threshold(logits, k or 4, p or None)).tolist()
    assert kept(logits, 1, 0.0) == kept(logits, 0, 0.01) == [True, False, False, False]  # never the largest
    assert kept(logits, 2, 0.0) == [True, True, False, False]
    assert kept(logits, 0, 0.9) == [True, True, True, False]
    assert kept(logits, 0, 1.0) == [True] * 4
    tied = jnp.log(jnp.array([0.4, 0.25, 0.25, 0.1]))  # kept or dropped together
    for k, p in ((2, 0.0), (0, 0.6), (2, 0.7)):
        assert kept(tied, k, p) == [True, True, True, False]


def test_without_top_k_and_top_p_nothing_is_filtered():
    logits = jnp.arange(4.0)
    for top_k in (0, 4, 99):
        np.testing.assert_array_equal(filter_logits(logits, top_k, None), logits)
    filtered = jax.jit(filter_logits, static_argnums=1)(logits, 3, 0.9)
    assert np.isinf(filtered).tolist() == [True, True, False, False]
