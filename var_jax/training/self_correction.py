"""Self-correction: replace tokens in training, and requantize, so that the targets of later maps repair them.

A sampled map has errors that teacher forcing never shows to the transformer.  With self-correction it sees
such maps: some tokens are replaced, f_hat accumulates the replacements, and every later map quantizes the
residual that they leave.  The targets of a map are the tokens of its residual, replaced or not.

Source: Han et al. 2024, "Infinity: Scaling bitwise autoregressive modeling for high-resolution image
synthesis", bitwise self-correction, which flips bits of a code.  A code of a VQ codebook has no bits, so it
is replaced as a whole.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32
from ml_collections import ConfigDict

from var_jax.scales import Scales
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.tokenizer.resize import area_resize
from var_jax.transformer.config import TransformerConfig

SOURCES = ("uniform", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfCorrection:
    """Settings of token replacement: section `correction` of a config.

    Attributes:
      strength: maximum share of the tokens of a map that are replaced; 0: none.
      source: of the replacements: `uniform`, any code; or `model`, drawn from the transformer's own
        predictions for the tokens that are not replaced.

    Raises:
      ValueError: if a field is invalid.
    """

    strength: float = 0.0
    source: str = "uniform"

    def __post_init__(self):
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be a share between 0 and 1; got {self.strength}")
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {self.source!r}")

    def check_maps(self, config: TransformerConfig) -> None:
        """Check that there are later maps that can repair replaced tokens, if any are replaced.

        Raises:
          ValueError: if there are none.
        """
        if self.strength and not (config.predicts_maps and len(config.scales) > 1):
            raise ValueError(
                f"strength={self.strength} needs a transformer that predicts several maps, since later maps "
                "repair the replaced tokens (task next_scale); set it to 0"
            )


def needs_features(stage: ConfigDict) -> bool:
    """Return whether training steps of a stage requantize features, so that tokens alone do not suffice."""
    return bool(stage.get("correction", {}).get("strength"))


def draw_replaced(key: jax.Array, batch: int, scales: Scales, strength: float) -> Bool[Array, "B L"]:
    """Draw which tokens are replaced: each with a probability that is uniform in [0, strength].

    The probability is drawn for each image and each of its maps.
    """
    share_key, token_key = jax.random.split(key)
    shares = jax.random.uniform(share_key, (batch, len(scales)), maxval=strength)
    return jax.random.uniform(token_key, (batch, scales.length)) < shares[:, scales.levels]


def requantize(
    quantizer: Quantizer,
    features: Float[Array, "B h w C"],
    is_replaced: Bool[Array, "B L"],
    replacements: Int[Array, "B L"],
) -> tuple[Int32[Array, "B L"], list[Float32[Array, "B h w C"]]]:
    """Quantize features with some tokens replaced; each map quantizes the residual that is left.

    Args:
      quantizer: of the tokenizer.
      features: of the encoder.
      is_replaced: tokens that are replaced.
      replacements: tokens that take their place.

    Returns:
      Targets, the nearest tokens before any is replaced; and f_hat after 1, 2, ... maps, with replacements.
      Where nothing is replaced, they are those of `Quantizer.tokenize` and `Quantizer.partial_sums`.
    """
    residual = features.astype(jnp.float32)
    f_hat, targets, sums = jnp.zeros_like(residual), [], []
    masks, substitutes = quantizer.split(is_replaced), quantizer.split(replacements)
    for k, side in enumerate(quantizer.scales.sides):
        target = area_resize(residual, side).reshape(residual.shape[0], side * side, -1)
        token_map = quantizer.nearest(target)
        codes = quantizer.codes[jnp.where(masks[k], substitutes[k], token_map)]
        contribution = quantizer.upsample_and_smooth(k, codes)
        f_hat, residual = f_hat + contribution, residual - contribution
        targets.append(token_map)
        sums.append(f_hat)
    return jnp.concatenate(targets, axis=1), sums
