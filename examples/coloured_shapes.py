"""Write a folder of generated images: colored, textured shapes with structure at every scale.

    python -m examples.coloured_shapes pictures --images=4000 --seed=0

There are ten classes.  Position, size, rotation, colors and textures of shape and background are random.  Two
thirds are JPEG files, one third PNG; some are not 64x64, are gray or have alpha.  Four more files are broken.
"""

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
OVERSAMPLING = 3  # images are drawn larger by this factor and averaged, for smooth edges


def _polygon(x, y, corners: int):
    """Compute the signed function of a regular polygon with corners on the unit circle."""
    sector = 2 * np.pi / corners
    angle = np.arctan2(y, x) % sector - sector / 2
    return np.hypot(x, y) * np.cos(angle) - np.cos(sector / 2)


def _star(x, y, points: int = 5, inner: float = 0.45):
    """Compute the signed function of a star: points on the unit circle, corners between them at `inner`."""
    half = np.pi / points
    angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)
    edge = inner * np.sin(half) * np.cos(angle) + (1 - inner * np.cos(half)) * np.sin(angle)
    return np.hypot(x, y) * edge - inner * np.sin(half)


# Functions of coordinates in units of the shape's radius, y down, negative inside the shape.
SHAPES = {
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y)),
    "cross": lambda x, y: np.where(np.minimum(abs(x), abs(y)) < 0.3, np.maximum(abs(x), abs(y)) - 0.95, 1),
    "diamond": lambda x, y: abs(x) / 0.6 + abs(y) - 1,
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "heart": lambda x, y: (2.1 * (x**2 + y**2) - 1) ** 3 + 5.5 * x**2 * y**3,
    "hexagon": lambda x, y: _polygon(x, y, 6),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.22,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.7,
    "star": lambda x, y: _star(-y, x),
    "triangle": lambda x, y: _polygon(-y, x, 3),
}


def _noise(rng, x, y):
    """Generate smooth noise by upsampling a few random values."""
    coarse = Image.fromarray(rng.random((rng.integers(3, 9),) * 2, np.float32))
    return np.asarray(coarse.resize(x.shape[::-1], Image.Resampling.BICUBIC))


# Functions of coordinates in periods: share of the second color, before clipping to [0, 1].
TEXTURES = {
    "plain": lambda rng, x, y: np.zeros_like(x),
    "stripes": lambda rng, x, y: 0.5 + 1.5 * np.sin(2 * np.pi * x),
    "checks": lambda rng, x, y: 0.5 + 4 * np.sin(np.pi * x) * np.sin(np.pi * y),
    "dots": lambda rng, x, y: 5 * (0.35 - np.hypot(x % 1 - 0.5, y % 1 - 0.5)),
    "gradient": lambda rng, x, y: 0.5 + (x - x.mean()) / np.ptp(x),
    "noise": _noise,
}


def textured(rng, x, y, colors):
    """Paint a random texture of two colors [2, 3] over coordinates in [-1, 1]: [H, W, 3]."""
    angle, periods = rng.uniform(0, np.pi), rng.uniform(2, 5)
    u = periods * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()
    v = periods * (y * np.cos(angle) - x * np.sin(angle)) + rng.random()
    share = np.clip(TEXTURES[rng.choice(list(TEXTURES))](rng, u, v), 0, 1)[..., None]
    return (1 - share) * colors[0] + share * colors[1]


def _random_colors(rng):
    """Choose two colors each for shape and background, [2, 2, 3], whose first ones differ in luma."""
    while True:
        base = rng.random((2, 3))
        if abs((base[0] - base[1]) @ (0.3, 0.59, 0.11)) > 0.3:
            second = base + rng.uniform(-0.35, 0.35, (2, 3))
            return np.clip(np.stack([base, second], axis=1), 0, 1).astype(np.float32)


def draw(shape: str, rng: np.random.Generator, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """Draw an image of a shape of `SHAPES` in random colors and textures, uint8 [height, width, 3]."""
    inner, outer = _random_colors(rng)
    return draw_on(
        shape, rng, partial(textured, colors=inner), partial(textured, colors=outer), width, height
    )


def draw_on(
    shape: str,
    rng: np.random.Generator,
    paint_shape: Callable,
    paint_background: Callable,
    width: int = SIDE,
    height: int = SIDE,
    radii: tuple[float, float] = (0.4, 0.8),
    angles: tuple[float, float] = (0, 2 * np.pi),
) -> np.ndarray:
    """Draw an image of a shape of `SHAPES` that lies within its borders, uint8 [height, width, 3].

    Args:
      shape: name of the shape.
      rng: of position, size and rotation.
      paint_shape, paint_background: functions (rng, x, y) -> colors [H, W, 3] or [3]; coordinates in [-1, 1].
      width, height: in pixels.
      radii: least and greatest radius of the shape, relative to half the shorter side.
      angles: least and greatest rotation, in radians.
    """
    n, short = OVERSAMPLING, min(width, height)
    axis = lambda size: ((np.arange(size * n, dtype=np.float32) + 0.5) / n * 2 - size) / short
    x, y = np.meshgrid(axis(width), axis(height))
    radius, angle = rng.uniform(*radii), rng.uniform(*angles)
    dx = x - rng.uniform(-1, 1) * (width / short - radius)
    dy = y - rng.uniform(-1, 1) * (height / short - radius)
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    inside = (SHAPES[shape](u / radius, v / radius) < 0)[..., None]
    image = np.where(inside, paint_shape(rng, x, y), paint_background(rng, x, y))
    image = image.reshape(height, n, width, n, 3).mean((1, 3))
    return (image * 255 + 0.5).astype(np.uint8)


def encode_image(i: int, seed: int = 0) -> tuple[str, str, bytes]:
    """Encode image i of a seed; return its shape, the suffix of its file, and its bytes."""
    rng = np.random.default_rng((seed, i))
    shape = list(SHAPES)[i % len(SHAPES)]
    suffix = rng.choice(["jpg", "jpg", "png"])
    size = rng.choice([(96, 64), (64, 96), (80, 80)]) if rng.random() < 0.1 else (SIDE, SIDE)
    mode = rng.choice(["L", "RGBA" if suffix == "png" else "L"]) if rng.random() < 0.06 else "RGB"
    buffer = io.BytesIO()
    image = Image.fromarray(draw(shape, rng, *size)).convert(mode)
    image.save(buffer, "PNG" if suffix == "png" else "JPEG", quality=90)
    return shape, suffix, buffer.getvalue()


def make_class_folders(out: Path) -> None:
    """Make a folder with a folder for each shape.

    Raises:
      FileExistsError: if `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: give a new folder")
    for shape in SHAPES:
        (out / shape).mkdir(parents=True)


def write_folder(out: Path, images: int, seed: int = 0) -> list[Path]:
    """Write `images` images as out/<shape>/<number>.<jpg or png>, and four broken files.

    Returns:
      Paths of the broken files: an empty file, a truncated JPEG, a truncated PNG, and a text file named .png.

    Raises:
      FileExistsError: if `out` is not empty.
    """
    make_class_folders(out)
    halves = {"jpg": b"", "png": b""}
    for i in range(images):
        shape, suffix, data = encode_image(i, seed)
        (out / shape / f"{i:05}.{suffix}").write_bytes(data)
        halves[suffix] = data[: len(data) // 2]
    broken = {"disc/empty.jpg": b"", "star/text.png": b"This is no image.\n"}
    broken |= {"heart/half.jpg": halves["jpg"], "ring/half.png": halves["png"]}
    for name, data in broken.items():
        (out / name).write_bytes(data)
    return [out / name for name in broken]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--images", type=int, default=4000, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    args = parser.parse_args()
    broken = write_folder(args.out, args.images, args.seed)
    print(f"{args.images} images in {args.out}; broken on purpose: {', '.join(map(str, broken))}")


if __name__ == "__main__":
    main()
