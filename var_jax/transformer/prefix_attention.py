"""Attention of queries that see a prefix of the keys each, in one Pallas kernel for NVIDIA GPUs (Triton).

As FlashAttention-2 (Dao 2023), with the causal mask replaced by the number of keys that each query sees: it
covers all maps of next-scale prediction in one call, and skips the blocks of keys that no query of a block
sees.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32, Int

BLOCK = 64  # queries, and keys, that a step of the kernel takes
HIDDEN = -1e30  # score of a key that a query does not see
LOG2_E = math.log2(math.e)


def prefix_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L N H"],
    v: Float[Array, "B L N H"],
    scale: float,
    ends: Int[np.ndarray, " L"],
    name: str,
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Compute attention in which query i sees the first ends[i] keys; differentiable.

    Args:
      q: queries; H is a power of two.
      k: keys.
      v: values.
      scale: factor on the dot products.
      ends: number of keys that each query sees, at least 1, increasing.
      name: checkpoint name of the output and of its log-sum-exp.
      interpret: run in the interpreter, slowly, on other platforms.
    """
    run = partial(_call, ends=np.asarray(ends, np.int32), scale=scale, interpret=interpret)

    @jax.custom_vjp
    def attention(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        out, log_sums = run(_forward_kernel, q, k, v)
        out, log_sums = (checkpoint_name(x, name) for x in (out, log_sums))
        return out, (q, k, v, out, log_sums)

    def backward(saved, gradient):
        q, k, v, out, log_sums = saved
        products = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)
        return run(_backward_kernel, q, k, v, gradient, log_sums, products.swapaxes(1, 2))

    attention.defvjp(forward, backward)
    return attention(q, k, v)


def _call(kernel: Callable, *arrays: jax.Array, ends: np.ndarray, scale: float, interpret: bool):
    """Run a kernel for each block of positions of each head of each image."""
    batch, length, heads, head_dim = arrays[0].shape
    blocks = -(-length // BLOCK)
    # The first block of queries that sees a key of each block of keys.
    first = np.searchsorted(ends, np.arange(blocks) * BLOCK, side="right") // BLOCK
    padded_ends = np.pad(ends, (0, blocks * BLOCK - length), mode="edge")
    by_head = pl.BlockSpec((None, length, None, head_dim), lambda block, head, image: (image, 0, head, 0))
    by_row = pl.BlockSpec((None, None, length), lambda block, head, image: (image, head, 0))
    table = lambda x: pl.BlockSpec(x.shape, lambda block, head, image: (0,))
    rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    like = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
    forward = kernel is _forward_kernel
    tables = (jnp.asarray(padded_ends), jnp.asarray(first, jnp.int32))
    return pl.pallas_call(
        partial(kernel, length=length, scale=scale),
        grid=(blocks, heads, batch),
        in_specs=[*map(table, tables), *(by_head if x.ndim == 4 else by_row for x in arrays)],
        out_specs=[by_head, by_row] if forward else [by_head] * 3,
        out_shape=[like, rows] if forward else [like] * 3,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="prefix_attention_" + ("forward" if forward else "backward"),
    )(*tables, *arrays)


def _block(ref, index, length: int) -> jax.Array:
    """Load a block of rows [BLOCK, H], or of numbers [BLOCK]; zero beyond the length."""
    inside = _positions(index) < length
    rows = ref.at[pl.ds(index * BLOCK, BLOCK)]
    return triton.load(rows, mask=inside if len(ref.shape) == 1 else inside[:, None], other=0)


def _store(ref, index, value: jax.Array, length: int) -> None:
    """Store a block; nothing beyond the length."""
    inside = _positions(index) < length
    rows = ref.at[pl.ds(index * BLOCK, BLOCK)]
    triton.store(rows, value.astype(ref.dtype), mask=inside if value.ndim == 1 else inside[:, None])


def _positions(index) -> jax.Array:
    return index * BLOCK + jnp.arange(BLOCK)


def _dot(a: jax.Array, b: jax.Array) -> Float32[Array, "n m"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _scores(q, k, ends, block, scale: float) -> Float32[Array, "n keys"]:
    """Compute scores in units of ln 2, of one block of keys; HIDDEN where a query does not see a key."""
    seen = _positions(block)[None, :] < ends[:, None]
    return jnp.where(seen, _dot(q, k.T) * (scale * LOG2_E), HIDDEN)


def _key_blocks(ends) -> jax.Array:
    """Count the blocks of keys that a block of queries sees."""
    return (jnp.max(ends) + (BLOCK - 1)) // BLOCK


def _forward_kernel(ends_ref, first_ref, q_ref, k_ref, v_ref, out_ref, log_sum_ref, *, length, scale):
    """Compute output and log-sum-exp of a block of queries."""
    block = pl.program_id(0)
    q, ends = _block(q_ref, block, length), ends_ref[pl.ds(block * BLOCK, BLOCK)]

    def add_keys(i, carry):
        out, total, largest = carry
        scores = _scores(q, _block(k_ref, i, length), ends, i, scale)
        new = jnp.maximum(largest, scores.max(1))
        shrink, weights = jnp.exp2(largest - new), jnp.exp2(scores - new[:, None])
        v = _block(v_ref, i, length)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, total * shrink + weights.sum(1), new

    start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(BLOCK, jnp.float32), jnp.full(BLOCK, HIDDEN))
    out, total, largest = jax.lax.fori_loop(0, _key_blocks(ends), add_keys, start)
    _store(out_ref, block, out / total[:, None], length)
    _store(log_sum_ref, block, largest + jnp.log2(total), length)


def _backward_kernel(
    ends_ref,
    first_ref,
    q_ref,
    k_ref,
    v_ref,
    gradient_ref,
    log_sum_ref,
    product_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    *,
    length,
    scale,
):
    """Compute the gradients of a block of keys and values, then that of a block of queries."""
    block = pl.program_id(0)

    def weights_and_gradients(queries, keys, q, k, v, gradient):
        """Return weights [queries, keys], and gradients of the scores in units of 1 / scale."""
        ends = ends_ref[pl.ds(queries * BLOCK, BLOCK)]
        scores = _scores(q, k, ends, keys, scale)
        weights = jnp.exp2(scores - _block(log_sum_ref, queries, length)[:, None])
        weights = jnp.where(_positions(queries)[:, None] < length, weights, 0.0)
        product = _block(product_ref, queries, length)
        return weights, weights * (_dot(gradient, v.T) - product[:, None]) * scale

    k, v = _block(k_ref, block, length), _block(v_ref, block, length)
    zeros = jnp.zeros(k.shape, jnp.float32)

    def add_queries(i, carry):
        dk, dv = carry
        q, gradient = _block(q_ref, i, length), _block(gradient_ref, i, length)
        weights, scores = weights_and_gradients(i, block, q, k, v, gradient)
        return dk + _dot(scores.T.astype(q.dtype), q), dv + _dot(weights.T.astype(q.dtype), gradient)

    blocks = -(-length // BLOCK)
    dk, dv = jax.lax.fori_loop(first_ref[block], blocks, add_queries, (zeros, zeros))
    _store(dk_ref, block, dk, length)
    _store(dv_ref, block, dv, length)

    q, gradient = _block(q_ref, block, length), _block(gradient_ref, block, length)

    def add_keys(i, dq):
        k, v = _block(k_ref, i, length), _block(v_ref, i, length)
        _, scores = weights_and_gradients(block, i, q, k, v, gradient)
        return dq + _dot(scores.astype(k.dtype), k)

    ends = ends_ref[pl.ds(block * BLOCK, BLOCK)]
    _store(dq_ref, block, jax.lax.fori_loop(0, _key_blocks(ends), add_keys, zeros), length)
