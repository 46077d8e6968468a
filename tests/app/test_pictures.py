"""HTML and SVG of the page."""

import base64
import io
import re

import numpy as np
from PIL import Image

from var_jax.app import pictures
from var_jax.scales import Scales

SCALES = Scales((1, 2, 4))


def test_an_image_survives_its_data_url():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = base64.b64decode(pictures.png_url(image).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)


def test_tiles_escape_their_captions_and_number_what_can_be_clicked():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    html = pictures.tiles(images, ["<b>", '"cat"'], [0, 1], chosen=1)
    assert "<b>" not in html and "&lt;b&gt;" in html and 'alt="&quot;cat&quot;"' in html
    assert html.count("<button") == 2 and 'data-index="1" aria-pressed="true"' in html
    assert "<button" not in pictures.tiles(images, ["a", "b"])


def test_similar_codes_have_similar_colors():
    codebook = np.zeros((5, 4), np.float32)
    codebook[:, 0] = 0, 8, 2, 6, 4  # on a line
    colors = pictures.code_colors(codebook)
    red = [int(color[1:3], 16) for color in colors]
    assert sorted(red) == [40, 90, 140, 190, 240]
    assert np.abs(np.diff(np.array(red)[[0, 2, 4, 3, 1]])).tolist() == [50] * 4
    assert len(set(pictures.code_colors(codebook[:, :1]))) == 5  # fewer dimensions than channels


def test_every_position_is_a_cell_that_names_its_code():
    tokens = np.arange(21)
    html = pictures.token_maps(tokens, SCALES, [f"#{i:06x}" for i in range(21)], chosen=7)
    assert re.findall(r'data-index="(\d+)"', html) == [str(i) for i in range(21)]
    assert html.count('class="chosen"') == 1 and html.count("<svg") == 3
    assert "map 3, row 1, column 3: code 7" in html


def test_cells_that_a_position_does_not_see_are_gray():
    weights = np.zeros(21, np.float32)
    weights[:5] = 0.1, 0.2, 0.3, 0.4, 0
    html = pictures.attention_maps(weights, SCALES, 2)
    assert html.count(f'fill="{pictures.UNSEEN}"') == 16 and html.count("not seen") == 16
    assert 'fill="#fde724" data-index="3"' in html  # the brightest of viridis, at the largest weight


def test_codebook_use_counts_the_codes():
    html = pictures.codebook_use(np.array([3, 3, 5, 1]), 8, ["#000000"] * 8)
    assert "4 tokens, 3 of 8 codes. Most often: code 3 2 times, code 1 1 times" in html
    assert html.count("<rect") == 3


def test_additions_are_differences_around_gray():
    steps = np.array([10, 30, 20], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    np.testing.assert_array_equal(pictures.additions(steps)[:, 0, 0, 0], [10, 255, 63])
