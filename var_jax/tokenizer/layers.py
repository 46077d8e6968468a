"""Building blocks of the convolutional encoder and decoder (Esser et al. 2021, section A)."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

conv_init = nn.with_logical_partitioning(
    nn.initializers.lecun_normal(), ("conv_height", "conv_width", "conv_in", "conv_out")
)
bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",))

Conv3x3 = partial(nn.Conv, kernel_size=(3, 3), kernel_init=conv_init, bias_init=bias_init)
Conv1x1 = partial(nn.Conv, kernel_size=(1, 1), kernel_init=conv_init, bias_init=bias_init)
# Every convolution is given its precision: without one the platform chooses (`dtypes.product_precision`).
Norm = partial(nn.GroupNorm, epsilon=1e-6)  # statistics in float32 whatever the dtype


def residual_block(remat: bool) -> type[nn.Module]:
    """`ResidualBlock`, or one that keeps its input alone for the backward pass."""
    return nn.remat(ResidualBlock, static_argnums=(2,)) if remat else ResidualBlock


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, dropout, conv; a 1x1 shortcut where the channels change."""

    features: int
    groups: int
    dropout: float
    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = dict(features=self.features, dtype=self.dtype, precision=self.precision)
        h = nn.silu(Norm(self.groups, dtype=self.dtype, name="norm1")(x))
        h = Conv3x3(**conv, name="conv1")(h)
        h = nn.silu(Norm(self.groups, dtype=self.dtype, name="norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = Conv3x3(**conv, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv1x1(**conv, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a map, with a residual connection."""

    groups: int
    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        conv = partial(Conv1x1, dtype=self.dtype, precision=self.precision)
        y = Norm(self.groups, dtype=self.dtype, name="norm")(x)
        qkv = conv(3 * c, name="qkv")(y).reshape(b, h * w, 1, 3 * c)
        with jax.default_matmul_precision(self.precision):  # it takes no precision as an argument
            y = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))  # scale is channels^-0.5
        return x + conv(c, name="proj")(y.reshape(b, h, w, c))


class Downsample(nn.Module):
    """Stride-2 3x3 convolution on an input zero-padded by one at the bottom and the right."""

    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(Conv3x3, dtype=self.dtype, precision=self.precision)
        return conv(x.shape[-1], strides=2, padding=((0, 1), (0, 1)), name="conv")(x)


class Upsample(nn.Module):
    """Every pixel doubled, then a 3x3 convolution."""

    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return Conv3x3(x.shape[-1], dtype=self.dtype, precision=self.precision, name="conv")(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    groups: int
    dropout: float
    dtype: jnp.dtype
    precision: str
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        block = residual_block(self.remat)
        residual = partial(block, x.shape[-1], self.groups, self.dropout, self.dtype, self.precision)
        x = residual(name="block1")(x, train)
        x = AttentionBlock(self.groups, self.dtype, self.precision, name="attention")(x)
        return residual(name="block2")(x, train)
