"""The pictures of `examples/captioned_shapes.py` show what their captions say."""

import json

import numpy as np
from PIL import Image

from examples import captioned_shapes
from examples.captioned_shapes import COLORS, UNSEEN, Attributes, draw, random_attributes


def test_captions_name_what_is_drawn_and_no_image_shows_an_unseen_pair(tmp_path):
    captioned_shapes.write_folder(tmp_path / "pictures", images=40, seed=3)
    lines = [json.loads(line) for line in (tmp_path / "pictures/captions.jsonl").read_text().splitlines()]
    assert len(lines) == 40 == len({line["image"] for line in lines})
    for line in lines:
        shape, words = line["image"].split("/")[0], line["caption"].split()
        colors = [word for word in words if word in COLORS]
        assert shape in words and len(colors) == 2
        background = colors[0] if words[1] == "background" else colors[1]
        corners = np.asarray(Image.open(tmp_path / "pictures" / line["image"]))[
            [0, 0, -1, -1], [0, -1, 0, -1]
        ]
        distances = {
            name: abs(np.median(corners, axis=0) / 255 - color).max() for name, color in COLORS.items()
        }
        assert min(distances, key=distances.get) == background
        color = colors[1] if words[1] == "background" else colors[0]
        assert (shape, color) not in UNSEEN


def test_unseen_pairs_can_be_asked_for():
    rng = np.random.default_rng(0)
    pairs = {
        (drawn.shape, drawn.color) for drawn in (random_attributes(rng, unseen=True) for _ in range(100))
    }
    assert pairs <= UNSEEN and len(pairs) > 4
    seen = {(drawn.shape, drawn.color) for drawn in (random_attributes(rng) for _ in range(500))}
    assert not seen & UNSEEN and len(seen) > 70


def test_an_image_has_the_colors_of_its_attributes():
    attributes = Attributes("disc", "orange", "blue")
    assert attributes.caption() == "an orange disc on blue"
    image = draw(attributes, np.random.default_rng(1)) / 255
    near = lambda name: (abs(image - COLORS[name]).max(axis=-1) < 0.06).mean()
    assert near("orange") > 0.05 and near("blue") > 0.3 and near("orange") + near("blue") > 0.9
