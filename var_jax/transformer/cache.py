"""The cache of keys and values for generation."""

import flax.struct
import jax
import jax.numpy as jnp


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

    def extend(self, layer: jax.Array, start: int | jax.Array, k: jax.Array, v: jax.Array):
        """Writes k, v [B, n, N, H] of one layer at positions start .. start + n.

        Returns:
          The new cache, and the keys and values [B, start + n, N, H] of this layer up to there; all
          [B, L, N, H] where the start is known only when the program runs.
        """
        where = (layer, 0, start, 0, 0)
        cache = KVCache(
            jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), where),
            jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), where),
        )
        stop = start + k.shape[1] if isinstance(start, int) else self.k.shape[2]
        size = (1, k.shape[0], stop, *k.shape[2:])
        prefix = lambda x: jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0]  # noqa: E731
        return cache, prefix(cache.k), prefix(cache.v)
