"""Write a folder of generated images with captions, such as "a red star on blue".

    python -m examples.captioned_shapes captioned --images=10000 --seed=0

There are ten shapes and eight colors; position, size and tilt are random.  Eight pairs of shape and color
(`UNSEEN`) are left out: who has learned what the words mean can draw them all the same.
`captions.jsonl` has the caption of each image, in one of three phrasings.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from examples.coloured_shapes import SHAPES, draw_on, make_class_folders

COLORS = {
    "black": (0.08, 0.08, 0.08),
    "blue": (0.15, 0.25, 0.85),
    "green": (0.10, 0.60, 0.20),
    "orange": (0.98, 0.55, 0.10),
    "purple": (0.55, 0.15, 0.65),
    "red": (0.85, 0.10, 0.12),
    "white": (0.95, 0.95, 0.95),
    "yellow": (0.95, 0.88, 0.15),
}
RADII = (0.65, 0.9)
TILT = 0.3  # maximum rotation in radians
JITTER = 0.05  # maximum difference of a channel to the named color
PHRASINGS = (
    "a {color} {shape} on {background}",
    "{background} background with a {color} {shape}",
    "a {shape} in {color} on a {background} background",
)
# Pairs of shape and color that no image shows.
UNSEEN = frozenset((shape, list(COLORS)[i]) for i, shape in enumerate(list(SHAPES)[: len(COLORS)]))


@dataclasses.dataclass(frozen=True)
class Attributes:
    """Attributes that a caption names: a shape of `SHAPES`, and colors of `COLORS`."""

    shape: str
    color: str
    background: str

    def caption(self, phrasing: int = 0) -> str:
        """Return the caption, in one of `PHRASINGS`."""
        return re.sub(r"\ba (?=[aeiou])", "an ", PHRASINGS[phrasing].format(**dataclasses.asdict(self)))


def random_attributes(rng: np.random.Generator, unseen: bool = False) -> Attributes:
    """Draw attributes whose shape and color are not in `UNSEEN`, or are."""
    while True:
        shape, color, background = rng.choice(list(SHAPES)), *rng.choice(list(COLORS), 2, replace=False)
        if ((shape, color) in UNSEEN) == unseen:
            return Attributes(str(shape), str(color), str(background))


def draw(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Draw an image with attributes, uint8 [64, 64, 3]."""
    vary = lambda name: np.clip(np.array(COLORS[name]) + rng.uniform(-JITTER, JITTER, 3), 0, 1)
    color, background = vary(attributes.color), vary(attributes.background)
    return draw_on(
        attributes.shape, rng, lambda *_: color, lambda *_: background, radii=RADII, angles=(-TILT, TILT)
    )


def write_folder(out: Path, images: int, seed: int = 0) -> None:
    """Write `images` images as out/<shape>/<number>.png, and their captions as out/captions.jsonl.

    Raises:
      FileExistsError: if `out` is not empty.
    """
    make_class_folders(out)
    with open(out / "captions.jsonl", "w") as captions:
        for i in range(images):
            rng = np.random.default_rng((seed, i))
            attributes = random_attributes(rng)
            name = f"{attributes.shape}/{i:05}.png"
            Image.fromarray(draw(attributes, rng)).save(out / name)
            caption = attributes.caption(int(rng.integers(len(PHRASINGS))))
            print(json.dumps(dict(image=name, caption=caption)), file=captions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--images", type=int, default=10000, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    args = parser.parse_args()
    write_folder(args.out, args.images, args.seed)
    print(f"{args.images} images and captions.jsonl in {args.out}")


if __name__ == "__main__":
    main()
