import io

import numpy as np
import pytest
from PIL import Image

from var_jax.data.transforms import CorruptImage, ToPixels, decode, resize_short_side


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
    again = transform(record(RAMP), np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(again, crops[0])


def test_flip_mirrors_about_half_in_random_mode_only():
    transform = ToPixels("x/train", 20, 1.0, True)
    square = record(RAMP[:20])
    np.testing.assert_array_equal(transform(square)["image"], RAMP[:20])
    flipped = [
        np.array_equal(transform(square, np.random.default_rng(s))["image"], RAMP[:20, ::-1])
        for s in range(60)
    ]
    assert 15 < sum(flipped) < 45


def test_shift_moves_about_half_by_at_most_so_many_pixels_in_random_mode_only():
    transform, square = ToPixels("x", 20, 1.0, False, shift=1), record(RAMP[:20])
    np.testing.assert_array_equal(transform(square)["image"], RAMP[:20])
    padded = np.pad(RAMP[:20], ((1, 1), (1, 1), (0, 0)))
    allowed = [padded[y : y + 20, x : x + 20] for y in range(3) for x in range(3)]
    found = [transform(square, np.random.default_rng(seed))["image"] for seed in range(60)]
    which = [[np.array_equal(image, view) for view in allowed].index(True) for image in found]
    assert set(which) == set(range(9)) and which.count(4) > 20  # 4: not moved


def test_short_side_is_resized_to_1_125_of_the_size():
    assert resize_short_side(Image.fromarray(RAMP), 18).size == (18, 36)
    with pytest.raises(ValueError, match="data.shift must be 0 or more pixels, found -1"):
        ToPixels("x", 16, 1.0, False, -1)
    assert ToPixels("x", 16, 1.125, False)(record(RAMP))["image"].shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"data.resize must be at least 1.*found 0.5"):
        ToPixels("x", 16, 0.5, False)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
def test_formats_and_modes_become_rgb(form):
    grey = record(np.full((16, 16), 200, np.uint8), form)
    assert decode(grey["image"]).mode == "RGB"
    assert abs(int(np.asarray(decode(grey["image"])).mean()) - 200) <= 2


def test_a_corrupt_image_names_its_record():
    good = record(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for data in (b"not an image", good["image"][:3000]):
        with pytest.raises(CorruptImage, match="record 5 of data set cats/train holds no readable image"):
            ToPixels("cats/train", 16, 1.0, False)({**good, "image": data})
