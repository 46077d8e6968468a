"""From the tokens of an image to what a transformer learns from, in its order of prediction."""

import jax

from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.config import NextTokenConfig, TransformerConfig
from var_jax.transformer.positions import inverse


def teacher_forcing(
    config: TransformerConfig, quantizer: Quantizer, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What is predicted, and what each position but the first ones is given for that.

    Args:
      config: of the transformer.
      quantizer: of the tokenizer.
      tokens: int32 [B, L], as the tokenizer gives them.

    Returns:
      Targets int32 [B, L] in the order of prediction, and inputs float32 [B, L - first, C].
    """
    if isinstance(config, NextTokenConfig):
        targets = tokens[:, config.cells]
        return targets, quantizer.codes[targets[:, :-1]]
    return tokens, quantizer.transformer_inputs(quantizer.partial_sums(tokens))


def to_raster_order(config: TransformerConfig, predicted: jax.Array) -> jax.Array:
    """[B, L, ...] in the order of prediction -> as the tokenizer lays tokens out."""
    return predicted[:, inverse(config.cells)] if isinstance(config, NextTokenConfig) else predicted
