"""Losses of the tokenizer: each has a name and a value an image, and they are summed with their weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from var_jax.errors import ConfigError
from var_jax.tokenizer.lpips import perceptual_distance


def image_terms(
    images: jax.Array, recon: jax.Array, vgg: dict | None = None, precision: str = "highest"
) -> dict[str, jax.Array]:
    """What a reconstruction is held to, unweighted.

    Args:
      images, recon: float32 [B, H, W, 3] in [-1, 1], and their reconstructions.
      vgg: parameters for the perceptual distance; None leaves that term out.
      precision: of the convolutions of the perceptual distance.

    Returns:
      float32 [B] each: `l2` and `l1`, means over the pixel values; `perceptual`, LPIPS.
    """
    error = recon - images
    terms = {
        "l2": jnp.mean(error**2, axis=(1, 2, 3)),
        "l1": jnp.mean(jnp.abs(error), axis=(1, 2, 3)),
    }
    if vgg is not None:
        terms["perceptual"] = perceptual_distance(vgg, images, recon, precision)
    return terms


def entropy_penalty(targets: jax.Array, codes: jax.Array, temperature: float) -> jax.Array:
    """Low where every target is sure of its code and all codes are wanted (Yu et al. 2023, MAGVIT-2).

    Codes are taken with the probabilities softmax(-distance^2 / temperature); the entropy of their mean over
    the batch is subtracted from their mean entropy.  Takes memory for [B, L, V] three times over.

    Args:
      targets: [B, L, C].
      codes: [V, C].
      temperature: in units of squared distance.

    Returns:
      float32 [B].
    """
    dots = jnp.einsum("blc,vc->blv", targets, codes, precision=jax.lax.Precision.HIGHEST)
    log_p = jax.nn.log_softmax((2 * dots - jnp.sum(codes**2, -1)) / temperature)
    p = jnp.exp(log_p)
    mean = p.mean((0, 1))
    return -jnp.sum(p * log_p, -1).mean(-1) + jnp.sum(mean * jnp.log(mean + 1e-10))


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of the terms with a weight.

    Raises:
      ValueError: on a weight for a term that does not exist.
    """
    if unknown := sorted(name for name, weight in weights.items() if weight and name not in terms):
        raise ConfigError(f"config.loss weighs unknown terms {unknown}; there are {sorted(terms)}")
    return sum(weight * terms[name] for name, weight in weights.items() if weight)
