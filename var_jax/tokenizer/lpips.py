"""Perceptual distance of images on VGG-16 features: LPIPS (Zhang et al. 2018).

Parameters are a plain tree, read from files by `interop/lpips_weights.py`:
{"conv": {"0": {"kernel", "bias"}, "2": ...}, "linear": {"0": [C], ...}}; convolutions are numbered as in
torchvision's `vgg16().features`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.errors import ConfigError

# Convolutions of each of the five layers that are compared; layers are separated by max pooling.
LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
CHANNELS = (64, 128, 256, 512, 512)

# ImageNet's mean and standard deviation, for images in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


def vgg_features(params: dict, images: jax.Array, precision: str = "highest") -> list[jax.Array]:
    """Images [B, H, W, 3] in [-1, 1] -> the last activation of each layer, float32 [B, H/2^i, W/2^i, C_i].

    Args:
      params: of `load_perceptual`.
      images: at least 16 pixels a side.
      precision: of the convolutions.

    Raises:
      ValueError: on images that the poolings leave nothing of.
    """
    if min(images.shape[1:3]) < 16:
        raise ConfigError(f"the perceptual distance needs at least 16 x 16 pixels, got {images.shape[1:3]}")
    x, result = (images - SHIFT) / SCALE, []
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
        result.append(x)
    return result


def perceptual_by_layer(params: dict, x: jax.Array, y: jax.Array, precision: str = "highest") -> jax.Array:
    """Images [B, H, W, 3] in [-1, 1], twice -> float32 [5, B]: the distance at each layer."""
    both = vgg_features(params, jnp.concatenate([x, y]), precision)
    distances = []
    for layer, features in enumerate(both):
        unit = features / (jnp.sqrt(jnp.sum(features**2, -1, keepdims=True) + 1e-20) + 1e-10)
        a, b = jnp.split(unit, 2)
        weighted = jnp.matmul((a - b) ** 2, params["linear"][str(layer)], precision=precision)
        distances.append(weighted.mean((1, 2)))
    return jnp.stack(distances)


def perceptual_distance(params: dict, x: jax.Array, y: jax.Array, precision: str = "highest") -> jax.Array:
    """LPIPS of images [B, H, W, 3] in [-1, 1] -> float32 [B].

    Args:
      params: of `load_perceptual`; no gradient flows to them where they are not differentiated.
      precision: of the convolutions; all arrays are float32.
    """
    return perceptual_by_layer(params, x, y, precision).sum(0)
