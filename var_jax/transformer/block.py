"""Transformer blocks with adaLN and cross-attention, and the cache of keys and values for generation."""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from var_jax.dtypes import product_precision
from var_jax.sharding import constrain, tensor_shards
from var_jax.transformer.attention import GPU_KERNELS, attend, einsum, normalize_qk
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.elementwise import add_gated, gelu, layer_norm, modulate
from var_jax.transformer.positions import rotate

Angles = Float32[Array | np.ndarray, "n angles"]  # rotary angles of n positions, half as many as channels H


@flax.struct.dataclass
class KVCache:
    """Keys and values of all positions: of all layers if they are scanned, else of one.

    Attributes:
      k: keys.
      v: values.
    """

    k: Float[Array, "layers B L N H"]
    v: Float[Array, "layers B L N H"]

    @classmethod
    def zeros(
        cls, layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: DTypeLike
    ) -> "KVCache":
        """Create a cache of zeros."""
        shape = (layers, batch, length, heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def extend(
        self,
        layer: int | Int[Array, ""],
        start: int | Int[Array, ""],
        k: Float[Array, "B n N H"],
        v: Float[Array, "B n N H"],
    ) -> tuple["KVCache", Float[Array, "B keys N H"], Float[Array, "B keys N H"]]:
        """Write keys and values of one layer at the positions start .. start + n.

        Args:
          layer: number of the layer in this cache.
          start: first position.
          k: keys.
          v: values.

        Returns:
          The new cache, and the keys and values of this layer: of all positions; of several layers and with a
          static `start`, of the first start + n only, so that no more is copied out of the stack.
        """
        index = (layer, 0, start, 0, 0)
        cache = KVCache(
            jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), index),
            jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), index),
        )
        several = len(self.k) > 1
        stop = start + k.shape[1] if several and isinstance(start, int) else self.k.shape[2]
        size = (1, k.shape[0], stop, *k.shape[2:])
        prefix = lambda x: jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0]
        return cache, prefix(cache.k), prefix(cache.v)


def normal_init(width: int, factor: float = 1.0) -> Callable:
    """Return a normal initializer with `factor` times the published standard deviation sqrt(1 / (3 D))."""
    return nn.initializers.normal(factor * math.sqrt(1 / (3 * width)))


def adaln_init(width: int, gamma_init: float) -> Callable:
    """Return the initializer of an adaLN kernel [D, 6 D]: gates gamma small, scales and shifts halved."""
    factors = np.repeat([gamma_init, gamma_init, 0.5, 0.5, 0.5, 0.5], width)
    return lambda key, shape, dtype=jnp.float32: normal_init(width)(key, shape, dtype) * factors.astype(dtype)


def dense(
    features: int,
    axes: tuple[str | None, str],
    init: Callable,
    dtype: DTypeLike,
    name: str | None,
    use_bias: bool = True,
    dot_general: Callable | None = None,
) -> nn.Dense:
    """Create a linear layer with logical axis names and the `product_precision` of its dtype.

    Args:
      features: output channels.
      axes: logical axis names of the kernel.
      init: initializer of the kernel.
      dtype: of the product.
      name: of the module; None to name it by the attribute it is assigned to.
      use_bias: whether to add a bias.
      dot_general: replacement of `jax.lax.dot_general`.
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=product_precision(dtype),
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dot_general=dot_general,
        name=name,
    )


@flax.struct.dataclass
class AttentionContext:
    """Positional terms of attention, shared by all blocks.

    Attributes:
      cache_index: first position of x in the cache, if it is traced.
      masks: M masks, True where a query sees a key; block i uses number i modulo M.  None for the mask of the
        architecture, or, with a cache, for no mask.
      bias: added to the scores.
      rope_angles: rotary angles of queries and of keys.
    """

    cache_index: Int[Array, ""] | None = None
    masks: Bool[Array, "M n keys"] | None = None
    bias: Float32[Array, "N n keys"] | None = None
    rope_angles: tuple[Angles, Angles] | None = None


class Modulation(nn.Module):
    """Projection of the condition to the six adaLN vectors of a block, to be scanned over blocks."""

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, condition: Float[Array, "B D"], _
    ) -> tuple[Float[Array, "B D"], Float32[Array, "B 6 D"]]:
        """Compute adaLN vectors from SiLU(condition vector); return it too, as the carry of the scan."""
        cfg = self.config
        init = adaln_init(cfg.width, cfg.gamma_init)
        vectors = dense(6 * cfg.width, ("embed", "mlp"), init, self.dtype, "adaln")(condition)
        return condition, constrain(vectors.reshape(-1, 6, cfg.width)).astype(jnp.float32)


@flax.struct.dataclass
class CrossKeys:
    """Keys and values of the rows of a condition's sequence, for cross-attention: of all layers, or of one.

    Attributes:
      k: keys.
      v: values.
      is_row: False at padding.
    """

    k: Float[Array, "*layers B T N H"]
    v: Float[Array, "*layers B T N H"]
    is_row: Bool[Array, "*layers B T"]


class CrossProjection(nn.Module):
    """Projection of a condition's sequence to the keys and values of a block, to be scanned over blocks."""

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, rows: tuple[Float[Array, "B T D"], Bool[Array, "B T"]], _
    ) -> tuple[tuple[Float[Array, "B T D"], Bool[Array, "B T"]], CrossKeys]:
        """Compute keys and values; return the rows and which are no padding too, as the carry of the scan."""
        cfg = self.config
        sequence, is_row = rows
        project = lambda name: dense(
            cfg.width, ("embed", "heads"), normal_init(cfg.width), self.dtype, name, use_bias=name == "v"
        )(sequence)
        k, v = (constrain(project(name), tensor_axis=2) for name in ("k", "v"))
        heads = lambda x: x.reshape(*x.shape[:2], cfg.num_heads, cfg.head_dim)
        return rows, CrossKeys(heads(k), heads(v), is_row)


class CrossAttention(nn.Module):
    """Multi-head attention to the rows of a sequence, zero at initialization."""

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B n D"], keys: CrossKeys) -> Float[Array, "B n D"]:
        """Attend from x, which is normalized, to the rows that are no padding."""
        cfg = self.config
        b, n, d = x.shape
        q = dense(d, ("embed", "heads"), normal_init(d), self.dtype, "q")(x)
        q = constrain(q, tensor_axis=2).reshape(b, n, cfg.num_heads, cfg.head_dim)
        y = einsum(q, keys.k, keys.v, 1 / math.sqrt(cfg.head_dim), keys.is_row[:, None, None])
        zeros = nn.initializers.zeros_init()
        return dense(d, ("heads", "embed"), zeros, self.dtype, "proj")(y.reshape(b, n, d))


class SelfAttention(nn.Module):
    """Multi-head self-attention, with a cache in generation."""

    config: TransformerConfig
    dtype: DTypeLike
    attention: str
    start: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B n D"],
        layer: int | Int[Array, ""],
        cache: KVCache | None,
        context: AttentionContext,
    ) -> tuple[Float[Array, "B n D"], KVCache | None]:
        """Attend from x to x itself, and with a cache to the cached positions, too.

        Args:
          x: modulated residual stream.
          layer: number of the block.
          cache: keys and values of earlier positions; generation only.
          context: positional terms.

        Returns:
          The output, and the cache with x in it.
        """
        cfg = self.config
        b, n, d = x.shape
        q, k, v = self._qkv(x, joint=cache is not None or self.attention not in GPU_KERNELS)
        scale = 0.25 / math.sqrt(cfg.head_dim)  # as published, here and for the initial temperature
        if cfg.normalized_attention:
            init = nn.with_logical_partitioning(nn.initializers.constant(math.log(4)), (None,))
            q, k = normalize_qk(q, k, self.param("log_temperature", init, (cfg.num_heads,)))
            scale = 1.0
        if context.rope_angles is not None:
            q, k = rotate(q, context.rope_angles[0]), rotate(k, context.rope_angles[1])
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        mask = cfg.masks[0]  # as an argument it would be traced by rematerialization
        num_keys = None
        if cache is not None:
            start = self.start if context.cache_index is None else context.cache_index
            cache, cached_k, cached_v = cache.extend(layer if len(cache.k) > 1 else 0, start, k, v)
            is_prefill = isinstance(start, int) and start == 0 and not mask[:n, :n].all()
            if is_prefill:  # of several maps: no other position is in the cache
                mask = mask[:n, :n]
            else:
                mask, k, v = None, cached_k, cached_v
                num_keys = start + n if isinstance(start, int) else None
        elif n < cfg.length:  # a step of generation without a cache
            mask = None
        if context.masks is not None:
            mask = context.masks[layer % len(context.masks)]
        q, k, v = (constrain(x, tensor_axis=2) for x in (q, k, v))
        self.sow("attention", "scores", (q, k, scale, mask, context.bias))  # kept only where asked for
        y = attend(q, k, v, scale, mask, self.attention, context.bias, num_keys).reshape(b, n, d)
        out_init = normal_init(d, 1 / math.sqrt(2 * cfg.depth))
        return dense(d, ("heads", "embed"), out_init, self.dtype, "proj")(y), cache

    def _qkv(self, x: jax.Array, joint: bool) -> list[jax.Array]:
        """Project x [B, n, D] to queries, keys and values [B, n, N, H], heads sharded over `tensor`.

        Args:
          x: modulated residual stream.
          joint: in one product; else in three: XLA for GPUs would join their gradients at 1.5 TB/s.
        """
        cfg = self.config
        b, n, d = x.shape
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
        q_bias = self.param("q_bias", init, (d,)).astype(self.dtype)
        v_bias = self.param("v_bias", init, (d,)).astype(self.dtype)
        kernel = _Kernel((d, 3 * d), ("embed", "heads"), normal_init(d), name="qkv")().astype(self.dtype)
        x, precision = x.astype(self.dtype), product_precision(self.dtype)
        project = lambda kernel: constrain(jnp.dot(x, kernel, precision=precision), tensor_axis=2)
        if joint:
            # Interleaved by shard, each device has q, k and v of its own heads, and no activation moves.
            shards = tensor_shards() if cfg.num_heads % tensor_shards() == 0 else 1
            interleaved = jnp.moveaxis(kernel.reshape(d, 3, shards, d // shards), 1, 2).reshape(d, 3 * d)
            qkv = project(interleaved).reshape(b, n, shards, 3, -1)
            q, k, v = (qkv[:, :, :, i].reshape(b, n, d) for i in range(3))
        else:
            q, k, v = (project(kernel[:, i * d : (i + 1) * d]) for i in range(3))
        heads = lambda x: checkpoint_name(x, "qkv").reshape(b, n, cfg.num_heads, cfg.head_dim)
        return [heads(q + q_bias), heads(k), heads(v + v_bias)]


class _Kernel(nn.Module):
    """Matrix of a linear layer, as the parameter `kernel`."""

    shape: tuple[int, int]
    axes: tuple[str | None, str]
    init: Callable

    @nn.compact
    def __call__(self) -> Float[Array, "inputs outputs"]:
        return self.param("kernel", nn.with_logical_partitioning(self.init, self.axes), self.shape)


class MLP(nn.Module):
    """MLP with 4 D hidden channels and tanh-GELU."""

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B n D"]) -> Float[Array, "B n D"]:
        d = self.config.width
        h = dense(4 * d, ("embed", "mlp"), normal_init(d), self.dtype, "fc1")(x)
        h = gelu(checkpoint_name(constrain(h, tensor_axis=2), "fc1"))
        out_init = normal_init(d, 1 / math.sqrt(2 * self.config.depth))
        return dense(d, ("mlp", "embed"), out_init, self.dtype, "fc2")(h)


class Block(nn.Module):
    """Transformer block: x += gamma1 * Attn(adaLN(x)), then x += gamma2 * MLP(adaLN(x)).

    If the condition has a sequence, x += CrossAttn(LN(x)) comes between the two.

    The residual stream is float32; with autocast, the published code has it in 16 bits.

    Attributes:
      config: the architecture.
      dtype: of the matrix products.
      attention: the implementation (see `attend`).
      start: first position of x in the cache, unless the context has a `cache_index`; generation only.
    """

    config: TransformerConfig
    dtype: DTypeLike
    attention: str = "auto"
    start: int = 0

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float32[Array, "B n D"], KVCache | None],
        scanned: tuple[
            int | Int[Array, ""], Float32[Array, "B 6 D"], CrossKeys | None, ArrayLike, Key[Array, ""] | None
        ],
        context: AttentionContext = AttentionContext(),  # noqa: B008  (immutable)
    ) -> tuple[tuple[Float32[Array, "B n D"], KVCache | None], None]:
        """Apply the block as the body of a scan over layers.

        Args:
          carry: residual stream and cache.
          scanned: number, adaLN vectors, keys of cross-attention, drop rate and random key of the layer; the
            keys are None without a sequence, the random key without dropout and stochastic depth.
          context: positional terms of attention.
        """
        x, cache = carry
        layer, modulation, cross_keys, drop_rate, key = scanned
        drop = partial(self._drop, drop_rate, key)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = jnp.moveaxis(modulation, 1, 0)
        h = modulate(x, scale1, shift1, self.dtype)
        attention = SelfAttention(self.config, self.dtype, self.attention, self.start, name="attention")
        h, cache = attention(h, layer, cache, context)
        x = add_gated(x, gamma1, drop(0, h))
        if cross_keys is not None:
            cross_attention = CrossAttention(self.config, self.dtype, name="cross_attention")
            x = x + drop(2, cross_attention(layer_norm(x, self.dtype), cross_keys))
        h = MLP(self.config, self.dtype, name="mlp")(modulate(x, scale2, shift2, self.dtype))
        return (constrain(add_gated(x, gamma2, drop(1, h))), cache), None

    def _drop(self, rate: ArrayLike, key: jax.Array | None, branch: int, y: jax.Array) -> jax.Array:
        """Apply dropout, then stochastic depth: drop the branch of an image with probability `rate`."""
        y = checkpoint_name(y, "branch")
        if key is None:
            return y
        y = y.astype(jnp.float32)
        dropout_key, depth_key = jax.random.split(jax.random.fold_in(key, branch))
        y = nn.Dropout(self.config.dropout, deterministic=False)(y, rng=dropout_key)
        if self.config.drop_path:
            keep = jax.random.bernoulli(depth_key, 1 - rate, (y.shape[0], 1, 1))
            y = y * keep / (1 - rate)
        return y
