"""Encoder and decoder of the tokenizer, convolutional as published; or patches of pixels as they are."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.tokenizer.config import TokenizerConfig

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


class Encoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> [B, h, w, C], h = H / config.downsample."""

    config: TokenizerConfig
    dtype: jnp.dtype
    precision: str
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        cfg, last = self.config, len(self.config.ch_mult) - 1
        conv = partial(Conv3x3, dtype=self.dtype, precision=self.precision)
        block = partial(
            residual_block(self.remat),
            groups=cfg.norm_groups,
            dropout=cfg.dropout,
            dtype=self.dtype,
            precision=self.precision,
        )
        attention = partial(AttentionBlock, cfg.norm_groups, self.dtype, self.precision)
        middle = Middle(cfg.norm_groups, cfg.dropout, self.dtype, self.precision, self.remat, name="middle")
        x = conv(cfg.ch, name="conv_in")(images)
        for level, mult in enumerate(cfg.ch_mult):
            for i in range(cfg.num_blocks):
                x = block(cfg.ch * mult, name=f"level{level}_block{i}")(x, train)
                if level == last:
                    x = attention(name=f"level{level}_attention{i}")(x)
            if level != last:
                x = Downsample(self.dtype, self.precision, name=f"level{level}_downsample")(x)
        x = middle(x, train)
        x = nn.silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return conv(cfg.code_dim, name="conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, C] -> images [B, H, W, 3], not clipped, H = h * config.downsample.

    The mirror of the encoder with one more residual block a level.  Levels are numbered as in the
    encoder, so that level 0 is the full resolution.
    """

    config: TokenizerConfig
    dtype: jnp.dtype
    precision: str
    remat: bool = False

    @nn.compact
    def __call__(self, f_hat: jax.Array, train: bool = False) -> jax.Array:
        cfg, last = self.config, len(self.config.ch_mult) - 1
        conv = partial(Conv3x3, dtype=self.dtype, precision=self.precision)
        block = partial(
            residual_block(self.remat),
            groups=cfg.norm_groups,
            dropout=cfg.dropout,
            dtype=self.dtype,
            precision=self.precision,
        )
        attention = partial(AttentionBlock, cfg.norm_groups, self.dtype, self.precision)
        middle = Middle(cfg.norm_groups, cfg.dropout, self.dtype, self.precision, self.remat, name="middle")
        x = conv(cfg.ch * cfg.ch_mult[last], name="conv_in")(f_hat)
        x = middle(x, train)
        for level in reversed(range(len(cfg.ch_mult))):
            for i in range(cfg.num_blocks + 1):
                x = block(cfg.ch * cfg.ch_mult[level], name=f"level{level}_block{i}")(x, train)
                if level == last:
                    x = attention(name=f"level{level}_attention{i}")(x)
            if level != 0:
                x = Upsample(self.dtype, self.precision, name=f"level{level}_upsample")(x)
        x = nn.silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return conv(3, name="conv_out")(x)


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """Space to depth: [B, H, W, 3] -> [B, H / p, W / p, 3 p^2], p = patch; the same values in the same dtype.

    Raises:
      ValueError: where p does not divide H and W.
    """
    b, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} pixels do not fill images of {height} x {width}")
    h, w = height // patch, width // patch
    x = images.reshape(b, h, patch, w, patch, channels).swapaxes(2, 3)
    return x.reshape(b, h, w, patch * patch * channels)


def from_patches(patches: jax.Array, patch: int) -> jax.Array:
    """Depth to space, the inverse: [B, h, w, 3 p^2] -> [B, h p, w p, 3]."""
    b, h, w, _ = patches.shape
    x = patches.reshape(b, h, w, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(b, h * patch, w * patch, -1)
