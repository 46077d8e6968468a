"""Images and masks that visitors send: limits, decoding, the size of the model."""

import base64
import binascii

import numpy as np
from jaxtyping import Bool, UInt8

from var_jax.data.decoding import DecodeError, decode_image
from var_jax.tools.image_files import UnusableImage, center_crop_resize

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 40_000_000
MASK_URL = "data:image/png;base64,"


def image_from_upload(data: bytes, side: int, max_bytes: int) -> UInt8[np.ndarray, "side side 3"]:
    """Decode an uploaded image, upright and on white, and crop and resize it to the size of the model.

    Args:
      data: bytes of the file.
      side: side of the model's images.
      max_bytes: largest size of a file.

    Raises:
      UnusableImage: if the file is too large, of another format, or damaged.
    """
    if len(data) > max_bytes:
        raise UnusableImage(f"This file has {len(data) / 1e6:.1f} MB; the limit is {max_bytes / 1e6:g} MB.")
    try:
        image = decode_image(data, formats=FORMATS, max_pixels=MAX_PIXELS)
    except DecodeError as error:
        raise UnusableImage(
            f"This file cannot be used: {error}. Choose a PNG, JPEG or WebP image of up to "
            f"{MAX_PIXELS // 10**6} million pixels."
        ) from error
    return np.asarray(center_crop_resize(image, side))


def mask_from_painting(url: str, side: int) -> Bool[np.ndarray, "side side"]:
    """Decode the mask of the painter.

    Args:
      url: data URL of a PNG of side x side pixels, opaque where to resample; empty for no stroke.
      side: side of the model's images.

    Raises:
      UnusableImage: if nothing is painted, or the URL is not one of the painter.
    """
    if not url:
        raise UnusableImage("Nothing is painted: paint over the part of the image to draw again.")
    max_length = 8 * side * side + 4096  # base64 of the worst case of 4 bytes a pixel
    if not url.startswith(MASK_URL) or len(url) > max_length:
        raise UnusableImage(f"The mask must be a PNG of {side} x {side} pixels as a data URL.")
    try:
        data = base64.b64decode(url.removeprefix(MASK_URL), validate=True)
        image = decode_image(data, background=(0, 0, 0), formats=("PNG",), max_pixels=side * side)
    except (binascii.Error, DecodeError) as error:
        raise UnusableImage(f"The mask cannot be read: {error}") from error
    if image.size != (side, side):
        raise UnusableImage(f"The mask is {image.width} x {image.height}, but must be {side} x {side}.")
    return np.asarray(image.convert("L")) > 127
