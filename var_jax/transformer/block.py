"""Transformer blocks with adaLN, and the cache of keys and values that generation keeps."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from var_jax.dtypes import product_precision
from var_jax.sharding import constrain, tensor_shards
from var_jax.transformer.attention import attend, normalize_qk
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.positions import rotate


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


def normal(width: int, factor: float = 1.0):
    """Normal with the published standard deviation sqrt(1 / (3 D)), times a factor."""
    return nn.initializers.normal(factor * math.sqrt(1 / (3 * width)))


def adaln_init(width: int, gamma_init: float):
    """Initial [D, 6 D] of an adaLN projection: gates gamma small, shifts and scales halved."""
    factors = np.repeat([gamma_init, gamma_init, 0.5, 0.5, 0.5, 0.5], width)
    return lambda key, shape, dtype=jnp.float32: normal(width)(key, shape, dtype) * factors.astype(dtype)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm over channels without parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """adaLN: LN(x) (1 + scale) + shift; x [B, n, D], scale and shift [B, D]; float32."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def dense(
    features: int, axes: tuple[str | None, str], init, dtype, name: str | None, use_bias=True, product=None
) -> nn.Dense:
    """A linear layer whose parameters carry logical axis names; `product` in place of `dot_general`.

    Its product is of `product_precision` of the dtype.
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=product_precision(dtype),
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dot_general=product,
        name=name,
    )


@flax.struct.dataclass
class AttentionContext:
    """Positional terms of attention, the same in all blocks.

    Attributes:
      cache_index: int32 scalar, first position of x in the cache, where it is known only at run time.
      masks: bool [M, n, keys], True where a query sees a key; block i has number i modulo M.  None for the
        mask of the architecture, or, with a cache, for no mask.
      bias: float32 [N, n, keys], added to the scores.
      rope_angles: float32 [n, H / 2] each, that queries and keys are rotated by.
    """

    cache_index: jax.Array | None = None
    masks: jax.Array | None = None
    bias: jax.Array | None = None
    rope_angles: tuple[jax.Array, jax.Array] | None = None


class Modulation(nn.Module):
    """One block's six adaLN vectors from the condition: scanned over blocks, the condition carried."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, condition: jax.Array, _) -> tuple[jax.Array, jax.Array]:
        """SiLU(class embedding) [B, D] -> itself, float32 [B, 6, D]."""
        cfg = self.config
        init = adaln_init(cfg.width, cfg.gamma_init)
        six = dense(6 * cfg.width, ("embed", "mlp"), init, self.dtype, "adaln")(condition)
        return condition, constrain(six.reshape(-1, 6, cfg.width)).astype(jnp.float32)


class SelfAttention(nn.Module):
    """Multi-head self-attention: over all positions under the mask of the architecture, or, with a cache, of
    new positions to all cached ones and themselves.

    Takes x [B, n, D], the number of the layer, the cache and the view; returns [B, n, D] and the cache.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    attention: str
    start: int

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, cache: KVCache | None, context: AttentionContext):
        cfg, (b, n, d) = self.config, x.shape
        q, k, v = self._qkv(x)
        scale = 0.25 / math.sqrt(cfg.head_dim)
        if cfg.normalized_attention:
            init = nn.with_logical_partitioning(nn.initializers.constant(math.log(4)), (None,))
            q, k = normalize_qk(q, k, self.param("log_temperature", init, (cfg.num_heads,)))
            scale = 1.0
        if context.rope_angles is not None:
            q, k = rotate(q, context.rope_angles[0]), rotate(k, context.rope_angles[1])
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        mask = cfg.masks[0]  # not an argument: rematerialisation would trace it
        if cache is not None:
            cache, k, v = cache.extend(
                layer, self.start if context.cache_index is None else context.cache_index, k, v
            )
            mask = None
        if context.masks is not None:
            mask = context.masks[layer % len(context.masks)]
        q, k, v = (constrain(x, tensor=2) for x in (q, k, v))
        y = attend(q, k, v, scale, mask, self.attention, context.bias).reshape(b, n, d)
        out_init = normal(d, 1 / math.sqrt(2 * cfg.depth))
        return dense(d, ("heads", "embed"), out_init, self.dtype, "proj")(y), cache

    def _qkv(self, x: jax.Array) -> list[jax.Array]:
        """x [B, n, D] -> queries, keys and values, each [B, n, N, H], heads split over the axis `tensor`."""
        cfg, (b, n, d) = self.config, x.shape
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
        q_bias, v_bias = self.param("q_bias", init, (d,)), self.param("v_bias", init, (d,))
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        # Each device's queries, keys and values side by side, so that no activation moves for its heads.
        shards = tensor_shards() if cfg.num_heads % tensor_shards() == 0 else 1
        beside = lambda w: jnp.moveaxis(w.reshape(-1, 3, shards, d // shards), 1, 2).reshape(-1, 3 * d)  # noqa: E731
        product = lambda x, kernel, *args, **kwargs: jax.lax.dot_general(x, beside(kernel), *args, **kwargs)  # noqa: E731
        layer = dense(
            3 * d, ("embed", "heads"), normal(d), self.dtype, "qkv", use_bias=False, product=product
        )
        qkv = constrain(layer(x) + beside(bias)[0], tensor=2)
        qkv = checkpoint_name(qkv, "qkv").reshape(b, n, shards, 3, -1, cfg.head_dim)
        return [qkv[:, :, :, i].reshape(b, n, cfg.num_heads, cfg.head_dim) for i in range(3)]


class MLP(nn.Module):
    """Linear to 4 D, tanh-GELU, linear back."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = self.config.width
        h = dense(4 * d, ("embed", "mlp"), normal(d), self.dtype, "fc1")(x)
        h = nn.gelu(checkpoint_name(constrain(h, tensor=2), "fc1"), approximate=True)
        out_init = normal(d, 1 / math.sqrt(2 * self.config.depth))
        return dense(d, ("mlp", "embed"), out_init, self.dtype, "fc2")(h)


class Block(nn.Module):
    """x += gamma1 * Attn(adaLN(x)); x += gamma2 * MLP(adaLN(x)).

    Scanned over layers: the residual stream x (float32 [B, n, D]; under autocast the published code has it in
    16 bits) and the cache are carried; the layer's number, adaLN vectors and drop rate are scanned over; all
    layers have the same view.

    Attributes:
      attention: the implementation (see `attend`).
      start: first position of x in the sequence, where the view does not say; only with a cache.
      train: whether to drop.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    attention: str = "auto"
    start: int = 0
    train: bool = False

    @nn.compact
    def __call__(self, carry: tuple, scanned: tuple, context: AttentionContext = AttentionContext()):  # noqa: B008  (immutable)
        (x, cache), (layer, six, drop_rate) = carry, scanned
        gamma1, gamma2, scale1, scale2, shift1, shift2 = jnp.moveaxis(six, 1, 0)
        h = modulate(x, scale1, shift1).astype(self.dtype)
        attention = SelfAttention(self.config, self.dtype, self.attention, self.start, name="attention")
        h, cache = attention(h, layer, cache, context)
        x = x + gamma1[:, None] * self._drop(h, drop_rate)
        h = MLP(self.config, self.dtype, name="mlp")(modulate(x, scale2, shift2).astype(self.dtype))
        return (constrain(x + gamma2[:, None] * self._drop(h, drop_rate)), cache), None

    def _drop(self, y: jax.Array, drop_rate: jax.Array) -> jax.Array:
        """Dropout, then stochastic depth: the whole branch of an image, with `drop_rate`."""
        y = nn.Dropout(self.config.dropout)(y.astype(jnp.float32), deterministic=not self.train)
        if self.train and self.config.drop_path:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_rate, (y.shape[0], 1, 1))
            y = y * keep / (1 - drop_rate)
        return y
