"""Image files that people give: opened whole, cut and resized to the size of a model."""

from PIL import Image

from var_jax.data.decoding import BLACK, WHITE, DecodeError, decode_image
from var_jax.errors import UserError
from var_jax.paths import as_path


class UnusableImage(UserError, ValueError):
    """A file is no image, or does not fit what it is used for."""


def open_image(path: str, mode: str) -> Image.Image:
    """Decode an image file, turned upright by its EXIF orientation.

    Args:
      path: of the file.
      mode: `RGB` for an image, whose transparent pixels become white, as in training; `L` for a mask, where
        they become black: strokes on a transparent layer mask what they cover and nothing else.

    Raises:
      UnusableImage: if there is no file, or no image in it.
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
    """Left, top, right, bottom of the largest square in the middle of an image of (width, height)."""
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return left, top, left + side, top + side


def fitted(image: Image.Image, side: int, path: str) -> Image.Image:
    """An image cut to a square in its middle and resized to the model's size, with a notice."""
    if image.size == (side, side):
        return image
    print(f"{path}: {image.width} x {image.height}, cut to a square and resized to {side} x {side}")
    method = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.LANCZOS
    return image.crop(crop_box(image.size)).resize((side, side), method)
