"""Losses of the tokenizer: named terms with one value per image, and their weighted sum."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from var_jax.errors import ConfigError
from var_jax.tokenizer.lpips import perceptual_distance


def image_terms(
    images: Float32[Array, "B height width 3"],
    recon: Float32[Array, "B height width 3"],
    vgg: dict | None = None,
    precision: str = "highest",
) -> dict[str, Float32[Array, " B"]]:
    """Compute the unweighted reconstruction losses of each image.

    Args:
      images: in [-1, 1].
      recon: their reconstructions.
      vgg: parameters of the perceptual distance; None omits that term.
      precision: of the convolutions of the perceptual distance.

    Returns:
      `l2` and `l1`, means over the pixel values; `perceptual`, LPIPS.
    """
    error = recon - images
    terms = {
        "l2": jnp.mean(error**2, axis=(1, 2, 3)),
        "l1": jnp.mean(jnp.abs(error), axis=(1, 2, 3)),
    }
    if vgg is not None:
        terms["perceptual"] = perceptual_distance(vgg, images, recon, precision)
    return terms


def entropy_penalty(
    targets: Float32[Array, "B L C"], codes: Float32[Array, "V C"], temperature: float
) -> Float32[Array, " B"]:
    """Compute the entropy penalty, low if assignments are confident and all codes are used.

    A target is assigned to codes with probabilities p = softmax(-distance^2 / temperature); the penalty of
    an image is the mean entropy of p minus the entropy of the mean of p over the batch.  It needs memory for
    three arrays [B, L, V].  Source: Yu et al. 2023, MAGVIT-2.

    Args:
      targets: residuals to quantize.
      codes: the codes.
      temperature: in units of squared distance.
    """
    dots = jnp.einsum("blc,vc->blv", targets, codes, precision=jax.lax.Precision.HIGHEST)
    log_p = jax.nn.log_softmax((2 * dots - jnp.sum(codes**2, -1)) / temperature)
    p = jnp.exp(log_p)
    mean = p.mean((0, 1))
    return -jnp.sum(p * log_p, -1).mean(-1) + jnp.sum(mean * jnp.log(mean + 1e-10))


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Compute the weighted sum of the terms with a nonzero weight.

    Raises:
      ConfigError: on a weight for a term that does not exist.
    """
    if unknown := sorted(name for name, weight in weights.items() if weight and name not in terms):
        raise ConfigError(f"config.loss weighs unknown terms {unknown}; the terms are {sorted(terms)}")
    return sum(weight * terms[name] for name, weight in weights.items() if weight)
