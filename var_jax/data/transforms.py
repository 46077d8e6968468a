"""Host-side image transforms: encoded bytes to uint8 pixels of the model's size."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from var_jax.errors import UserError


class CorruptImage(UserError, ValueError):
    """An image of a data set cannot be decoded; names the record."""


def decode(data: bytes) -> Image.Image:
    """Encoded image -> RGB Pillow image (other modes are converted).

    Raises:
      ValueError: if the bytes are no image, or are cut short.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError as error:  # its own words name a buffer in memory
        raise ValueError("not an image of a known kind" if data else "empty") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Scales so that the shorter side is `side`, by Lanczos; as it is where it already fits."""
    w, h = image.size
    if min(w, h) == side:
        return image
    scale = side / min(w, h)
    return image.resize((max(side, round(w * scale)), max(side, round(h * scale))), Image.Resampling.LANCZOS)


class ToPixels:
    """Record -> {"image": uint8 [size, size, 3], "label": int32, "valid": float32}.

    Attributes:
      name: of the data set, for messages.
      size: side of the result.
      resize: the shorter side is first brought to size * resize.
      flip: mirror half of the images (random mode only).
      shift: move half of the images by up to so many pixels, black coming in (random mode only); for data
        sets whose images are too small to be enlarged and cropped.
    """

    def __init__(self, name: str, size: int, resize: float, flip: bool, shift: int = 0):
        if resize < 1:
            raise ValueError(f"data.resize must be at least 1 (the crop must fit), found {resize}")
        if shift < 0:
            raise ValueError(f"data.shift must be 0 or more pixels, found {shift}")
        self.name, self.size, self.resize, self.flip, self.shift = name, size, resize, flip, shift

    def __call__(self, record: dict, rng: np.random.Generator | None = None) -> dict:
        """Crops at random with `rng`, at the centre without."""
        try:
            image = decode(record["image"])
        except ValueError as error:
            raise CorruptImage(
                f"record {record['index']} of data set {self.name} holds no readable image "
                f"({len(record['image'])} bytes): {error}"
            ) from error
        image = resize_short_side(image, round(self.size * self.resize))
        if self.shift and rng is not None and rng.random() < 0.5:
            image = ImageOps.expand(image, self.shift)
        room_x, room_y = image.width - self.size, image.height - self.size
        if rng is None:
            x, y = room_x // 2, room_y // 2
        else:
            x, y = rng.integers(room_x + 1), rng.integers(room_y + 1)
        pixels = np.asarray(image.crop((x, y, x + self.size, y + self.size)))
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return {"image": np.ascontiguousarray(pixels), "label": record["label"], "valid": record["valid"]}
