from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.arrays import close
from var_jax.transformer.elementwise import add_gated, gelu, modulate, normalize_heads


def plain_modulate(x, scale, shift):
    x = x.astype(jnp.float32)
    normed = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


def plain_normalize_heads(x, length):
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * length[:, None]


def plain_gelu(x):
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def plain_add_gated(branch, x, gate):
    return x + gate[:, None] * branch.astype(jnp.float32)


FUNCTIONS = {
    "add_gated": (
        lambda branch, x, gate: add_gated(x, gate, branch),
        plain_add_gated,
        [(3, 10, 16), (3, 10, 16), (3, 16)],
    ),
    "modulate": (partial(modulate, dtype=jnp.float32), plain_modulate, [(3, 10, 16), (3, 16), (3, 16)]),
    "gelu": (gelu, plain_gelu, [(3, 10, 16)]),
    "normalize_heads": (normalize_heads, plain_normalize_heads, [(3, 10, 4, 8), (4,)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradients_are_those_of_the_plain_form(name):
    function, plain, shapes = FUNCTIONS[name]
    inputs = [2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    weights = jax.random.normal(jax.random.key(9), shapes[0])

    def value_and_gradients(function, *inputs):
        loss = lambda *inputs: jnp.sum(function(*inputs).astype(jnp.float32) * weights)
        return function(*inputs), jax.jit(jax.grad(loss, range(len(inputs))))(*inputs)

    (value, gradients), (want, want_gradients) = (value_and_gradients(f, *inputs) for f in (function, plain))
    close(value, want, 1e-6)
    for got, expected in zip(gradients, want_gradients, strict=True):
        close(got, expected, 1e-6)
    if name == "modulate":  # its input is the residual stream, float32
        return
    # In 16 bits only the input and the gradients are rounded.
    half = [inputs[0].astype(jnp.bfloat16), *inputs[1:]]
    exact = [half[0].astype(jnp.float32), *inputs[1:]]
    (_, gradients), (_, want_gradients) = (
        value_and_gradients(function, *half),
        value_and_gradients(plain, *exact),
    )
    assert gradients[0].dtype == jnp.bfloat16
    for got, expected in zip(gradients, want_gradients, strict=True):
        close(np.asarray(got, np.float32), expected, 2**-8)


@pytest.mark.parametrize("name", ["add_gated", "gelu", "normalize_heads"])
def test_the_backward_pass_keeps_no_float32_of_the_size_of_its_input(name):
    function, _, shapes = FUNCTIONS[name]
    inputs = [jnp.zeros(shapes[0], jnp.bfloat16), *map(jnp.zeros, shapes[1:])]
    saved = jax.tree.leaves(jax.eval_shape(lambda *inputs: jax.vjp(function, *inputs)[1], *inputs))
    large = [leaf for leaf in saved if leaf.shape == shapes[0]]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_a_head_of_zeros_has_a_finite_gradient():
    gradient = jax.grad(lambda x: normalize_heads(x, jnp.ones(2)).sum())(jnp.zeros((1, 1, 2, 4)))
    assert np.isfinite(gradient).all()
