"""Recognize the attributes of captioned shapes in images: shape, color and background.

The background is the median of the border, and the color that of the pixels that differ from it.  The shape
is read from descriptors that depend little on position, size and rotation, by a perceptron that is fitted to
drawn images.
"""

import numpy as np

from examples.captioned_shapes import COLORS, Attributes, draw, random_attributes

ATTRIBUTES = ("shape", "color", "background")
RINGS, ANGLES, FREQUENCIES = 10, 32, 12  # of the polar grid
REACH = 2.2  # radius of the grid, in units of the root mean square radius of the shape
CONTRAST = 0.15  # difference to the background, in a channel, of a pixel that is half in the shape


def drawn_examples(count: int, side: int, seed: int) -> tuple[np.ndarray, list[Attributes]]:
    """Draw images uint8 [count, side, side, 3] of random attributes, every second with a pair of `UNSEEN`."""
    from PIL import Image

    images, attributes = [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        attributes.append(random_attributes(rng, unseen=i % 2 == 1))
        image = Image.fromarray(draw(attributes[-1], rng))
        images.append(np.asarray(image.resize((side, side), Image.Resampling.LANCZOS)))
    return np.stack(images), attributes


def background_colors(images: np.ndarray) -> np.ndarray:
    """Return the median of the border of images [N, H, W, 3], [N, 3]."""
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    return np.median(border, axis=1)


def shape_masks(images: np.ndarray) -> np.ndarray:
    """Compute how much of each pixel of images float [N, H, W, 3] in [0, 1] is in the shape, [N, H, W]."""
    difference = abs(images - background_colors(images)[:, None, None]).max(axis=-1)
    return np.clip(difference / CONTRAST - 0.5, 0, 1)


def shape_colors(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the median color [N, 3] of the pixels of images [N, H, W, 3] that are in the shape."""
    inside = [image[mask == 1] for image, mask in zip(images, masks, strict=True)]
    return np.array([np.median(pixels, axis=0) if len(pixels) else np.full(3, np.nan) for pixels in inside])


def describe(masks: np.ndarray) -> np.ndarray:
    """Compute descriptors float32 [N, F] of shapes from their masks [N, H, W].

    A descriptor has magnitudes of the mask's Fourier transform over the angle, on rings around its center.
    """
    from scipy.ndimage import map_coordinates

    angles = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
    radii = (np.arange(RINGS) + 0.5) / RINGS * REACH
    grid = radii[:, None] * np.stack([np.sin(angles), np.cos(angles)])[:, None]
    places = np.indices(masks.shape[1:])
    descriptors = []
    for mask in masks:
        weight = max(mask.sum(), 1e-6)
        center = (places * mask).sum((1, 2)) / weight
        spread = np.sqrt((((places - center[:, None, None]) ** 2).sum(0) * mask).sum() / weight)
        rings = map_coordinates(mask, center[:, None, None] + spread * grid, order=1)
        spectra = abs(np.fft.rfft(rings, axis=-1))[..., :FREQUENCIES] / ANGLES
        descriptors.append(spectra.ravel())
    return np.asarray(descriptors, np.float32)


def color_names(colors: np.ndarray) -> list[str]:
    """Return the name of the nearest of `COLORS` to each of colors [N, 3]; of no color (NaN), none."""
    distances = abs(colors[:, None] - np.array(list(COLORS.values()))).max(-1)
    return ["" if np.isnan(row[0]) else list(COLORS)[row.argmin()] for row in distances]


class AttributeJudge:
    """Reads the attributes of images of a side; its classifier of shapes is fitted to drawn images.

    Args:
      side: of the images in pixels.
      count: number of drawn images.
    """

    def __init__(self, side: int, count: int = 4000):
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        images, attributes = drawn_examples(count, side, seed=1_000_000)
        network = MLPClassifier((128,), alpha=1e-2, max_iter=200, early_stopping=True, random_state=0)
        self._classifier = make_pipeline(StandardScaler(), network)
        self._classifier.fit(describe(shape_masks(images / 255)), [a.shape for a in attributes])

    def attributes(self, images: np.ndarray) -> list[Attributes]:
        """Recognize the attributes of images uint8 [N, H, W, 3]."""
        images = images / 255
        masks = shape_masks(images)
        shapes = map(str, self._classifier.predict(describe(masks)))
        colors = color_names(shape_colors(images, masks))
        return list(map(Attributes, shapes, colors, color_names(background_colors(images))))

    def shares(self, images: np.ndarray, asked: list[Attributes]) -> dict[str, float]:
        """Compute the share of images that show what was asked for: of each attribute, and of `all`."""
        pairs = list(zip(asked, self.attributes(images), strict=True))
        right = {name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in ATTRIBUTES}
        right["all"] = [a == b for a, b in pairs]
        return {name: float(np.mean(values)) for name, values in right.items()}
