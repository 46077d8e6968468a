"""Top-k and top-p filtering of logits, on accelerators without sorting them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt32

from var_jax.sharding import shard_map_batch

BITS_PER_PASS = 3  # of a threshold, found by one pass over the logits that tests 2^3 - 1 candidates
MAX_KERNEL_CODES = 2**14  # a row of logits is held in the registers of a GPU's block of threads


def filter_logits(
    logits: Float[Array, "*B V"], top_k: int, top_p: Float[ArrayLike, ""] | None
) -> Float[Array, "*B V"]:
    """Set the logits of unlikely codes to -inf: all but the top_k largest, then the tail beyond top_p.

    From the smallest logit up, codes are dropped while their cumulative probability, after top-k, is at most
    1 - top_p; the largest is never dropped.  Codes with equal logits are kept or dropped together.

    Args:
      logits: float32.
      top_k: static; 0, or V and more, keeps all codes.
      top_p: in (0, 1]; None keeps all codes.
    """
    k = min(top_k, logits.shape[-1]) or logits.shape[-1]
    if k == logits.shape[-1] and top_p is None:
        return logits
    # Sorting is slow on accelerators, and testing many thresholds is on a CPU.
    threshold = jax.lax.platform_dependent(
        jax.lax.optimization_barrier(logits),  # else XLA repeats what comes before in every pass
        cpu=partial(threshold_by_sorting, k=k, top_p=top_p),
        cuda=partial(threshold_by_kernel, k=k, top_p=top_p),
        default=partial(threshold_by_bisection, k=k, top_p=top_p),
    )
    return jnp.where(logits < threshold, -jnp.inf, logits)


def threshold_by_sorting(
    logits: Float[Array, "*B V"], k: int, top_p: Float[ArrayLike, ""] | None
) -> Float[Array, "*B 1"]:
    """Find a threshold between the smallest logit to keep and the next one, in descending order.

    XLA may compute the logits again for the comparison, and round them differently, so the threshold is
    between two logits rather than one of them, unless the k-th is equal to the next.
    """
    num_codes = logits.shape[-1]
    largest, _ = jax.lax.top_k(logits, min(k + 1, num_codes))
    keep = jnp.arange(largest.shape[-1]) < k
    if top_p is not None:
        tail = jnp.cumsum(jax.nn.softmax(largest[..., :k], axis=-1)[..., ::-1], axis=-1)[..., ::-1]
        keep &= jnp.pad(tail > 1 - top_p, [(0, 0)] * (tail.ndim - 1) + [(0, largest.shape[-1] - k)])
    smallest = jnp.min(jnp.where(keep, largest, jnp.inf).at[..., 0].set(largest[..., 0]), -1, keepdims=True)
    below = jnp.max(jnp.where(largest < smallest, largest, -jnp.inf), -1, keepdims=True)
    unknown = smallest if k < num_codes else -jnp.inf
    return jnp.where(below > -jnp.inf, (smallest + below) / 2, unknown)


def threshold_by_kernel(
    logits: Float[Array, "*B V"], k: int, top_p: Float[ArrayLike, ""] | None, interpret: bool = False
) -> Float[Array, "*B 1"]:
    """Find such a threshold by bisection in a Pallas kernel (Triton), which reads the logits once."""
    if logits.shape[-1] > MAX_KERNEL_CODES:
        return threshold_by_bisection(logits, k, top_p)
    # Imported here: on other platforms nothing else needs Pallas.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_codes = logits.shape[-1]
    size = 2 ** math.ceil(math.log2(num_codes))

    def kernel(logits_ref, *refs):
        row = triton.load(logits_ref.at[pl.ds(0, size)], mask=jnp.arange(size) < num_codes, other=-jnp.inf)
        *p, threshold_ref = refs
        threshold_ref[...] = threshold_by_bisection(row, k, p[0][0] if p else None, in_kernel=True)

    def run(logits, *p):
        rows = [x.reshape(-1, x.shape[-1]) for x in (logits, *p)]
        one_row = lambda size: pl.BlockSpec((None, size), lambda i: (i, 0))
        thresholds = pl.pallas_call(
            kernel,
            grid=(len(rows[0]),),
            in_specs=[one_row(x.shape[1]) for x in rows],
            out_specs=one_row(1),
            out_shape=jax.ShapeDtypeStruct((len(rows[0]), 1), jnp.float32),
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
            interpret=interpret,
            name="threshold",
        )(*rows)
        return thresholds.reshape(*logits.shape[:-1], 1)

    # One top_p a row: a number for all could not be sharded as the logits are.
    p = () if top_p is None else (jnp.full((*logits.shape[:-1], 1), top_p, jnp.float32),)
    return shard_map_batch(run, logits, *p)


def threshold_by_bisection(
    logits: Float[Array, "*B V"], k: int, top_p: Float[ArrayLike, ""] | None, in_kernel: bool = False
) -> Float[Array, "*B 1"]:
    """Find such a threshold bit by bit, by sums over all logits below candidates for it.

    Probabilities are summed in another order than by `threshold_by_sorting`, so another code may be the last
    to keep where the tail is within rounding of 1 - top_p.

    Args:
      logits: float32.
      k: number of codes that top-k keeps.
      top_p: see `filter_logits`.
      in_kernel: the logits are in registers, so that each bit is found by a sum of its own.
    """
    search = _search_by_bits if in_kernel else _search_by_passes
    bits = _ordered_bits(logits)
    # The k-th largest is the largest x with at most V - k logits below it.
    smallest = search(bits, jnp.ones_like(bits, jnp.int32), logits.shape[-1] - k)
    if top_p is not None:
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        # Of the logits equal to the k-th, only as many count as make up k.
        num_above, num_equal = (
            jnp.sum(mask.astype(jnp.int32), -1, keepdims=True) for mask in (bits > smallest, bits == smallest)
        )
        weights = jnp.where(bits == smallest, weights * (k - num_above) / num_equal, weights)
        weights = jnp.where(bits < smallest, 0.0, weights)
        if not in_kernel:  # else XLA computes them again for each pass, and may round them differently
            weights = jax.lax.optimization_barrier(weights)
        # Weights are in the order of the logits, and the bits of positive numbers in that of the numbers.
        bits = jax.lax.bitcast_convert_type(weights, jnp.uint32)
        limit = (1 - top_p) * weights.sum(-1, keepdims=True)
        smallest = search(bits, weights, limit)
        smallest = jnp.minimum(smallest, bits.max(-1, keepdims=True))
    kept = jnp.min(jnp.where(bits >= smallest, logits, jnp.inf), -1, keepdims=True)
    dropped = jnp.max(jnp.where(bits < smallest, logits, -jnp.inf), -1, keepdims=True)
    return (kept + dropped) / 2


def _search_by_passes(bits: UInt32[Array, "*B V"], weights: Array, limit: ArrayLike) -> UInt32[Array, "*B 1"]:
    """Find the largest x for which the sum of the weights of all entries below x is at most `limit`.

    Each pass over the entries finds `BITS_PER_PASS` bits.
    """
    x = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    for shift in reversed(range(0, 32, BITS_PER_PASS)):
        candidates = [
            x + np.uint32(step << shift) for step in range(1, min(2**BITS_PER_PASS, 2 ** (32 - shift)))
        ]
        sums = [jnp.sum(jnp.where(bits < c, weights, 0), axis=-1, keepdims=True) for c in candidates]
        holds = sum((below <= limit).astype(jnp.uint32) for below in sums)  # sums only grow with candidates
        x = x + (holds << shift)
    return x


def _search_by_bits(bits: UInt32[Array, "*B V"], weights: Array, limit: ArrayLike) -> UInt32[Array, "*B 1"]:
    """Find the same x one bit after the other, of entries that are in registers."""

    def add_bit(i, x):
        candidate = x | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        below = jnp.sum(jnp.where(bits < candidate, weights, 0), axis=-1, keepdims=True)
        return jnp.where(below <= limit, candidate, x)

    return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((*bits.shape[:-1], 1), jnp.uint32))


def _ordered_bits(x: Float[Array, "*B V"]) -> UInt32[Array, "*B V"]:
    """Map float32 to uint32 such that the order of numbers is kept."""
    x = jnp.where(x == 0, 0.0, x.astype(jnp.float32))  # -0.0 is 0.0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
