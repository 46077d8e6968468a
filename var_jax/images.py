"""Pixel ranges of images, and pictures to look at: grids, side-by-side pairs, coarse-to-fine strips, PNG."""

import io
import math
import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Float32, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from var_jax.paths import write_atomic

MIN_CELL = 48  # pixels; the images of a grid are enlarged to at least this, so that details are visible
LABEL_SIZE = 12  # pixels, of the font of a grid's labels


def normalize(images: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """Convert uint8 images to [-1, 1], the range of the networks."""
    return images.astype(jnp.float32) / 127.5 - 1


def denormalize(images: Float[Array | np.ndarray, "..."]) -> Float[Array | np.ndarray, "..."]:
    """Convert images in [-1, 1] to [0, 1], the range of the public API."""
    return images / 2 + 0.5


def denormalize_to_uint8(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Convert images in [-1, 1] to uint8 on the device, rounded to the nearest level.

    The published demo truncates instead, which is half a gray level darker on average; the script that made
    the published samples for FID was not released.
    """
    return (denormalize(images) * 255 + 0.5).astype(jnp.uint8)


def to_uint8(images: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Convert images in [0, 1] to uint8, rounded to the nearest level; return uint8 images unchanged."""
    if images.dtype == np.uint8:
        return images
    return np.clip(np.asarray(images) * 255 + 0.5, 0, 255).astype(np.uint8)


def image_grid(
    images: Shaped[np.ndarray, "B height width 3"],
    columns: int,
    gap: int = 2,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Arrange images in a grid, row by row; small images are enlarged by an integer factor.

    Args:
      images: uint8, or floats in [0, 1].
      columns: images per row.
      gap: white pixels between and around the images.
      row_labels: text to the left of each row.
      column_labels: text above each column.

    Raises:
      ValueError: if there are no images.
    """
    images = to_uint8(images)
    if not len(images):
        raise ValueError("an image grid needs at least one image, got none")
    factor = max(1, math.ceil(MIN_CELL / images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y = gap + i // columns * (h + gap)
        x = gap + i % columns * (w + gap)
        canvas[y : y + h, x : x + w] = image
    grid = Image.fromarray(canvas)
    if not row_labels and not column_labels:
        return grid
    font = ImageFont.load_default(LABEL_SIZE)
    left = math.ceil(max((font.getlength(label) + LABEL_SIZE for label in row_labels), default=0))
    top = 2 * LABEL_SIZE if column_labels else 0
    labelled = Image.new("RGB", (grid.width + left, grid.height + top), "white")
    labelled.paste(grid, (left, top))
    draw = ImageDraw.Draw(labelled)
    for i, label in enumerate(row_labels):
        draw.text((LABEL_SIZE // 2, top + gap + i * (h + gap) + h // 2), label, "black", font, anchor="lm")
    for i, label in enumerate(column_labels):
        draw.text((left + gap + i * (w + gap) + w // 2, top // 2), label, "black", font, anchor="mm")
    return labelled


def side_by_side(
    left: Shaped[np.ndarray, "B height width 3"],
    right: Shaped[np.ndarray, "B height width 3"],
    pairs_per_row: int = 8,
) -> Image.Image:
    """Arrange pairs of images in a grid, e.g. originals and their reconstructions."""
    pairs = np.stack([left, right], axis=1).reshape(-1, *left.shape[1:])
    return image_grid(pairs, columns=2 * pairs_per_row)


def image_strips(steps: Shaped[np.ndarray, "B K height width 3"]) -> Image.Image:
    """Arrange the images after 1, 2, ... K maps in a grid: one row per image, coarse to fine."""
    return image_grid(steps.reshape(-1, *steps.shape[2:]), columns=steps.shape[1])


def save_png(image: Image.Image, path: os.PathLike) -> epath.Path:
    """Write a PNG atomically, creating its directory."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return write_atomic(path, content.getvalue())
