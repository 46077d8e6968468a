"""Teacher forcing: targets and inputs of a transformer from the tokens of images."""

import jax

from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.config import TransformerConfig


def teacher_forcing(
    config: TransformerConfig, quantizer: Quantizer, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the targets, and the inputs of every position but those that see the label alone.

    Args:
      config: of the transformer.
      quantizer: of the tokenizer.
      tokens: int32 [B, L], as the tokenizer gives them.

    Returns:
      Targets int32 [B, L] in the order of prediction, and inputs float32 [B, L - num_start_tokens, C].
    """
    targets = config.to_prediction_order(tokens)
    if config.predicts_maps:
        return targets, quantizer.transformer_inputs(quantizer.partial_sums(tokens))
    return targets, quantizer.codes[targets[:, :-1]]
