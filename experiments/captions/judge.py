"""Recognize the attributes of captioned shapes in images: shape, color, texture and background.

The background is the median of the border, which no shape touches.  The others are read from descriptors that
depend little on position, size and rotation, by perceptrons that are fitted to drawn images.
"""

import numpy as np

from examples.captioned_shapes import COLORS, Attributes, draw, random_attributes, shade

ATTRIBUTES = ("shape", "color", "texture", "background")
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


def describe(images: np.ndarray) -> np.ndarray:
    """Compute descriptors float32 [N, F] of the shapes in images float [N, H, W, 3] in [0, 1].

    A descriptor has the magnitudes of the Fourier transform over the angle, on rings around the center, of
    the shape's mask and of its luma; and the share of its pixels nearest to each color and second color.
    """
    from scipy.ndimage import map_coordinates

    difference = abs(images - background_colors(images)[:, None, None]).max(axis=-1)
    masks = np.clip(difference / CONTRAST - 0.5, 0, 1)
    palette = np.array([color for name in COLORS for color in (COLORS[name], shade(COLORS[name]))])
    nearest = ((images[..., None, :] - palette) ** 2).sum(-1).argmin(-1)
    angles = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
    radii = (np.arange(RINGS) + 0.5) / RINGS * REACH
    grid = radii[:, None] * np.stack([np.sin(angles), np.cos(angles)])[:, None]
    descriptors = []
    for image, mask, codes in zip(images, masks, nearest, strict=True):
        weight = max(mask.sum(), 1e-6)
        places = np.indices(mask.shape)
        center = (places * mask).sum((1, 2)) / weight
        spread = np.sqrt((((places - center[:, None, None]) ** 2).sum(0) * mask).sum() / weight)
        coords = center[:, None, None] + spread * grid
        layers = [mask, mask * (image @ (0.3, 0.59, 0.11))]
        rings = [map_coordinates(layer, coords, order=1) for layer in layers]
        spectra = abs(np.fft.rfft(rings, axis=-1))[..., :FREQUENCIES] / ANGLES
        shares = np.bincount(codes.ravel(), mask.ravel(), len(palette)) / weight
        descriptors.append(np.concatenate([spectra.ravel(), shares]))
    return np.asarray(descriptors, np.float32)


class AttributeJudge:
    """Classifiers of the attributes of images of a side, fitted to drawn images.

    Args:
      side: of the images in pixels.
      count: number of drawn images.
    """

    def __init__(self, side: int, count: int = 4000):
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        images, attributes = drawn_examples(count, side, seed=1_000_000)
        descriptors = describe(images / 255)
        self._classifiers = {}
        for name in ATTRIBUTES[:-1]:
            network = MLPClassifier((128,), alpha=1e-2, max_iter=200, early_stopping=True, random_state=0)
            classifier = make_pipeline(StandardScaler(), network)
            classifier.fit(descriptors, [getattr(attribute, name) for attribute in attributes])
            self._classifiers[name] = classifier

    def attributes(self, images: np.ndarray) -> list[Attributes]:
        """Recognize the attributes of images uint8 [N, H, W, 3]."""
        images = images / 255
        distances = abs(background_colors(images)[:, None] - np.array(list(COLORS.values()))).max(-1)
        descriptors = describe(images)
        found = {name: classifier.predict(descriptors) for name, classifier in self._classifiers.items()}
        found["background"] = np.array(list(COLORS))[distances.argmin(1)]
        return [Attributes(*map(str, row)) for row in zip(*(found[name] for name in ATTRIBUTES), strict=True)]

    def shares(self, images: np.ndarray, asked: list[Attributes]) -> dict[str, float]:
        """Compute the share of images that show what was asked for: of each attribute, and of `all`."""
        pairs = list(zip(asked, self.attributes(images), strict=True))
        right = {name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in ATTRIBUTES}
        right["all"] = [a == b for a, b in pairs]
        return {name: float(np.mean(values)) for name, values in right.items()}
