"""Elementwise parts of a block with backward passes of their own, which save and read less than XLA's.

XLA saves what the forward pass has at hand: normalized activations in float32, several terms of GELU.  Here
the inputs are saved alone, in the dtype that they have anyway, and the rest is computed again.  The barriers
keep XLA from finding the results of the forward pass again, and saving them after all.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from var_jax.dtypes import product_precision

recompute_from = jax.lax.optimization_barrier


def sum_positions(x: Float[Array, "B n D"]) -> Float32[Array, "B D"]:
    """Sum over the positions, as a matrix product with eight rows of ones.

    For a plain sum, XLA transposes large arrays on a GPU, so that the batch is their last axis.
    """
    ones = jnp.ones((x.shape[0], 8, x.shape[1]), x.dtype)
    precision = product_precision(x.dtype)
    product = jnp.einsum("brn,bnd->brd", ones, x, precision=precision, preferred_element_type=jnp.float32)
    return product[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def modulate(
    x: Float32[Array, "B n D"], scale: Float32[Array, "B D"], shift: Float32[Array, "B D"], dtype: DTypeLike
) -> Float[Array, "B n D"]:
    """Apply adaptive layer normalization (adaLN) in float32: LN(x) (1 + scale) + shift, cast to `dtype`."""
    return _modulate_forward(x, scale, shift, dtype)[0]


def _modulate_forward(x, scale, shift, dtype):
    mean = x.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    y = (x - mean) * inverse_std * (1 + scale[:, None]) + shift[:, None]
    return y.astype(dtype), (x, mean, inverse_std, scale)


def _modulate_backward(dtype, saved, gradient):
    x, mean, inverse_std, scale = recompute_from(saved)
    normed = (x - mean) * inverse_std
    scale_gradient = sum_positions((gradient * normed).astype(dtype))
    shift_gradient = sum_positions(gradient)
    gradient = gradient.astype(jnp.float32) * (1 + scale[:, None])
    along = (gradient * normed).mean(-1, keepdims=True)
    return (
        inverse_std * (gradient - gradient.mean(-1, keepdims=True) - normed * along),
        scale_gradient,
        shift_gradient,
    )


modulate.defvjp(_modulate_forward, _modulate_backward)


def layer_norm(x: Float32[Array, "B n D"], dtype: DTypeLike) -> Float[Array, "B n D"]:
    """Apply layer normalization without scale and shift in float32, cast to `dtype`."""
    zeros = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
    return modulate(x, zeros, zeros, dtype)


@jax.custom_vjp
def add_gated(
    x: Float32[Array, "B n D"], gate: Float32[Array, "B D"], branch: Float[Array, "B n D"]
) -> Float32[Array, "B n D"]:
    """Add a branch to the residual stream: x + gate * branch."""
    return x + gate[:, None] * branch


def _add_gated_forward(x, gate, branch):
    return add_gated(x, gate, branch), (gate, branch)


def _add_gated_backward(saved, gradient):
    gate, branch = saved
    branch_gradient = (gradient * gate[:, None]).astype(branch.dtype)
    return gradient, sum_positions((gradient * branch).astype(branch.dtype)), branch_gradient


add_gated.defvjp(_add_gated_forward, _add_gated_backward)


GELU_FACTOR, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
    """Apply GELU in its tanh approximation, in float32; the result has the dtype of x.

    In 16 bits on a GPU it is written as XLA recognizes it behind a Dense layer, and cuBLAS applies it to
    the float32 sums.
    """
    if x.dtype.itemsize > 2:
        return _gelu(x)
    return jax.lax.platform_dependent(x, cuda=partial(jax.nn.gelu, approximate=True), default=_gelu)


def _gelu(x):
    h = x.astype(jnp.float32)
    return (0.5 * h * (1 + _gelu_tanh(h))).astype(x.dtype)


def _gelu_tanh(h):
    return jnp.tanh(GELU_FACTOR * h * (1 + GELU_CUBE * h * h))


def _gelu_backward(x, gradient):
    h = recompute_from(x).astype(jnp.float32)
    t = _gelu_tanh(h)
    slope = 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * GELU_FACTOR * (1 + 3 * GELU_CUBE * h * h)
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def normalize_heads(x: Float[Array, "B n N H"], length: Float32[Array, " N"]) -> Float32[Array, "B n N H"]:
    """Scale the vector of each head to a length, in float32."""
    return _normalize_heads_forward(x, length)[0]


def _normalize_heads_forward(x, length):
    h = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(h**2, -1, keepdims=True), 1e-24))
    return h * (inverse * length[:, None]), (x, inverse, length)


def _normalize_heads_backward(saved, gradient):
    x, inverse, length = saved
    unit, gradient = x.astype(jnp.float32) * inverse, gradient.astype(jnp.float32)
    along = jnp.sum(gradient * unit, -1, keepdims=True)
    x_gradient = length[:, None] * inverse * (gradient - along * unit)
    return x_gradient.astype(x.dtype), along[..., 0].sum((0, 1))


normalize_heads.defvjp(_normalize_heads_forward, _normalize_heads_backward)
