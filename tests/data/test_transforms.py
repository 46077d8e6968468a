import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from var_jax.data.sources import open_source
from var_jax.data.transforms import (
    MAX_ASPECT,
    CorruptImage,
    ToPixels,
    resize_and_crop,
    resize_short_side,
    resized_size,
)


def record(pixels: np.ndarray, form: str = "PNG", **save) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **save)
    return {"image": buffer.getvalue(), "label": np.int32(3), "index": 5, "valid": np.float32(1)}


RAMP = np.arange(40 * 20 * 3, dtype=np.uint8).reshape(40, 20, 3)


def test_an_image_of_the_right_size_is_left_alone():
    pixels = RAMP[:20]
    out = ToPixels("x/train", 20, 1.0, False)(record(pixels))
    np.testing.assert_array_equal(out["image"], pixels)
    assert out["label"] == 3 and out["image"].dtype == np.uint8


def test_centre_crop_without_and_random_crop_with_a_generator():
    transform = ToPixels("x/train", 20, 1.0, False)
    np.testing.assert_array_equal(transform(record(RAMP))["image"], RAMP[10:30])
    crops = [transform(record(RAMP), np.random.default_rng(seed))["image"] for seed in range(20)]
    starts = {int(np.flatnonzero((crop[0] == RAMP).all((1, 2)))[0]) for crop in crops}
    assert len(starts) > 5 and all(0 <= start <= 20 for start in starts)
    repeated = transform(record(RAMP), np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(repeated, crops[0])


def test_flip_mirrors_about_half_in_random_mode_only():
    transform = ToPixels("x/train", 20, 1.0, True)
    square = record(RAMP[:20])
    np.testing.assert_array_equal(transform(square)["image"], RAMP[:20])
    flipped = [
        np.array_equal(transform(square, np.random.default_rng(s))["image"], RAMP[:20, ::-1])
        for s in range(60)
    ]
    assert 15 < sum(flipped) < 45


def test_shift_translates_about_half_of_the_images_in_random_mode_only():
    transform = ToPixels("x", 20, 1.0, False, shift=1)
    square = record(RAMP[:20])
    np.testing.assert_array_equal(transform(square)["image"], RAMP[:20])
    padded = np.pad(RAMP[:20], ((1, 1), (1, 1), (0, 0)))
    allowed = [padded[y : y + 20, x : x + 20] for y in range(3) for x in range(3)]
    images = [transform(square, np.random.default_rng(seed))["image"] for seed in range(60)]
    shifts = [[np.array_equal(image, view) for view in allowed].index(True) for image in images]
    assert set(shifts) == set(range(9)) and shifts.count(4) > 20  # 4: not shifted


def test_short_side_is_resized_to_1_125_of_the_size():
    assert resize_short_side(Image.fromarray(RAMP), 18).size == (18, 36)
    with pytest.raises(ValueError, match="data.shift must be 0 or more pixels, got -1"):
        ToPixels("x", 16, 1.0, False, -1)
    assert ToPixels("x", 16, 1.125, False)(record(RAMP))["image"].shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"data.resize must be at least 1.*got 0.5"):
        ToPixels("x", 16, 0.5, False)


def published(image: Image.Image, size: int, resize: float, corner: tuple[int, int] | None) -> np.ndarray:
    """Return the crop of the published loader: torchvision's Resize(LANCZOS) of the full image, then a crop.

    Args:
      image: RGB.
      size: of the crop.
      resize: shorter side over size.
      corner: left and top of a random crop; None for the center.
    """
    short = round(size * resize)
    w, h = image.size
    if w <= h:
        w, h = short, int(short * h / w)
    else:
        w, h = int(short * w / h), short
    resized = image if image.size == (w, h) else image.resize((w, h), Image.Resampling.LANCZOS)
    if corner is None:
        corner = round((w - size) / 2.0), round((h - size) / 2.0)
    x, y = corner
    return np.asarray(resized)[y : y + size, x : x + size]


def test_crops_of_any_size_are_those_of_the_published_loader_to_the_bit():
    rng = np.random.default_rng(0)
    odd = 0
    sizes = rng.integers(1, 120, (150, 2))
    sizes = [(w, h) for w, h in sizes if max(w, h) <= MAX_ASPECT * min(w, h)] + [
        (20, 1),
        (3, 60),
        (500, 375),
        (375, 500),
    ]
    for i, (w, h) in enumerate(sizes):
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        size = int(rng.integers(3, 40))
        resize = (1.0, 1.125, 1.5)[i % 3]
        transform = ToPixels("x", size, resize, False)
        image = Image.fromarray(pixels)
        center = published(image, size, resize, None)
        np.testing.assert_array_equal(transform(record(pixels))["image"], center)
        width, height = resized_size(image.size, round(size * resize))
        odd += (width - size) % 2 + (height - size) % 2
        draws = np.random.default_rng(i)  # of the transform: x, then y
        corner = int(draws.integers(width - size + 1)), int(draws.integers(height - size + 1))
        expected = published(image, size, resize, corner)
        np.testing.assert_array_equal(transform(record(pixels), np.random.default_rng(i))["image"], expected)
    assert odd > 50  # where rounding the center matters


@pytest.mark.parametrize("size", [(60, 1), (1, 60), (200, 3), (3, 200), (1600, 60), (60, 1600), (6, 900)])
@pytest.mark.parametrize("side", [9, 32, 72])
def test_the_crop_of_a_thin_image_is_that_of_the_full_image_resized(size, side):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    resized = resize_short_side(image, side)
    for _ in range(15):  # boxes up to two pixels outside of the image, as with `shift`
        left, top = (int(rng.integers(-2, length - 5 + 3)) for length in resized.size)
        box = (left, top, left + 5, top + 5)
        crop = np.asarray(resize_and_crop(image, side, box)).astype(int)
        assert np.abs(crop - np.asarray(resized.crop(box))).max() <= 1, box


THIN = """
import io, resource, sys
import numpy as np
from PIL import Image
from var_jax.data.transforms import ToPixels
buffer = io.BytesIO()
Image.new("L", (int(sys.argv[1]), int(sys.argv[2])), 77).save(buffer, "PNG")
record = {"image": buffer.getvalue(), "label": 0, "index": 0, "valid": 1}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for rng in (None, np.random.default_rng(0)):
    assert (ToPixels("x", 256, 1.125, False)(record, rng)["image"] == 77).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("size", [("60000", "1"), ("1", "60000")])
def test_a_line_of_60000_pixels_takes_little_memory(size):
    done = subprocess.run([sys.executable, "-c", THIN, *size], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000  # KiB; resizing the full image would take 15 GB


def test_16_bit_transparent_and_rotated_images_are_transformed_correctly():
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    pixels = ToPixels("x", 32, 1.0, False)
    np.testing.assert_array_equal(pixels(record(ramp.astype(np.uint16) * 257))["image"][..., 0], ramp)
    clear = np.dstack([ramp, ramp, ramp, np.zeros_like(ramp)])
    assert (pixels(record(clear))["image"] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = record(ramp, exif=exif)
    np.testing.assert_array_equal(pixels(turned)["image"][..., 0], ramp[::-1, ::-1])
    np.testing.assert_array_equal(pixels({**turned, "exif": False})["image"][..., 0], ramp)


def test_the_pixels_of_the_digits_are_as_stored(digits_dir):
    source = open_source("digits", "test", digits_dir)
    for i in (0, 99, 354):
        stored = np.asarray(Image.open(io.BytesIO(source[i]["image"])).convert("RGB"))
        np.testing.assert_array_equal(ToPixels("digits", 8, 1.0, False)(source[i])["image"], stored)


def test_running_out_of_memory_names_the_record(monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr("var_jax.data.transforms.resize_and_crop", exhausted)
    with pytest.raises(CorruptImage, match="record 5 of data set x holds.*more memory than there is"):
        ToPixels("x", 16, 1.0, False)(record(RAMP))


def test_a_corrupt_image_names_its_record():
    good = record(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for data in (b"not an image", good["image"][:3000]):
        with pytest.raises(CorruptImage, match="record 5 of data set cats/train holds no readable image"):
            ToPixels("cats/train", 16, 1.0, False)({**good, "image": data})
