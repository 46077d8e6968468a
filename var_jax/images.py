"""Pictures for people: grids, reconstructions beside their originals, coarse-to-fine strips."""

import io
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from var_jax.paths import write_atomic

MIN_CELL = 48  # pixels; smaller images are enlarged to about this, so that they can be looked at


def normalize(images: jax.Array) -> jax.Array:
    """Convert uint8 images [...] to float32 in [-1, 1], the range of the networks."""
    return images.astype(jnp.float32) / 127.5 - 1


def denormalize(images: jax.Array) -> jax.Array:
    """Convert images in [-1, 1] to [0, 1], the range of the public API."""
    return images / 2 + 0.5


def denormalize_to_uint8(images: jax.Array) -> jax.Array:
    """Convert images in [-1, 1] to uint8 on the device, rounded to the nearest.

    The published demonstration truncates, half a grey level darker on average; the script that made the
    published samples for FID was not released.
    """
    return (denormalize(images) * 255 + 0.5).astype(jnp.uint8)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] -> uint8, rounded to the nearest; uint8 as it is."""
    if images.dtype == np.uint8:
        return images
    return np.clip(np.asarray(images) * 255 + 0.5, 0, 255).astype(np.uint8)


def image_grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Images [N, H, W, 3] (uint8, or floats in [0, 1]), row by row; small ones enlarged by a whole factor.

    Raises:
      ValueError: without any image.
    """
    images = to_uint8(images)
    if not len(images):
        raise ValueError("a grid needs at least one image, got none")
    factor = max(1, math.ceil(MIN_CELL / images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return Image.fromarray(canvas)


def side_by_side(left: np.ndarray, right: np.ndarray, pairs_per_row: int = 8) -> Image.Image:
    """Pairs of images [N, H, W, 3], e.g. originals and their reconstructions."""
    pairs = np.stack([left, right], axis=1).reshape(-1, *left.shape[1:])
    return image_grid(pairs, columns=2 * pairs_per_row)


def image_strips(steps: np.ndarray) -> Image.Image:
    """Images [N, K, H, W, 3] after 1, 2, ... K maps: a row an image, coarse to fine."""
    return image_grid(steps.reshape(-1, *steps.shape[2:]), columns=steps.shape[1])


def save_png(image: Image.Image, path: os.PathLike) -> epath.Path:
    """Write a PNG, making its folder; a half-written file never takes the name."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return write_atomic(path, content.getvalue())
