"""Next-token transformer, the baseline of VAR: it predicts the tokens of one map one by one.

The map is flattened along an order (raster by default, as in VQGAN: Esser et al. 2021).  Blocks, adaLN,
initialization and the linear embedding of code vectors are VAR's, so only the prediction scheme differs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from var_jax.transformer.model import ARTransformer, Cache, Condition


class NextToken(ARTransformer):
    """Next-token `ARTransformer`, with a `NextTokenConfig`.

    The input of position i > 0 is the code vector of the previous token in the order.
    """

    def step(
        self, i: Int[Array, ""], inputs: Float[Array, "B 1 C"], condition: Condition, cache: Cache
    ) -> tuple[Float32[Array, "B 1 V"], Cache]:
        """Run one step of generation: compute the logits of the token at position i.

        Args:
          i: position, possibly traced.
          inputs: code vector of token i - 1; ignored at i = 0.
          condition: of the images.
          cache: keys and values of the positions before i.

        Returns:
          Logits, and the cache with position i in it.
        """
        x = self.embed(condition, inputs, i)
        tables = self.config.position_tables.at(i, 1, self.config.length)
        context = self.attention_context(tables, masked=True).replace(cache_index=jnp.asarray(i, jnp.int32))
        x, cache = self.blocks(x, condition.blocks, condition.cross, context, cache)
        return self.logits(x, condition.head), cache
