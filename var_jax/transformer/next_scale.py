"""The VAR transformer: predicts each whole token map from all the coarser ones (Tian et al. 2024)."""

import jax

from var_jax.transformer.block import KVCache
from var_jax.transformer.model import ARTransformer, Condition


class NextScale(ARTransformer):
    """Next-scale `ARTransformer`, of a `NextScaleConfig`.

    The input of scale k > 0 is the resized f_hat of the maps before it (`Quantizer.transformer_inputs`).
    """

    def step(self, k: int, inputs: jax.Array | None, condition: Condition, cache: KVCache):
        """One scale of generation: logits of map k given a cache that holds the maps before it.

        Args:
          k: the scale, known at compile time.
          inputs: float32 [B, s_k^2, C], the resized f_hat; None at k = 0.
          condition: of the labels [B].
          cache: keys and values of the scales before k.

        Returns:
          Logits float32 [B, s_k^2, V] and the cache with scale k in it.
        """
        start, end = self.config.steps[k]
        x = self.embed(condition, inputs, start)
        context = self.attention_context(
            self.config.position_tables.at(start, end - start, end), masked=False
        )
        x, cache = self.blocks(x, condition.blocks, context, cache, start)
        return self.logits(x, condition.head), cache
