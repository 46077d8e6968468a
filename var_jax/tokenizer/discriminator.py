"""Discriminators and losses of the tokenizer's adversarial training, and differentiable augmentation."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from var_jax.dtypes import product_precision
from var_jax.tokenizer.autoencoder import Conv1x1, Conv3x3, Norm, bias_init, conv_init

SLOPE = 0.2  # negative slope of the leaky ReLUs


class PatchDiscriminator(nn.Module):
    """Convolutional discriminator of overlapping patches (PatchGAN: Isola et al. 2017, section 3.2.2).

    It uses group norm instead of the original's batch norm: the logits of an image then do not depend on the
    rest of the batch, nor on the number of devices.

    Attributes:
      channels: of the first layer; doubled by each further layer, up to eight times.
      layers: number of layers that halve the side; with three, the receptive field is 70 pixels.
      dtype: of the convolutions.
    """

    channels: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B height width 3"]) -> Float32[Array, "B n"]:
        """Compute the logits of all patches."""
        x = images
        for i in range(self.layers + 1):
            stride = 2 if i < self.layers else 1
            features = self.channels * min(2**i, 8)
            x = _conv4x4(features, stride, self.dtype, f"conv{i}")(x)
            if i:
                x = Norm(_groups(features), dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
        x = _conv4x4(1, 1, self.dtype, "judge")(x)
        return x.reshape(x.shape[0], -1).astype(jnp.float32)


class FeatureHeads(nn.Module):
    """Discriminator heads on the feature maps of a frozen network (Sauer et al. 2021).

    Attributes:
      channels: of a head.
      dtype: of the convolutions.
    """

    channels: int = 128
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: list[Float[Array, "B _ _ _"]]) -> Float32[Array, "B n"]:
        """Compute the logits at all positions of the feature maps [B, h, w, c] of several layers."""
        logits = []
        product = dict(dtype=self.dtype, precision=product_precision(self.dtype))
        for i, x in enumerate(features):
            x = Conv1x1(self.channels, **product, name=f"head{i}_in")(x.astype(self.dtype))
            x = nn.leaky_relu(Norm(_groups(self.channels), dtype=self.dtype, name=f"head{i}_norm1")(x), SLOPE)
            y = Conv3x3(self.channels, **product, name=f"head{i}_conv")(x)
            y = nn.leaky_relu(Norm(_groups(self.channels), dtype=self.dtype, name=f"head{i}_norm2")(y), SLOPE)
            x = Conv1x1(1, **product, name=f"head{i}_judge")(x + y)
            logits.append(x.reshape(x.shape[0], -1).astype(jnp.float32))
        return jnp.concatenate(logits, axis=1)


def _conv4x4(features: int, stride: int, dtype: DTypeLike, name: str) -> nn.Conv:
    return nn.Conv(
        features,
        (4, 4),
        stride,
        padding=((1, 2), (1, 2)) if stride == 1 else ((1, 1), (1, 1)),
        dtype=dtype,
        precision=product_precision(dtype),
        kernel_init=conv_init,
        bias_init=bias_init,
        name=name,
    )


def _groups(channels: int) -> int:
    """Choose the number of groups of a group norm: the largest power of two up to 32 that divides."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def hinge(real: Float[Array, "B n"], fake: Float[Array, "B n"]) -> Float[Array, ""]:
    """Compute the hinge loss of a discriminator (Lim & Ye 2017).

    Args:
      real: logits of real images.
      fake: logits of reconstructions.
    """
    return 0.5 * (jnp.mean(nn.relu(1 - real)) + jnp.mean(nn.relu(1 + fake)))


def lecam(real: Float[Array, "B n"], fake: Float[Array, "B n"], means: Float[Array, "2"]) -> Float[Array, ""]:
    """Compute LeCam regularization: logits stay near the moving mean of the other class.

    Source: Tseng et al. 2021, equation 3.

    Args:
      real: logits of real images.
      fake: logits of reconstructions.
      means: moving means of the logits of real images and of reconstructions.
    """
    return jnp.mean((real - means[1]) ** 2) + jnp.mean((fake - means[0]) ** 2)


def diff_augment(
    images: Float[Array, "B height width 3"],
    key: PRNGKeyArray,
    policies: Sequence[str] = ("color", "translation", "cutout"),
) -> Float[Array, "B height width 3"]:
    """Augment images for a discriminator, differentiably (DiffAugment: Zhao et al. 2020).

    Args:
      images: in [-1, 1]; augmented colors may leave this range.
      key: random key for the batch.
      policies: applied in this order: `color` (brightness, saturation, contrast), `translation` (by up to an
        eighth of the sides), `cutout` (of a rectangle of half the sides).  Uncovered and cut pixels are 0.

    Raises:
      ValueError: on an unknown policy.
    """
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise ValueError(f"unknown augmentation {', '.join(unknown)}; must be among {', '.join(POLICIES)}")
    for policy_key, policy in zip(jax.random.split(key, len(policies)), policies, strict=True):
        images = POLICIES[policy](images, policy_key)
    return images


def _color(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift brightness by -0.5 to 0.5; scale saturation by 0 to 2 and contrast by 0.5 to 1.5."""
    uniform = lambda key, low, high: jax.random.uniform(key, (len(images), 1, 1, 1), images.dtype, low, high)
    brightness, saturation, contrast = jax.random.split(key, 3)
    images = images + uniform(brightness, -0.5, 0.5)
    gray = images.mean(axis=3, keepdims=True)
    images = gray + (images - gray) * uniform(saturation, 0, 2)
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return mean + (images - mean) * uniform(contrast, 0.5, 1.5)


def _translation(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift by whole pixels, filling with zeros."""
    shape = images.shape[1:]
    max_shift = jnp.array([shape[0] // 8, shape[1] // 8])
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * max_shift + 1)
    margins = [(side // 8, side // 8) for side in shape[:2]]
    padded = jnp.pad(images, ((0, 0), *margins, (0, 0)))
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), shape))(padded, starts)


def _cutout(images: jax.Array, key: jax.Array) -> jax.Array:
    """Set a rectangle of half the sides, centered at a random point of the image, to zero."""
    inside = []
    for side, axis_key in zip(images.shape[1:3], jax.random.split(key), strict=True):
        hole = side // 2
        # The center of an even hole is between pixels: one more position treats both borders alike.
        center = jax.random.randint(axis_key, (len(images), 1), 0, side + 1 - hole % 2)
        offset = jnp.arange(side) - (center - hole // 2)
        inside.append((offset >= 0) & (offset < hole))
    rows, columns = inside
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0, images)


POLICIES = {"color": _color, "translation": _translation, "cutout": _cutout}
