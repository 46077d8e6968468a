"""Host-side image transforms: encoded bytes to uint8 pixels of the model's size."""

import dataclasses
import math

import numpy as np
from PIL import Image

from var_jax.data.decoding import DecodeError, decode
from var_jax.errors import UserError

# Changes whenever the same record comes out as other pixels; token caches record it.  Before version 1, EXIF
# orientation and alpha were ignored, and the longer side and centre crops were rounded otherwise.
VERSION = 1
MAX_ASPECT = 20  # longer over shorter side, up to which an image is resized whole before it is cropped
_LANCZOS_SUPPORT = 3  # pixels of the smaller of the two images, on each side


class CorruptImage(UserError, ValueError):
    """An image of a data set cannot be decoded; names the record."""


def resized_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) once the shorter side is `side`; the longer one is cut off as by torchvision."""
    width, height = size
    longer = int(side * max(size) / min(size))
    return (side, longer) if width <= height else (longer, side)


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Scales so that the shorter side is `side`, by Lanczos; as it is where it already fits."""
    if min(image.size) == side:
        return image
    return image.resize(resized_size(image.size, side), Image.Resampling.LANCZOS)


def resize_and_crop(image: Image.Image, side: int, box: tuple[int, int, int, int]) -> Image.Image:
    """The crop of an image that `resize_short_side` has scaled; black where it reaches outside.

    Of an image longer than MAX_ASPECT times its shorter side, only the region of the crop is resized: whole,
    a single line of 60000 pixels would take 15 GB.  Its pixels may be one grey level off.

    Args:
      image: RGB.
      side: of the shorter side, scaled.
      box: left, top, right, bottom of the crop in the scaled image.
    """
    if max(image.size) <= MAX_ASPECT * min(image.size):
        return resize_short_side(image, side).crop(box)
    scaled = resized_size(image.size, side)
    x, y = spans = [_source_span(image.size[axis], scaled[axis], box[axis], box[axis + 2]) for axis in (0, 1)]
    part = image.crop((x.window[0], y.window[0], x.window[1], y.window[1]))
    vertical_first = image.height > image.width and scaled[1] < image.height  # as Pillow resizes it whole
    for axis in (1, 0) if vertical_first else (0, 1):
        size, region = list(part.size), [0.0, 0.0, *part.size]
        size[axis] = spans[axis].target[1] - spans[axis].target[0]
        region[axis], region[axis + 2] = spans[axis].region
        part = part.resize(size, Image.Resampling.LANCZOS, box=region)
    crop = Image.new("RGB", (box[2] - box[0], box[3] - box[1]))
    crop.paste(part, (x.target[0] - box[0], y.target[0] - box[1]))
    return crop


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """Where along one axis the pixels of a crop come from; pairs of start and stop.

    Attributes:
      target: part of the crop that is inside the scaled image.
      window: pixels of the image that the filter reads for it.
      region: what the target covers, in pixels of the window.
    """

    target: tuple[int, int]
    window: tuple[int, int]
    region: tuple[float, float]


def _source_span(length: int, scaled: int, start: int, stop: int) -> _Span:
    """Source of the crop `start` to `stop`, in an image of `length` pixels scaled to `scaled`."""
    start, stop, scale = max(start, 0), min(stop, scaled), length / scaled
    support = math.ceil(_LANCZOS_SUPPORT * max(scale, 1)) + 1
    low = max(math.floor(start * scale) - support, 0)
    high = min(math.ceil(stop * scale) + support, length)
    region = (start * scale - low, min(stop * scale - low, high - low))
    return _Span(target=(start, stop), window=(low, high), region=region)


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
            raise ValueError(f"data.resize must be at least 1 (the crop must fit), got {resize}")
        if shift < 0:
            raise ValueError(f"data.shift must be 0 or more pixels, got {shift}")
        self.name, self.size, self.resize, self.flip, self.shift = name, size, resize, flip, shift

    def __call__(self, record: dict, rng: np.random.Generator | None = None) -> dict:
        """Crops at random with `rng`, at the centre without.

        Args:
          record: encoded `image`, `label`, `valid`, `index` and, optionally, `exif`: whether its EXIF
            orientation counts, as it does by default.
          rng: of the crop.

        Raises:
          CorruptImage: naming the record.
        """
        try:
            pixels = self._pixels(decode(record["image"], exif=record.get("exif", True)), rng)
        except (DecodeError, MemoryError) as error:
            raise CorruptImage(
                f"record {record['index']} of data set {self.name} holds no readable image "
                f"({len(record['image'])} bytes): {str(error) or 'takes more memory than there is'}"
            ) from error
        return {"image": pixels, "label": record["label"], "valid": record["valid"]}

    def _pixels(self, image: Image.Image, rng: np.random.Generator | None) -> np.ndarray:
        side = round(self.size * self.resize)
        width, height = resized_size(image.size, side)
        margin = self.shift if self.shift and rng is not None and rng.random() < 0.5 else 0
        room_x, room_y = width + 2 * margin - self.size, height + 2 * margin - self.size
        if rng is None:
            x, y = round(room_x / 2), round(room_y / 2)  # as torchvision: half to even
        else:
            x, y = int(rng.integers(room_x + 1)), int(rng.integers(room_y + 1))
        left, top = x - margin, y - margin
        crop = resize_and_crop(image, side, (left, top, left + self.size, top + self.size))
        pixels = np.asarray(crop)
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)
