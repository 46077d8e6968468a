"""Teacher forcing: targets and inputs of a transformer from the tokens of images."""

import numpy as np
from jaxtyping import Array, Float, Int

from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.config import TransformerConfig


def teacher_forcing(
    config: TransformerConfig, quantizer: Quantizer, tokens: Int[Array | np.ndarray, "B L"]
) -> tuple[Int[Array | np.ndarray, "B L"], Float[Array, "B M C"]]:
    """Compute the targets, and the inputs of all positions but the start tokens, which see no token.

    Args:
      config: architecture and order of prediction of the transformer.
      quantizer: quantizer of the tokenizer.
      tokens: in the tokenizer's layout.

    Returns:
      Targets in the order of prediction, and inputs float32 of the M = L - num_start_tokens later positions.
    """
    targets = config.to_prediction_order(tokens)
    if config.predicts_maps:
        return targets, quantizer.transformer_inputs(quantizer.partial_sums(tokens))
    return targets, quantizer.codes[targets[:, :-1]]
