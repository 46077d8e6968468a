"""What VAR is measured against: a transformer that predicts the tokens of one map one after another.

The map is flattened along an order (raster by default, as in VQGAN: Esser et al. 2021).  Blocks, adaLN,
initialisation and input, a linear of code vectors, are VAR's, so that the prediction scheme is all that
differs.
"""

import jax
import jax.numpy as jnp

from var_jax.transformer.block import KVCache
from var_jax.transformer.model import ARTransformer, Condition


class NextToken(ARTransformer):
    """Next-token `ARTransformer`, of a `NextTokenConfig`.

    The input of position i > 0 is the code vector of the token before it in the order.
    """

    def step(self, i: jax.Array, inputs: jax.Array, condition: Condition, cache: KVCache):
        """One token of generation: logits of position i given a cache that holds the positions before it.

        Args:
          i: int32 scalar, the position; may be known only when the program runs.
          inputs: float32 [B, 1, C], the code vector of token i - 1; not looked at where i = 0.
          condition: of the labels [B].
          cache: keys and values of the positions before i.

        Returns:
          Logits float32 [B, 1, V] and the cache with position i in it.
        """
        x = self.embed(condition, inputs, i)
        tables = self.config.position_tables.at(i, 1, self.config.length)
        context = self.attention_context(tables, masked=True).replace(cache_index=jnp.asarray(i, jnp.int32))
        x, cache = self.blocks(x, condition.blocks, context, cache)
        return self.logits(x, condition.head), cache
