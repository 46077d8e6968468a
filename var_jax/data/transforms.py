"""Transform encoded images to uint8 pixels of the model's size, on the host."""

import dataclasses
import math

import numpy as np
import PIL
from PIL import Image

from var_jax.data.decoding import DecodeError, decode_image
from var_jax.errors import UserError

# Incremented when a change makes other pixels of the same record; token caches record it.  Version 0 ignored
# EXIF orientation and alpha, and rounded the longer side and the center crop differently.
VERSION = 1
MAX_ASPECT = 20  # longer over shorter side; up to it, the image is resized in full and then cropped
_KEPT = ("label", "condition", "valid")  # fields of a record that are not pixels
_LANCZOS_SUPPORT = 3  # on each side, in pixels of the smaller of the two images
# Pillow resizes the height first if it is reduced and more than this many times the width, else the width.
_TALL = 1 if int(PIL.__version__.split(".")[0]) >= 13 else 100


class CorruptImage(UserError, ValueError):
    """Image of a data set that cannot be decoded; the message names the record."""


def resized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return (width, height) with shorter side `side`; the longer is rounded down, as in torchvision."""
    width, height = size
    longer = int(side * max(size) / min(size))
    return (side, longer) if width <= height else (longer, side)


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Resize an image to shorter side `side` with a Lanczos filter; return it as is if that fits already."""
    if min(image.size) == side:
        return image
    return image.resize(resized_size(image.size, side), Image.Resampling.LANCZOS)


def resize_and_crop(image: Image.Image, side: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Resize as by `resize_short_side`, and crop; pixels outside of the image are black.

    If the longer side is more than MAX_ASPECT times the shorter one, only the region of the crop is resized:
    resized in full, a single line of 60000 pixels would take 15 GB.  The result may be off by one gray level.

    Args:
      image: RGB.
      side: length of the shorter side after resizing.
      box: left, top, right, bottom of the crop in the resized image.
    """
    if max(image.size) <= MAX_ASPECT * min(image.size):
        return resize_short_side(image, side).crop(box)
    scaled = resized_size(image.size, side)
    spans = [_source_span(image.size[axis], scaled[axis], box[axis], box[axis + 2]) for axis in (0, 1)]
    x, y = spans
    part = image.crop((x.window[0], y.window[0], x.window[1], y.window[1]))
    vertical_first = image.height > _TALL * image.width and scaled[1] < image.height
    for axis in (1, 0) if vertical_first else (0, 1):
        size = list(part.size)
        region = [0.0, 0.0, *part.size]
        size[axis] = spans[axis].target[1] - spans[axis].target[0]
        region[axis], region[axis + 2] = spans[axis].region
        part = part.resize(size, Image.Resampling.LANCZOS, box=region)
    crop = Image.new("RGB", (box[2] - box[0], box[3] - box[1]))
    crop.paste(part, (x.target[0] - box[0], y.target[0] - box[1]))
    return crop


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """Source of a crop's pixels along one axis, as (start, stop) pairs.

    Attributes:
      target: part of the crop that is inside the resized image.
      window: pixels of the original image that the filter reads for the target.
      region: extent of the target in pixels of the window.
    """

    target: tuple[int, int]
    window: tuple[int, int]
    region: tuple[float, float]


def _source_span(length: int, scaled: int, start: int, stop: int) -> _Span:
    """Return the source of the crop [start, stop) of an axis of `length` pixels resized to `scaled`."""
    start, stop = max(start, 0), min(stop, scaled)
    scale = length / scaled
    support = math.ceil(_LANCZOS_SUPPORT * max(scale, 1)) + 1
    low = max(math.floor(start * scale) - support, 0)
    high = min(math.ceil(stop * scale) + support, length)
    region = (start * scale - low, min(stop * scale - low, high - low))
    return _Span(target=(start, stop), window=(low, high), region=region)


class ToPixels:
    """Transform of a record to {"image": uint8 [size, size, 3], "label": int32, "valid": float32}.

    A `condition` of the record is kept as it is.

    Attributes:
      name: name of the data set, for messages.
      size: side of the resulting image.
      resize: the shorter side is first resized to size * resize.
      flip: mirror half of the images (random mode only).
      shift: translate half of the images by up to this many pixels, filling with black (random mode only);
        for data sets whose images are too small for `resize`.
    """

    def __init__(self, name: str, size: int, resize: float, flip: bool, shift: int = 0):
        if resize < 1:
            raise ValueError(f"data.resize must be at least 1 (the crop must fit), got {resize}")
        if shift < 0:
            raise ValueError(f"data.shift must be 0 or more pixels, got {shift}")
        self.name, self.size, self.resize, self.flip, self.shift = name, size, resize, flip, shift

    def __call__(self, record: dict, rng: np.random.Generator | None = None) -> dict:
        """Decode, resize and crop an image: at random with `rng`, at the center without.

        Args:
          record: `image` (encoded bytes), `label`, `valid`, `index` and, optionally, `exif`: whether to apply
            the EXIF orientation (default True).
          rng: random generator of flip, shift and crop.

        Raises:
          CorruptImage: if the image cannot be decoded; the message names the record.
        """
        try:
            pixels = self._pixels(decode_image(record["image"], exif=record.get("exif", True)), rng)
        except (DecodeError, MemoryError) as error:
            raise CorruptImage(
                f"record {record['index']} of data set {self.name} holds no readable image "
                f"({len(record['image'])} bytes): {str(error) or 'takes more memory than there is'}"
            ) from error
        return {"image": pixels, **{name: record[name] for name in _KEPT if name in record}}

    def _pixels(self, image: Image.Image, rng: np.random.Generator | None) -> np.ndarray:
        side = round(self.size * self.resize)
        width, height = resized_size(image.size, side)
        margin = self.shift if self.shift and rng is not None and rng.random() < 0.5 else 0
        room_x, room_y = width + 2 * margin - self.size, height + 2 * margin - self.size
        if rng is None:
            x, y = round(room_x / 2), round(room_y / 2)  # half to even, as in torchvision
        else:
            x, y = int(rng.integers(room_x + 1)), int(rng.integers(room_y + 1))
        left, top = x - margin, y - margin
        crop = resize_and_crop(image, side, (left, top, left + self.size, top + self.size))
        pixels = np.asarray(crop)
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)
