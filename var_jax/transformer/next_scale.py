"""VAR transformer: next-scale prediction of token maps from coarser ones (Tian et al. 2024)."""

from jaxtyping import Array, Float, Float32

from var_jax.transformer.model import ARTransformer, Cache, Condition


class NextScale(ARTransformer):
    """Next-scale `ARTransformer`, with a `NextScaleConfig`.

    The input of scale k > 0 is the resized f_hat of the coarser maps (`Quantizer.transformer_inputs`).
    """

    def step(
        self, k: int, inputs: Float[Array, "B n C"] | None, condition: Condition, cache: Cache | None
    ) -> tuple[Float32[Array, "B n V"], Cache | None]:
        """Run one step of generation: compute the logits of map k, n = s_k^2.

        Args:
          k: the scale, static.
          inputs: the resized f_hat; None at k = 0.
          condition: of the images.
          cache: keys and values of the scales before k; None if the mask is block-diagonal.

        Returns:
          Logits, and the cache with scale k in it.
        """
        start, end = self.config.steps[k]
        first_key = 0 if self.config.uses_cache else start
        x = self.embed(condition, inputs, start)
        tables = self.config.position_tables.at(start, end - start, end - first_key, first_key)
        context = self.attention_context(tables, masked=False)
        x, cache = self.blocks(x, condition.blocks, condition.cross, context, cache, start)
        return self.logits(x, condition.head), cache

    def prefill(self, inputs: Float[Array, "B n C"], condition: Condition) -> Cache | None:
        """Compute the cache of the first maps, which are known, in one pass.

        Args:
          inputs: the resized f_hat of these maps but the first, whose input is the condition.
          condition: of the images.

        Returns:
          Their keys and values; None if no step reads earlier ones.
        """
        cache = self.empty_cache(condition.vector.shape[0])
        if cache is None:
            return None
        x = self.embed(condition, inputs)
        context = self.attention_context(
            self.config.position_tables.at(0, x.shape[1], x.shape[1]), masked=False
        )
        return self.blocks(x, condition.blocks, condition.cross, context, cache)[1]
