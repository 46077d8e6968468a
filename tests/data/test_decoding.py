import io
import warnings

import numpy as np
import pytest
from PIL import Image, features

from var_jax.data import decoding
from var_jax.data.decoding import BLACK, DecodeError, decode_image

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
RAMP_16 = RAMP.astype(np.uint16) * 257


def encoded(image: np.ndarray | Image.Image, form: str, **save) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, form, **save)
    return buffer.getvalue()


def decoded(data: bytes, **options) -> np.ndarray:
    """Decode to int [H, W, 3]; a warning of Pillow is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def big_endian(values: np.ndarray) -> bytes:
    image = Image.new("I;16B", values.shape[::-1])
    image.frombytes(values.astype(">u2").tobytes())
    return encoded(image, "TIFF")


def white_is_zero(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(65535 - values), "TIFF", tiffinfo={262: 0})


DEEP = {
    "png, 16 bits": encoded(RAMP_16, "PNG"),
    "tiff, 16 bits": encoded(RAMP_16, "TIFF"),
    "tiff, 16 bits, big-endian": big_endian(RAMP_16),
    "tiff, 16 bits, white is zero": white_is_zero(RAMP_16),
    "pgm, 16 bits": b"P5 256 4 65535\n" + RAMP_16.astype(">u2").tobytes(),
    "pgm, 12 bits": b"P5 256 4 4095\n" + (RAMP.astype(np.uint16) * 16 + RAMP // 16).astype(">u2").tobytes(),
    "tiff, floats": encoded(RAMP.astype(np.float32) / 255, "TIFF"),
    "png, 8 bits": encoded(RAMP, "PNG"),
    "png, 8 bits and alpha": encoded(Image.fromarray(RAMP).convert("LA"), "PNG"),
    "gif": encoded(RAMP, "GIF"),
    "bmp": encoded(RAMP, "BMP"),
    "webp, lossless": encoded(RAMP, "WEBP", lossless=True),
    "tiff, lzw": encoded(RAMP, "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_ramp_of_any_depth_is_the_ramp_of_8_bits(kind):
    np.testing.assert_array_equal(decoded(DEEP[kind]), np.repeat(RAMP[..., None], 3, -1))


@pytest.mark.parametrize("form", ["JPEG", "AVIF", "progressive", "CMYK", "CMYK TIFF"])
def test_lossy_and_printed_colors_come_out_as_they_went_in(form):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    wave = 128 + 100 * np.sin(np.arange(64) / 9)
    pixels = np.stack(np.broadcast_arrays(wave, wave[::-1], wave[:, None]), -1).astype(np.uint8)
    image = Image.fromarray(pixels)
    if form.startswith("CMYK"):
        data = encoded(image.convert("CMYK"), "TIFF" if "TIFF" in form else "JPEG")
        assert ("TIFF" in form) or b"Adobe" in data  # inverted, as Photoshop writes it
    else:
        data = encoded(
            image, form.replace("progressive", "JPEG"), progressive=form == "progressive", quality=95
        )
    assert np.abs(decoded(data) - pixels).max() < 24 and np.abs(decoded(data) - pixels).mean() < 3


def test_bilevel_images_are_black_and_white():
    bits = np.eye(9, dtype=bool)
    np.testing.assert_array_equal(
        decoded(encoded(Image.fromarray(bits), "PNG")), np.repeat(bits[..., None] * 255, 3, -1)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 3.5]], np.float32), "float pixels from 0 to 3.5: only 0 to 1 is taken"),
        (np.array([[-1, 1]], np.float32), "float pixels from -1 to 1"),
        (np.array([[0, np.nan]], np.float32), "float pixels from nan to nan"),
        (np.array([[0, 70000]], np.int32), "integer pixels whose white is not defined"),
    ],
)
def test_pixels_without_a_defined_white_are_rejected(values, message):
    with pytest.raises(DecodeError, match=message):
        decode_image(encoded(values, "TIFF"))


def emoji() -> np.ndarray:
    """Return RGBA [3, 6, 4] with hidden colors: transparent left, half transparent middle, opaque right."""
    pixels = np.zeros((3, 6, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (255, 0, 255), np.repeat([0, 128, 255], 2)
    pixels[:, 4:, :3] = (10, 20, 30)
    return pixels


def palette_with_alpha() -> bytes:
    """Encode the same image as a palette PNG with an alpha table, a common format of emoji."""
    image = Image.fromarray(np.tile(np.repeat(np.arange(3, dtype=np.uint8), 2), (3, 1)), "L")
    image.putpalette([255, 0, 255, 255, 0, 255, 10, 20, 30])
    return encoded(image, "PNG", transparency=bytes([0, 128, 255]))


@pytest.mark.parametrize("kind", ["RGBA", "palette", "WEBP"])
def test_hidden_colors_are_invisible_and_alpha_blends_with_the_background(kind):
    data = (
        palette_with_alpha()
        if kind == "palette"
        else encoded(emoji(), kind.replace("RGBA", "PNG"), lossless=True)
    )
    if kind == "palette":
        assert Image.open(io.BytesIO(data)).mode == "P" and b"tRNS" in data
    for options, background in (({}, 255), ({"background": BLACK}, 0)):
        pixels = decoded(data, **options)
        assert (pixels[:, :2] == background).all() and (pixels[:, 4:] == (10, 20, 30)).all()
        assert np.abs(pixels[:, 2:4] - (np.array((255, 0, 255)) * 128 + background * 127) / 255).max() <= 1


@pytest.mark.parametrize("form", ["grey", "grey, 16 bits", "rgb", "gif"])
def test_a_color_that_means_transparent_becomes_the_background(form):
    image = {
        "grey": lambda: encoded(RAMP[:, :8], "PNG", transparency=5),
        "grey, 16 bits": lambda: encoded(RAMP_16[:, :8], "PNG", transparency=5 * 257),
        "rgb": lambda: encoded(np.repeat(RAMP[:, :8, None], 3, -1), "PNG", transparency=(5, 5, 5)),
        "gif": lambda: encoded(RAMP[:, :8], "GIF", transparency=5),
    }[form]()
    assert decoded(image)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 255, 6, 7]


def test_opaque_alpha_changes_no_pixel():
    colors = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    colors[..., 3] = 255
    np.testing.assert_array_equal(decoded(encoded(colors, "PNG")), colors[..., :3])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_upright(form):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8], upright[:8, 8:] = 80, 160  # no two of the eight positions are alike
    # The stored image of each orientation: the upright image as a rotated camera stores it.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        save = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(form, {})
        data = encoded(np.ascontiguousarray(pixels), form, exif=exif, **save)
        turned = decoded(data)
        assert turned.shape == (16, 24, 3), orientation
        assert np.abs(turned[..., 0] - upright).max() <= 4, orientation
        if form != "TIFF":  # Pillow applies the orientation of TIFF itself
            assert np.abs(decoded(data, exif=False)[..., 0] - pixels).max() <= 4, orientation


def test_an_image_with_damaged_exif_is_decoded():
    data = encoded(RAMP, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(np.asarray(decode_image(data))[..., 0], RAMP)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(form):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decoded(data) - (250, 0, 0)).max() <= 4


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "not an image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image of a known kind"),
        (HEIC, "a HEIC image: convert it to JPEG or PNG"),
        (encoded(RAMP, "PNG")[:-40], "truncated|broken|cut"),
        (encoded(RAMP, "JPEG")[:-40], "truncated"),
        (encoded(Image.new("1", (40000, 5000)), "PNG"), "more than 89,478,485 pixels"),  # a bomb to Pillow
        (encoded(Image.new("1", (12000, 8000)), "PNG"), "more than 89,478,485 pixels"),  # a warning to it
    ],
    ids=["empty", "text", "eps", "heic", "png", "jpeg", "bomb", "large"],
)
def test_errors_say_why_an_image_cannot_be_decoded(data, message):
    # pytest resets the filter that importing `decoding` has set.
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    with pytest.raises(DecodeError, match=message):
        decode_image(data)


def test_a_format_that_this_pillow_lacks_is_named(monkeypatch):
    data = encoded(RAMP, "WEBP")
    monkeypatch.setattr(decoding, "FORMATS", ("JPEG", "PNG"))
    with pytest.raises(DecodeError, match="WEBP, which this build of Pillow cannot decode"):
        decode_image(data)


def test_damaged_files_end_in_one_kind_of_error():
    rng = np.random.default_rng(0)
    outcomes = {"decoded": 0, "rejected": 0}
    files = [
        *DEEP.values(),
        palette_with_alpha(),
        encoded(RAMP, "JPEG"),
        encoded(np.repeat(RAMP[..., None], 3, -1), "AVIF"),
    ]
    for i in range(1500):
        data = bytearray(files[i % len(files)])
        if i % 2:
            data[rng.integers(len(data))] = rng.integers(256)
        else:
            del data[rng.integers(len(data)) :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                decode_image(bytes(data))
            outcomes["decoded"] += 1
        except DecodeError:
            outcomes["rejected"] += 1
    assert min(outcomes.values()) > 200, outcomes
