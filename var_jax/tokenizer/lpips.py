"""LPIPS, the perceptual distance of images on VGG-16 features (Zhang et al. 2018).

Parameters are nested dicts, loaded by `interop/lpips_weights.py`:
{"conv": {"0": {"kernel", "bias"}, "2": ...}, "linear": {"0": [C], ...}}; convolutions are numbered as in
torchvision's `vgg16().features`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from var_jax.errors import ConfigError

# Convolutions of each of the five layers whose features are compared; max pooling separates the layers.
LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)

# ImageNet's mean and standard deviation, for images in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def vgg_features(
    params: dict, images: Float[Array, "B height width 3"], precision: str = "highest"
) -> list[Float[Array, "B _ _ _"]]:
    """Compute the last activation of each VGG layer, [B, height / 2^i, width / 2^i, CHANNELS[i]].

    Args:
      params: from `load_perceptual`.
      images: in [-1, 1], at least 16 pixels per side.
      precision: of the convolutions.

    Raises:
      ConfigError: on images that are too small for four poolings.
    """
    if min(images.shape[1:3]) < 16:
        raise ConfigError(f"the perceptual distance needs at least 16 x 16 pixels, got {images.shape[1:3]}")
    x = (images - SHIFT) / SCALE
    features = []
    for layer, convolutions in enumerate(LAYERS):
        if layer:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for i in convolutions:
            conv = params["conv"][str(i)]
            x = jax.lax.conv_general_dilated(
                x,
                conv["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
            x = jax.nn.relu(x + conv["bias"])
        features.append(x)
    return features


def perceptual_by_layer(
    params: dict,
    x: Float[Array, "B height width 3"],
    y: Float[Array, "B height width 3"],
    precision: str = "highest",
) -> Float[Array, "5 B"]:
    """Compute the contribution of each layer to the LPIPS distance of images in [-1, 1]."""
    distances = []
    for layer, features in enumerate(vgg_features(params, jnp.concatenate([x, y]), precision)):
        unit = features / (jnp.sqrt(jnp.sum(features**2, -1, keepdims=True) + 1e-20) + 1e-10)
        a, b = jnp.split(unit, 2)
        weighted = jnp.matmul((a - b) ** 2, params["linear"][str(layer)], precision=precision)
        distances.append(weighted.mean((1, 2)))
    return jnp.stack(distances)


def perceptual_distance(
    params: dict,
    x: Float[Array, "B height width 3"],
    y: Float[Array, "B height width 3"],
    precision: str = "highest",
) -> Float[Array, " B"]:
    """Compute the LPIPS distance of images in [-1, 1].

    Args:
      params: from `load_perceptual`.
      x: images.
      y: the images to compare with them.
      precision: of the convolutions; all arrays are float32.
    """
    return perceptual_by_layer(params, x, y, precision).sum(0)
