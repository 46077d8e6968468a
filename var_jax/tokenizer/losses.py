"""Losses of the tokenizer: each has a name and a value an image, and they are summed with their weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from var_jax.tokenizer.model import Reconstruction


def loss_terms(images: jax.Array, output: Reconstruction) -> dict[str, jax.Array]:
    """Every term that a training pass can be held to, unweighted.

    Args:
      images: float32 [B, H, W, 3] in [-1, 1].
      output: of the tokenizer for them.

    Returns:
      float32 [B] each: `l2` and `l1`, means over the pixel values, and `codebook`, the loss of the quantizer.
    """
    error = output.images - images
    return {
        "l2": jnp.mean(error**2, axis=(1, 2, 3)),
        "l1": jnp.mean(jnp.abs(error), axis=(1, 2, 3)),
        "codebook": output.quantized.loss,
    }


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of the terms with a weight.

    Raises:
      ValueError: on a weight for a term that does not exist.
    """
    if unknown := sorted(set(weights) - set(terms)):
        raise ValueError(f"config.loss weighs unknown terms {unknown}; there are {sorted(terms)}")
    return sum(weight * terms[name] for name, weight in weights.items() if weight)
