"""Attention of queries that see a prefix of the keys each, in Pallas kernels for NVIDIA GPUs (Triton).

As FlashAttention-2 (Dao 2023), with the causal mask replaced by the number of keys that each query sees: one
call covers all maps of next-scale prediction, skips the blocks of keys that no query of a block sees, and
masks only the blocks that some see and others do not.
"""

import dataclasses
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

HIDDEN = -1e30  # score of a key that a query does not see
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Shape of a kernel's step.

    Attributes:
      queries: positions of queries in a block, a power of two of at least 16.
      keys: positions of keys in a block, likewise.
      warps: of 32 threads each, for a block.
      stages: steps of the loop whose loads are in flight.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# The fastest of 10, 11 and 18 that were tried on an H200 (64 images, 680 positions, 16 heads of 64).
FORWARD = Tile(queries=64, keys=64, warps=4, stages=3)
QUERY_GRADIENT = Tile(queries=64, keys=64, warps=4, stages=2)
KEY_GRADIENT = Tile(queries=32, keys=64, warps=4, stages=3)


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
    rows = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    like = jax.ShapeDtypeStruct(q.shape, q.dtype)
    run = partial(_call, ends=np.asarray(ends, np.int32), scale=scale, interpret=interpret)

    @jax.custom_vjp
    def attention(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        out, log_sums = run(_forward_kernel, FORWARD, (like, rows), q, k, v)
        out, log_sums = (checkpoint_name(x, name) for x in (out, log_sums))
        return out, (q, k, v, out, log_sums)

    def backward(saved, gradient):
        q, k, v, out, log_sums = saved
        products = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
        inputs = (q, k, v, gradient, log_sums, products)
        (dq,) = run(_query_gradient_kernel, QUERY_GRADIENT, (like,), *inputs)
        return (dq, *run(_key_gradient_kernel, KEY_GRADIENT, (like, like), *inputs))

    attention.defvjp(forward, backward)
    return attention(q, k, v)


def _call(
    kernel: Callable,
    tile: Tile,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *arrays: jax.Array,
    ends: np.ndarray,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel for each block of queries, or of keys, of each head of each image."""
    length = len(ends)
    padded = np.pad(ends, (0, -length % tile.queries), mode="edge")
    fewest, most = padded[:: tile.queries], padded[tile.queries - 1 :: tile.queries]  # keys that a block sees
    if kernel is _key_gradient_kernel:
        # For a block of keys: the first block of queries that sees some of it, and the first that sees all.
        start = np.arange(0, length, tile.keys)
        stop = np.minimum(start + tile.keys, length)
        bounds = [np.searchsorted(most, start, side="right"), np.searchsorted(fewest, stop)]
    else:
        # For a block of queries: how many blocks of keys all its queries see, and how many some see.
        bounds = [fewest // tile.keys, -(-most // tile.keys)]
    tables = [jnp.asarray(table, jnp.int32) for table in (padded, *bounds)]
    by_head = pl.BlockSpec(
        (None, length, None, arrays[0].shape[3]), lambda block, head, image: (image, 0, head, 0)
    )
    by_row = pl.BlockSpec((None, None, length), lambda block, head, image: (image, head, 0))
    table = lambda x: pl.BlockSpec(x.shape, lambda block, head, image: (0,))
    spec = lambda x: by_head if x.ndim == 4 else by_row
    return pl.pallas_call(
        partial(kernel, length=length, scale=scale, tile=tile, exp2=jnp.exp2 if interpret else _fast_exp2),
        grid=(len(bounds[0]), arrays[0].shape[2], arrays[0].shape[0]),
        in_specs=[*map(table, tables), *map(spec, arrays)],
        out_specs=[spec(x) for x in outputs],
        out_shape=outputs,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"prefix_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*tables, *arrays)


def _load(ref, block, size: int, length: int | None = None) -> jax.Array:
    """Load block `block` of `size` rows [size, H], or numbers [size]; zero beyond `length`, if given."""
    rows = ref.at[pl.ds(block * size, size)]
    if length is None:
        return triton.load(rows)
    inside = _positions(block, size) < length
    return triton.load(rows, mask=inside if len(ref.shape) == 1 else inside[:, None], other=0)


def _store(ref, block, value: jax.Array, length: int) -> None:
    """Store a block; nothing beyond the length."""
    inside = _positions(block, len(value)) < length
    rows = ref.at[pl.ds(block * len(value), len(value))]
    triton.store(rows, value.astype(ref.dtype), mask=inside if value.ndim == 1 else inside[:, None])


def _positions(block, size: int) -> jax.Array:
    return block * size + jnp.arange(size)


def _dot(a: jax.Array, b: jax.Array) -> Float32[Array, "n m"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _scores(a: jax.Array, b: jax.Array, scale: float, seen: jax.Array | None) -> Float32[Array, "n m"]:
    """Compute scores in units of ln 2; HIDDEN where `seen` is False.  None: all are seen."""
    scores = _dot(a, b.T) * (scale * LOG2_E)
    return scores if seen is None else jnp.where(seen, scores, HIDDEN)


def _fast_exp2(x: jax.Array) -> jax.Array:
    """Compute 2^x by the one instruction that GPUs have for it; `jnp.exp2` also handles denormal results."""
    shape = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    (result,) = triton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=shape
    )
    return result


def _forward_kernel(
    ends_ref, full_ref, stop_ref, q_ref, k_ref, v_ref, out_ref, log_sum_ref, *, length, scale, tile, exp2
):
    """Compute output and log-sum-exp (in units of ln 2) of a block of queries."""
    block = pl.program_id(0)
    q, ends = _load(q_ref, block, tile.queries, length), _load(ends_ref, block, tile.queries)

    def add_keys(i, carry, masked: bool):
        out, total, largest = carry
        k, v = (_load(ref, i, tile.keys, length if masked else None) for ref in (k_ref, v_ref))
        seen = _positions(i, tile.keys)[None, :] < ends[:, None] if masked else None
        scores = _scores(q, k, scale, seen)
        new = jnp.maximum(largest, scores.max(1))
        shrink, weights = exp2(largest - new), exp2(scores - new[:, None])
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, total * shrink + weights.sum(1), new

    rows = (tile.queries,)
    start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.full(rows, HIDDEN))
    seen_by_all = jax.lax.fori_loop(0, full_ref[block], partial(add_keys, masked=False), start)
    loop = (full_ref[block], stop_ref[block], partial(add_keys, masked=True))
    out, total, largest = jax.lax.fori_loop(*loop, seen_by_all)
    _store(out_ref, block, out / total[:, None], length)
    _store(log_sum_ref, block, largest + jnp.log2(total), length)


def _query_gradient_kernel(
    ends_ref,
    full_ref,
    stop_ref,
    q_ref,
    k_ref,
    v_ref,
    gradient_ref,
    log_sum_ref,
    product_ref,
    dq_ref,
    *,
    length,
    scale,
    tile,
    exp2,
):
    """Compute the gradients of a block of queries."""
    block = pl.program_id(0)
    refs = (q_ref, gradient_ref, log_sum_ref, product_ref)
    q, gradient, log_sums, products = (_load(ref, block, tile.queries, length) for ref in refs)
    ends = _load(ends_ref, block, tile.queries)

    def add_keys(i, dq, masked: bool):
        k, v = (_load(ref, i, tile.keys, length if masked else None) for ref in (k_ref, v_ref))
        seen = _positions(i, tile.keys)[None, :] < ends[:, None] if masked else None
        weights = exp2(_scores(q, k, scale, seen) - log_sums[:, None])
        return dq + _dot((weights * (_dot(gradient, v.T) - products[:, None])).astype(k.dtype), k)

    dq = jnp.zeros(q.shape, jnp.float32)
    dq = jax.lax.fori_loop(0, full_ref[block], partial(add_keys, masked=False), dq)
    dq = jax.lax.fori_loop(full_ref[block], stop_ref[block], partial(add_keys, masked=True), dq)
    _store(dq_ref, block, dq * scale, length)


def _key_gradient_kernel(
    ends_ref,
    first_ref,
    full_ref,
    q_ref,
    k_ref,
    v_ref,
    gradient_ref,
    log_sum_ref,
    product_ref,
    dk_ref,
    dv_ref,
    *,
    length,
    scale,
    tile,
    exp2,
):
    """Compute the gradients of a block of keys and values, from transposed scores [keys, queries]."""
    block = pl.program_id(0)
    k, v = (_load(ref, block, tile.keys, length) for ref in (k_ref, v_ref))

    def add_queries(i, carry, masked: bool):
        dk, dv = carry
        # Beyond the length queries and gradients are zero, so that they add nothing.
        refs = (q_ref, gradient_ref, log_sum_ref, product_ref)
        q, gradient, log_sums, products = (_load(ref, i, tile.queries, length) for ref in refs)
        ends = _load(ends_ref, i, tile.queries)
        seen = _positions(block, tile.keys)[:, None] < ends[None, :] if masked else None
        weights = exp2(_scores(k, q, scale, seen) - log_sums[None, :])
        dv = dv + _dot(weights.astype(gradient.dtype), gradient)
        dk = dk + _dot((weights * (_dot(v, gradient.T) - products[None, :])).astype(q.dtype), q)
        return dk, dv

    carry = (jnp.zeros(k.shape, jnp.float32),) * 2
    full, blocks = full_ref[block], -(-length // tile.queries)
    carry = jax.lax.fori_loop(first_ref[block], full, partial(add_queries, masked=True), carry)
    dk, dv = jax.lax.fori_loop(full, blocks, partial(add_queries, masked=False), carry)
    _store(dk_ref, block, dk * scale, length)
    _store(dv_ref, block, dv, length)
