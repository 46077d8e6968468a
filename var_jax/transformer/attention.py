"""Attention of the transformer, and the cache of keys and values for generation."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

MAX_LOG_TEMPERATURE = math.log(100)


@flax.struct.dataclass
class KVCache:
    """Keys and values of all positions so far, each [layers, B, L, N, H]."""

    k: jax.Array
    v: jax.Array

    @classmethod
    def zeros(cls, layers: int, batch: int, length: int, heads: int, head_dim: int, dtype) -> "KVCache":
        shape = (layers, batch, length, heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def conditional(self) -> "KVCache":
        """Of every other sequence, from the first on: what is left when guidance ends."""
        return KVCache(self.k[:, ::2], self.v[:, ::2])

    def extend(self, layer: jax.Array, start: int, k: jax.Array, v: jax.Array):
        """Writes k, v [B, n, N, H] of one layer at positions start .. start + n.

        Returns:
          The new cache, and the keys and values [B, start + n, N, H] of this layer up to there.
        """
        where = (layer, 0, start, 0, 0)
        cache = KVCache(
            jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), where),
            jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), where),
        )
        size = (1, k.shape[0], start + k.shape[1], *k.shape[2:])
        prefix = lambda x: jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0]  # noqa: E731
        return cache, prefix(cache.k), prefix(cache.v)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: np.ndarray | None) -> jax.Array:
    """Softmax attention, softmax in float32.

    Args:
      q: [B, Lq, N, H].
      k, v: [B, Lk, N, H].
      scale: factor on the dot products.
      mask: bool [Lq, Lk], True where a query sees a key; None where all see all.

    Returns:
      [B, Lq, N, H].
    """
    # Heads before positions in memory: XLA's CPU matrix products are then two to three times as fast.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = jnp.einsum("bnqh,bnkh->bnqk", q, k, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkh->bnqh", shares, v).swapaxes(1, 2)


def normalize_qk(q: jax.Array, k: jax.Array, log_temperature: jax.Array):
    """Unit-length queries and keys; queries times exp(min(log_temperature [N], ln 100))."""
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-24))  # noqa: E731
    temperature = jnp.exp(jnp.minimum(log_temperature, MAX_LOG_TEMPERATURE))
    return unit(q.astype(jnp.float32)) * temperature[:, None], unit(k.astype(jnp.float32))
