"""Differentiable augmentation of what a discriminator sees (DiffAugment, Zhao et al. 2020).

Every image gets draws of its own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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
