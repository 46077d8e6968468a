"""Images and masks of visitors, decoded or refused with a sentence."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from var_jax.app.uploads import MASK_URL, image_from_upload, mask_from_painting
from var_jax.tools.image_files import UnusableImage


def encoded(pixels: np.ndarray, kind: str = "PNG", **more) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **more)
    return content.getvalue()


def huge_png() -> bytes:
    """Return the start of a PNG that says it has 49 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 7000, 7000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


def test_transparency_becomes_white_and_the_middle_is_kept():
    pixels = np.zeros((8, 24, 4), np.uint8)
    pixels[:, :12] = 200, 0, 0, 255
    expected = np.full((8, 8, 3), 255)
    expected[:, :4] = 200, 0, 0
    np.testing.assert_array_equal(image_from_upload(encoded(pixels), 8, 10**6), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats_and_exif_orientation(kind):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    result = image_from_upload(encoded(pixels, kind, exif=exif), 8, 10**6).astype(int)
    assert result[1].mean() < 20 and result[6].mean() > 235


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be used: empty. Choose a PNG, JPEG or WebP image"),
        (b"text", "not an image of a known kind"),
        (encoded(np.zeros((8, 8, 3), np.uint8), "GIF"), "not an image of a known kind"),
        (encoded(np.eye(80, dtype=np.uint8))[:-60], "cannot be used"),
        (huge_png(), "7000 x 7000, more than 40,000,000 pixels"),
        (bytes(1_000_001), r"has 1.0 MB; the limit is 1 MB"),
    ],
)
def test_files_that_cannot_be_used_are_refused(data, message):
    with pytest.raises(UnusableImage, match=message):
        image_from_upload(data, 8, 10**6)


def test_a_painted_mask_is_decoded():
    painting = np.zeros((8, 8, 4), np.uint8)
    painting[2:5, 1] = 255, 200, 0, 255
    mask = mask_from_painting(MASK_URL + base64.b64encode(encoded(painting)).decode(), 8)
    np.testing.assert_array_equal(mask, painting[..., 3] > 0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "Nothing is painted"),
        ("file:///etc/passwd", "must be a PNG of 8 x 8 pixels as a data URL"),
        (MASK_URL + "A" * 10_000, "must be a PNG of 8 x 8 pixels as a data URL"),
        (MASK_URL + "%", "The mask cannot be read"),
        (MASK_URL + base64.b64encode(b"text").decode(), "The mask cannot be read: not an image"),
        (
            MASK_URL + base64.b64encode(encoded(np.zeros((4, 8, 4), np.uint8))).decode(),
            "8 x 4, but must be 8 x 8",
        ),
    ],
)
def test_masks_that_the_painter_does_not_make_are_refused(url, message):
    with pytest.raises(UnusableImage, match=message):
        mask_from_painting(url, 8)
