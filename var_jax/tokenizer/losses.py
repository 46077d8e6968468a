"""Losses of the tokenizer: each has a name and a value an image, and they are summed with their weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from var_jax.tokenizer.model import Reconstruction
from var_jax.tokenizer.perceptual import perceptual_distance


def loss_terms(
    images: jax.Array, output: Reconstruction, vgg: dict | None = None, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Every term that a training pass can be held to, unweighted.

    Args:
      images: float32 [B, H, W, 3] in [-1, 1].
      output: of the tokenizer for them.
      vgg: parameters for the perceptual distance; None leaves that term out.
      dtype: of the convolutions of the perceptual distance.

    Returns:
      float32 [B] each: `l2` and `l1`, means over the pixel values; `codebook`, the loss of the quantizer;
      `perceptual`, LPIPS.
    """
    error = output.images - images
    terms = {
        "l2": jnp.mean(error**2, axis=(1, 2, 3)),
        "l1": jnp.mean(jnp.abs(error), axis=(1, 2, 3)),
        "codebook": output.quantized.loss,
    }
    if vgg is not None:
        terms["perceptual"] = perceptual_distance(vgg, images, output.images, dtype)
    return terms


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of the terms with a weight.

    Raises:
      ValueError: on a weight for a term that does not exist.
    """
    if unknown := sorted(set(weights) - set(terms)):
        raise ValueError(f"config.loss weighs unknown terms {unknown}; there are {sorted(terms)}")
    return sum(weight * terms[name] for name, weight in weights.items() if weight)
