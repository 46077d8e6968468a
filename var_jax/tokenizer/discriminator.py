"""Discriminators of the tokenizer's adversarial loss, and differentiable augmentation of what they see."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.dtypes import product_precision
from var_jax.tokenizer.autoencoder import Conv1x1, Conv3x3, Norm, bias_init, conv_init

SLOPE = 0.2  # of the leaky ReLUs below zero


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches (PatchGAN: Isola et al. 2017, section 3.2.2).

    Norms are over groups of channels of the whole image, where the original has them over the batch: an
    image is then judged alike whatever comes with it, on one device and on many.

    Attributes:
      channels: of the first layer; doubled at every further one, up to eightfold.
      layers: that halve the side; with three, a convolution sees 70 pixels.
      dtype: of the convolutions.
    """

    channels: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i in range(self.layers + 1):
            stride, features = 2 if i < self.layers else 1, self.channels * min(2**i, 8)
            x = _conv4x4(features, stride, self.dtype, f"conv{i}")(x)
            if i:
                x = Norm(_groups(features), dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
        x = _conv4x4(1, 1, self.dtype, "judge")(x)
        return x.reshape(x.shape[0], -1).astype(jnp.float32)


class FeatureHeads(nn.Module):
    """Small heads that judge the features of a frozen network at each place (Sauer et al. 2021).

    Attributes:
      channels: of a head.
      dtype: of the convolutions.
    """

    channels: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: list[jax.Array]) -> jax.Array:
        """Maps [B, h, w, c] of several layers -> logits of all of them."""
        logits = []
        how = dict(dtype=self.dtype, precision=product_precision(self.dtype))
        for i, x in enumerate(features):
            x = Conv1x1(self.channels, **how, name=f"head{i}_in")(x.astype(self.dtype))
            x = nn.leaky_relu(Norm(_groups(self.channels), dtype=self.dtype, name=f"head{i}_norm1")(x), SLOPE)
            y = Conv3x3(self.channels, **how, name=f"head{i}_conv")(x)
            y = nn.leaky_relu(Norm(_groups(self.channels), dtype=self.dtype, name=f"head{i}_norm2")(y), SLOPE)
            x = Conv1x1(1, **how, name=f"head{i}_judge")(x + y)
            logits.append(x.reshape(x.shape[0], -1).astype(jnp.float32))
        return jnp.concatenate(logits, axis=1)


def _conv4x4(features: int, stride: int, dtype, name: str) -> nn.Conv:
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
    """32 groups, or as many as the channels allow."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Loss of a discriminator with logits [B, n] of real images and of reconstructions (Lim & Ye 2017)."""
    return 0.5 * (jnp.mean(nn.relu(1 - real)) + jnp.mean(nn.relu(1 + fake)))


def lecam(real: jax.Array, fake: jax.Array, means: jax.Array) -> jax.Array:
    """Keeps logits near the other kind's moving mean (Tseng et al. 2021, equation 3).

    Args:
      real, fake: logits [B, n].
      means: [2], moving means of the logits of real images and of reconstructions.
    """
    return jnp.mean((real - means[1]) ** 2) + jnp.mean((fake - means[0]) ** 2)


def diff_augment(
    images: jax.Array, key: jax.Array, policies: Sequence[str] = ("color", "translation", "cutout")
) -> jax.Array:
    """Images [B, H, W, 3] in [-1, 1] -> the same shape and dtype, augmented; colours may leave the range.

    Args:
      images: gradients flow through to them.
      key: one for the batch.
      policies: applied in this order: `color` (brightness, saturation, contrast), `translation` (by up to an
        eighth of the sides), `cutout` (of a rectangle of half the sides).  What is uncovered or cut is 0.

    Raises:
      ValueError: on an unknown policy.
    """
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise ValueError(f"no augmentation {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    for own_key, policy in zip(jax.random.split(key, len(policies)), policies, strict=True):
        images = POLICIES[policy](images, own_key)
    return images


def _color(images: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness by -0.5 to 0.5, saturation 0 to 2 times, contrast 0.5 to 1.5 times."""
    uniform = lambda key, low, high: jax.random.uniform(  # noqa: E731
        key, (len(images), 1, 1, 1), images.dtype, low, high
    )
    brightness, saturation, contrast = jax.random.split(key, 3)
    images = images + uniform(brightness, -0.5, 0.5)
    grey = images.mean(axis=3, keepdims=True)
    images = grey + (images - grey) * uniform(saturation, 0, 2)
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return mean + (images - mean) * uniform(contrast, 0.5, 1.5)


def _translation(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shifts by whole pixels, zeros moving in."""
    shape = images.shape[1:]
    reach = jnp.array([shape[0] // 8, shape[1] // 8])
    starts = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)
    margins = [(side // 8, side // 8) for side in shape[:2]]
    padded = jnp.pad(images, ((0, 0), *margins, (0, 0)))
    return jax.vmap(lambda image, start: jax.lax.dynamic_slice(image, (*start, 0), shape))(padded, starts)


def _cutout(images: jax.Array, key: jax.Array) -> jax.Array:
    """Zeros a rectangle of half the sides around any point of the image, as far as it lies inside."""
    inside = []
    for side, own_key in zip(images.shape[1:3], jax.random.split(key), strict=True):
        hole = side // 2
        # An even hole has its centre between pixels, which takes one place more to treat both borders alike.
        centre = jax.random.randint(own_key, (len(images), 1), 0, side + 1 - hole % 2)
        distance = jnp.arange(side) - (centre - hole // 2)
        inside.append((distance >= 0) & (distance < hole))
    rows, columns = inside
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], 0, images)


POLICIES = {"color": _color, "translation": _translation, "cutout": _cutout}
