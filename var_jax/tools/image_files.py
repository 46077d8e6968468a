"""Image files of users: decoding, center crop and resize to the size of a model."""

from PIL import Image

from var_jax.data.decoding import BLACK, WHITE, DecodeError, decode_image
from var_jax.errors import UserError
from var_jax.paths import as_path


class UnusableImage(UserError, ValueError):
    """Error for a file that is not an image, or does not fit its use."""


def open_image(path: str, mode: str) -> Image.Image:
    """Decode an image file and apply its EXIF orientation.

    Args:
      path: path of the file.
      mode: `RGB` for an image, whose transparent pixels become white, as in training; `L` for a mask, whose
        transparent pixels become black, so that white strokes on a transparent layer are the mask.

    Raises:
      UnusableImage: if the file is missing, unreadable or not an image.
    """
    try:
        data = as_path(path).read_bytes()
    except FileNotFoundError as error:
        raise UnusableImage(f"no such file: {path}") from error
    except OSError as error:
        raise UnusableImage(f"{path} cannot be read: {error}") from error
    try:
        return decode_image(data, background=BLACK if mode == "L" else WHITE).convert(mode)
    except DecodeError as error:
        raise UnusableImage(f"{path} is not an image, or is damaged: {error}") from error


def crop_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the largest centered square in an image of (width, height)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def center_crop_resize(image: Image.Image, side: int, path: str | None = None) -> Image.Image:
    """Crop an image to its central square and resize it to (side, side), with a notice if `path` is given."""
    if image.size == (side, side):
        return image
    if path is not None:
        print(f"{path}: {image.width} x {image.height}, cropped to a square and resized to {side} x {side}")
    method = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return image.crop(crop_box(image.size)).resize((side, side), method)
