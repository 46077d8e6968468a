"""Convolutional encoder and decoder of the tokenizer, as published; raw pixel patches as an alternative."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.convolution import conv_general_dilated, upsampled_conv

conv_init = nn.with_logical_partitioning(
    nn.initializers.lecun_normal(), ("conv_height", "conv_width", "conv_in", "conv_out")
)
bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("conv_out",))

Conv3x3 = partial(
    nn.Conv,
    kernel_size=(3, 3),
    kernel_init=conv_init,
    bias_init=bias_init,
    conv_general_dilated=conv_general_dilated,
)
Conv1x1 = partial(nn.Conv, kernel_size=(1, 1), kernel_init=conv_init, bias_init=bias_init)
# Every convolution needs an explicit precision; the default depends on the platform (`product_precision`).
Norm = partial(nn.GroupNorm, epsilon=1e-6)  # statistics are float32 for every dtype


def silu(x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """Apply SiLU in float32; in 16 bits a GPU would round after each of its operations, which is slower."""
    return nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def residual_block(remat: bool) -> type[nn.Module]:
    """Return `ResidualBlock`; with `remat`, one that saves only its input for the backward pass."""
    return nn.remat(ResidualBlock, static_argnums=(2,)) if remat else ResidualBlock


class ResidualBlock(nn.Module):
    """Residual block of two convolutions, each after norm and SiLU; a 1x1 shortcut if channels change."""

    features: int
    groups: int
    dropout: float
    dtype: DTypeLike
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h w c2"]:
        conv = dict(features=self.features, dtype=self.dtype, precision=self.precision)
        h = silu(Norm(self.groups, dtype=self.dtype, name="norm1")(x))
        h = Conv3x3(**conv, name="conv1")(h)
        h = silu(Norm(self.groups, dtype=self.dtype, name="norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = Conv3x3(**conv, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv1x1(**conv, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual connection."""

    groups: int
    dtype: DTypeLike
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        b, h, w, c = x.shape
        conv = partial(Conv1x1, dtype=self.dtype, precision=self.precision)
        y = Norm(self.groups, dtype=self.dtype, name="norm")(x)
        qkv = conv(3 * c, name="qkv")(y).reshape(b, h * w, 1, 3 * c)
        # `dot_product_attention` has no precision argument.
        with jax.default_matmul_precision(self.precision):
            y = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=-1))  # scale is channels^-0.5
        return x + conv(c, name="proj")(y.reshape(b, h, w, c))


class Downsample(nn.Module):
    """Stride-2 3x3 convolution; the input is zero-padded by one at the bottom and on the right."""

    dtype: DTypeLike
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h//2 w//2 c"]:
        conv = partial(Conv3x3, dtype=self.dtype, precision=self.precision)
        return conv(x.shape[-1], strides=2, padding=((0, 1), (0, 1)), name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a 3x3 convolution."""

    dtype: DTypeLike
    precision: str

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B 2*h 2*w c"]:
        conv = partial(Conv3x3, conv_general_dilated=upsampled_conv)
        return conv(x.shape[-1], dtype=self.dtype, precision=self.precision, name="conv")(x)


class Middle(nn.Module):
    """Middle of encoder and decoder, at the lowest resolution: residual block, attention, residual block."""

    groups: int
    dropout: float
    dtype: DTypeLike
    precision: str
    remat: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h w c"]:
        block = residual_block(self.remat)
        residual = partial(block, x.shape[-1], self.groups, self.dropout, self.dtype, self.precision)
        x = residual(name="block1")(x, train)
        x = AttentionBlock(self.groups, self.dtype, self.precision, name="attention")(x)
        return residual(name="block2")(x, train)


class Encoder(nn.Module):
    """Encoder: images in [-1, 1] to features before `quant_conv`, h = height / config.downsample."""

    config: TokenizerConfig
    dtype: DTypeLike
    precision: str
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "B height width 3"], train: bool = False
    ) -> Float[Array, "B h w C"]:
        cfg = self.config
        last = len(cfg.ch_mult) - 1
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
        x = silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return conv(cfg.code_dim, name="conv_out")(x)


class Decoder(nn.Module):
    """Decoder: f_hat after `post_quant_conv` to images, not clipped, height = h * config.downsample.

    It mirrors the encoder with one more residual block per level.  Levels are numbered as in the encoder:
    level 0 is the full resolution.
    """

    config: TokenizerConfig
    dtype: DTypeLike
    precision: str
    remat: bool = False

    @nn.compact
    def __call__(
        self, f_hat: Float[Array, "B h w C"], train: bool = False
    ) -> Float[Array, "B height width 3"]:
        cfg = self.config
        last = len(cfg.ch_mult) - 1
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
        x = silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return conv(3, name="conv_out")(x)


def to_patches(images: Shaped[Array, "B height width c"], patch: int) -> Shaped[Array, "B h w C"]:
    """Cut images into patches (space to depth): h = height / patch, C = c patch^2.

    Raises:
      ValueError: if `patch` does not divide the height and the width.
    """
    b, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patches of {patch} pixels do not fill images of {height} x {width}")
    h, w = height // patch, width // patch
    x = images.reshape(b, h, patch, w, patch, channels).swapaxes(2, 3)
    return x.reshape(b, h, w, patch * patch * channels)


def from_patches(patches: Shaped[Array, "B h w C"], patch: int) -> Shaped[Array, "B height width c"]:
    """Assemble images from patches (depth to space), the inverse of `to_patches`."""
    b, h, w, _ = patches.shape
    x = patches.reshape(b, h, w, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(b, h * patch, w * patch, -1)
