"""Decode images of any common format, size and mode to 8-bit RGB."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

WHITE, BLACK = (255, 255, 255), (0, 0, 0)

# Formats decoded by libraries only: EPS, for example, would run Ghostscript on the user's file.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_OPTIONAL_FORMATS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # depend on the build of Pillow
FORMATS = tuple(
    name for name in _FORMATS if name not in _OPTIONAL_FORMATS or features.check(_OPTIONAL_FORMATS[name])
)

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # TIFF tags

# Raised by Pillow on damaged files; RuntimeError by its AVIF decoder.
_DAMAGED_FILE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)

# Pillow warns above 89 million pixels and raises an error above 178 million: reject both.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class DecodeError(ValueError):
    """Bytes that are not an image, are damaged, or have pixel values without a defined white level."""


def decode_image(
    data: bytes,
    exif: bool = True,
    background: tuple[int, int, int] = WHITE,
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """Decode an image to 8-bit RGB; of an animation, the first frame.

    16-bit channels are reduced to their high byte, floats in [0, 1] are scaled to [0, 255], and transparent
    pixels are composited onto the background. Color profiles are ignored.

    Args:
      data: encoded image.
      exif: apply the EXIF orientation, as image viewers do.
      background: color behind transparent pixels.
      formats: formats of Pillow to accept; None for `FORMATS`.
      max_pixels: largest number of pixels to decode; None for Pillow's own limit, which always holds.

    Raises:
      DecodeError: if the bytes cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats or FORMATS) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DecodeError(f"{image.width} x {image.height}, more than {max_pixels:,} pixels")
            image.load()
            rgb = _to_rgb(image, background)
            transposition = _TRANSPOSITIONS.get(_orientation(image)) if exif else None
        return rgb if transposition is None else rgb.transpose(transposition)
    except UnidentifiedImageError as error:  # its message names only a buffer in memory
        raise DecodeError(_unidentified(data)) from error
    except MemoryError as error:
        raise DecodeError("takes more memory than there is") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except _DAMAGED_FILE_ERRORS as error:
        raise DecodeError(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert a decoded image of any mode to RGB, before EXIF orientation is applied."""
    if image.mode.startswith("I") or image.mode == "F":
        gray = _to_8_bits(image)
        if (transparent := image.info.get("transparency")) is not None:
            gray[np.asarray(image) == transparent] = background[0]
        return Image.fromarray(gray).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Reduce a grayscale image of more than 8 bits to uint8 [H, W].

    Raises:
      DecodeError: if the file does not define which value is white.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise DecodeError(
                f"float pixels from {low:g} to {high:g}: only 0 to 1 is taken; scale them to that range"
            )
        return np.round(values * 255).astype(np.uint8)
    if image.mode == "I" and image.format == "TIFF":
        raise DecodeError("integer pixels whose white is not defined: store them as unsigned 8 or 16 bits")
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # Pillow scales to 16 bits, except for TIFF
    gray = (values >> (bits - 8)).astype(np.uint8)
    return 255 - gray if tags.get(_PHOTOMETRIC) == 0 else gray


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if the metadata are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_DAMAGED_FILE_ERRORS, KeyError, IndexError, TypeError, AssertionError):
        return 1


def _unidentified(data: bytes) -> str:
    """Return the reason why Pillow does not recognize these bytes."""
    if not data:
        return "empty"
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "a HEIC image: convert it to JPEG or PNG"
    for name, is_of_format in {
        "AVIF": brand in (b"avif", b"avis"),
        "WEBP": data[:4] == b"RIFF" and data[8:12] == b"WEBP",
        "JPEG2000": data[4:8] == b"jP  ",
    }.items():
        if is_of_format and name not in FORMATS:
            return f"{name}, which this build of Pillow cannot decode: install a newer Pillow"
    return "not an image of a known kind"
