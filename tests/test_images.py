import numpy as np
import pytest

from var_jax.images import denormalize_to_uint8, image_grid, image_strips, save_png, side_by_side, to_uint8


def test_grid_puts_images_row_by_row_and_enlarges_small_ones():
    images = np.zeros((3, 8, 8, 3))
    images[1, ..., 0] = 1
    pixels = np.asarray(image_grid(images, columns=2))
    assert pixels.shape == (2 * 50 + 2, 2 * 50 + 2, 3)  # 8 pixels enlarged six times, gaps of 2
    assert pixels[10, 10].tolist() == [0, 0, 0] and pixels[10, 60].tolist() == [255, 0, 0]
    assert pixels[60, 60].tolist() == [255, 255, 255]  # no fourth image


def test_labels_are_left_of_rows_and_above_columns_and_leave_the_grid_as_it_is():
    images = np.random.default_rng(0).random((4, 8, 8, 3))
    plain = np.asarray(image_grid(images, columns=2))
    pixels = np.asarray(image_grid(images, 2, row_labels=["first", "second"], column_labels=["a", "b"]))
    height, width = plain.shape[:2]
    np.testing.assert_array_equal(pixels[-height:, -width:], plain)
    left, top = pixels[-height:, :-width], pixels[:-height, -width:]
    for label in (left[:52], left[52:], top[:, :52], top[:, 52:]):  # rows and columns take 50 pixels
        assert (label < 128).any()


def test_rounding_is_to_the_nearest_on_the_device_as_on_the_host():
    """The published demonstration truncates: half a gray level darker on average."""
    assert to_uint8(np.array([0, 0.5, 1, 2])).tolist() == [0, 128, 255, 255]
    images = np.linspace(-1, 1, 10001, dtype=np.float32)
    pixels = np.asarray(denormalize_to_uint8(images)).astype(float)
    exact = (images.astype(np.float64) / 2 + 0.5) * 255
    assert np.abs(pixels - exact).max() <= 0.5001 and abs((pixels - exact).mean()) < 1e-3
    np.testing.assert_array_equal(pixels, to_uint8(images / 2 + 0.5))


def test_pairs_and_strips():
    left, right = np.zeros((2, 64, 64, 3)), np.ones((2, 64, 64, 3))
    pixels = np.asarray(side_by_side(left, right, pairs_per_row=1))
    assert pixels[5, 5, 0] == 0 and pixels[5, 75, 0] == 255 and pixels.shape[0] == 2 * 66 + 2
    steps = np.linspace(0, 1, 6).reshape(2, 3, 1, 1, 1) * np.ones((2, 3, 64, 64, 3))
    pixels = np.asarray(image_strips(steps))
    assert pixels[70, 5, 0] == round(0.6 * 255) and pixels.shape[1] == 3 * 66 + 2


def test_saved_whole_or_not_at_all(tmp_path):
    path = save_png(image_grid(np.zeros((1, 8, 8, 3)), 1), tmp_path / "new" / "x.png")
    assert path.exists() and [p.name for p in path.parent.iterdir()] == ["x.png"]
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(np.zeros((0, 8, 8, 3)), 1)
