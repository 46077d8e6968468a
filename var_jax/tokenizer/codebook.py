"""Keeping a codebook alive: which codes are used, and new places for those that are not.

Statistics are taken over the whole global batch: under `jit` the counts of a sharded batch are
summed over all devices.
"""

import jax
import jax.numpy as jnp

from var_jax.scales import Scales


def count_codes(tokens: jax.Array, scales: Scales, num_codes: int, weights: jax.Array | None = None):
    """How often each code is used at each scale.

    Args:
      tokens: int32 [B, L].
      scales: the schedule.
      num_codes: V.
      weights: [B], 1 for images that count and 0 for padding; all count by default.

    Returns:
      float32 [K, V].
    """
    cells = jnp.asarray(scales.levels) * num_codes + tokens
    weights = jnp.ones(tokens.shape[0]) if weights is None else weights
    weights = jnp.broadcast_to(weights[:, None], tokens.shape).astype(jnp.float32)
    counts = jnp.zeros(len(scales) * num_codes).at[cells.ravel()].add(weights.ravel())
    return counts.reshape(len(scales), num_codes)


def dead_codes(hits: jax.Array, threshold: float) -> jax.Array:
    """bool [V]: codes whose share of all hits [K, V] is below `threshold` times an even share 1/V."""
    share = hits.sum(0) / jnp.maximum(hits.sum(), 1e-9)
    return share * hits.shape[1] < threshold


def restart(codebook: jax.Array, dead: jax.Array, targets: jax.Array, key: jax.Array) -> jax.Array:
    """Moves dead codes onto random targets.

    Targets are what the tokens of this batch were chosen for, pooled over all scales, so that a new
    code lands where some scale needs one (the restart of Dhariwal et al. 2020, Jukebox).

    Args:
      codebook: [V, C].
      dead: bool [V].
      targets: [B, L, C].
      key: random key.

    Returns:
      [V, C].
    """
    pool = targets.reshape(-1, targets.shape[-1])
    fresh = pool[jax.random.randint(key, (codebook.shape[0],), 0, pool.shape[0])]
    return jnp.where(dead[:, None], fresh, codebook)
