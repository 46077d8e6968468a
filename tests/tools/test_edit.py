import numpy as np
import pytest
from PIL import Image

from var_jax.tools.edit import mask_from_box, mask_from_file
from var_jax.tools.image_files import UnusableImage, center_crop_resize, open_image


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.arange(12 * 8 * 3, dtype=np.uint8).reshape(8, 12, 3)).save(path)
    return path


def test_an_image_of_another_size_is_cropped_and_resized_with_a_notice(picture, capsys):
    image = open_image(str(picture), "RGB")
    assert center_crop_resize(image, 4, "wide.png").size == (4, 4)
    assert "wide.png: 12 x 8, cropped to a square and resized to 4 x 4" in capsys.readouterr().out
    square = image.crop((2, 0, 10, 8))
    np.testing.assert_array_equal(center_crop_resize(image, 8, ""), square)
    assert center_crop_resize(square, 8, "") is square


def test_files_that_are_no_image_are_named(tmp_path, picture):
    with pytest.raises(UnusableImage, match="no such file: .*none.png"):
        open_image(str(tmp_path / "none.png"), "RGB")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UnusableImage, match="text.png is not an image, or is damaged"):
        open_image(str(tmp_path / "text.png"), "RGB")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:-60])
    with pytest.raises(UnusableImage, match="cut.png is not an image, or is damaged"):
        open_image(str(tmp_path / "cut.png"), "RGB")


def test_a_mask_is_cropped_like_its_image(tmp_path, picture):
    pixels = np.zeros((8, 12), np.uint8)
    pixels[:, 6:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    like = open_image(str(picture), "RGB")
    from_file = mask_from_file(str(tmp_path / "mask.png"), like, 4)
    assert from_file.tolist() == [[False, False, True, True]] * 4
    np.testing.assert_array_equal(mask_from_box([6, 0, 12, 8], like, 4), from_file)


def test_a_mask_drawn_over_a_turned_photograph_fits_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored as 12 x 8, displayed as 8 x 12
    Image.new("RGB", (12, 8), "gray").save(tmp_path / "photo.jpg", exif=exif)
    photo = open_image(str(tmp_path / "photo.jpg"), "RGB")
    assert photo.size == (8, 12)
    strokes = np.zeros((12, 8, 4), np.uint8)  # a layer of an editor, transparent except for the strokes
    strokes[2:6, :4] = 255
    Image.fromarray(strokes).save(tmp_path / "mask.png")
    mask = mask_from_file(str(tmp_path / "mask.png"), photo, 8)
    assert mask[:4, :4].all() and mask.sum() == 16


def test_transparent_pixels_are_white_as_in_training_whatever_is_hidden_under_them(tmp_path):
    pixels = np.full((8, 8, 4), (255, 0, 255, 0), np.uint8)
    pixels[2:, :, :] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "emoji.png")
    opened = np.asarray(open_image(str(tmp_path / "emoji.png"), "RGB"))
    assert (opened[:2] == 255).all() and (opened[2:] == (10, 20, 30)).all()


def test_a_thin_mask_survives_the_way_to_a_smaller_model(tmp_path):
    """Mask a line one pixel wide in a picture fifty times as large as the model's images."""
    Image.fromarray(np.zeros((400, 600, 3), np.uint8)).save(tmp_path / "large.png")
    like = open_image(str(tmp_path / "large.png"), "RGB")
    pixels = np.zeros((400, 600), np.uint8)
    pixels[123, 110:490] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    want = np.zeros((8, 8), bool)
    want[2, :8] = True
    np.testing.assert_array_equal(mask_from_file(str(tmp_path / "mask.png"), like, 8), want)
    np.testing.assert_array_equal(mask_from_box([110, 123, 490, 124], like, 8), want)


def test_masks_that_do_not_fit_are_refused(tmp_path, picture):
    like = open_image(str(picture), "RGB")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UnusableImage, match="mask.png is 8 x 8, but the image is 12 x 8"):
        mask_from_file(str(tmp_path / "mask.png"), like, 4)
    Image.fromarray(np.zeros((8, 12), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UnusableImage, match="black in the whole center crop"):
        mask_from_file(str(tmp_path / "mask.png"), like, 4)
    for box in ([0, 0, 13, 8], [4, 0, 4, 8], [0, 0, 4], [-1, 0, 4, 8]):
        with pytest.raises(UnusableImage, match="must be left,top,right,bottom inside the image, 12 x 8"):
            mask_from_box(box, like, 4)
    with pytest.raises(UnusableImage, match="outside the center crop"):
        mask_from_box([0, 0, 2, 8], like, 4)
