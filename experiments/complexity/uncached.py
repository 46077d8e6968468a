"""Transformers that keep no keys and values: every step of generation recomputes all positions so far.

What a cache saves is measured against them.  They stand in for the real ones in the real sampler
(`sampling/sampler.py`), with the same parameters, and draw the same tokens; their cache is nothing but the
inputs so far, float32 [B, positions, C].
"""

import jax
import jax.numpy as jnp

from var_jax.transformer.model import ARTransformer, Condition
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken


def _residual_stream(
    module: ARTransformer, count: int, inputs: jax.Array | None, condition: Condition
) -> jax.Array:
    """Compute the residual stream float32 [B, count, D] of the first positions, after all blocks.

    Args:
      module: bound.
      count: positions.
      inputs: float32 [B, count - num_start_tokens, C], of all of them but the first ones.
      condition: of the labels [B].
    """
    context = module.attention_context(module.config.position_tables.at(0, count, count), masked=True)
    return module.blocks(module.embed(condition, inputs), condition.blocks, context)[0]


class UncachedNextToken(NextToken):
    """Every step runs over the whole sequence: a compiled program has one length, so what is not there yet
    is padded, and the mask hides it.
    """

    def empty_cache(self, batch: int) -> jax.Array:
        """No inputs yet: zeros [B, L, C], of which the first is not looked at."""
        return jnp.zeros((batch, self.config.length, self.config.code_dim))

    def step(self, i: jax.Array, inputs: jax.Array, condition: Condition, cache: jax.Array):
        """See `NextToken.step`."""
        cache = jax.lax.dynamic_update_slice_in_dim(cache, inputs, i, axis=1)
        x = _residual_stream(self, self.config.length, cache[:, 1:], condition)
        return self.logits(jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), condition.head), cache


class UncachedNextScale(NextScale):
    """Every step runs over the maps so far, and no more: the scales are unrolled, so lengths are known."""

    def empty_cache(self, batch: int) -> jax.Array:
        """No inputs yet: [B, 0, C]."""
        return jnp.zeros((batch, 0, self.config.code_dim))

    def step(self, k: int, inputs: jax.Array | None, condition: Condition, cache: jax.Array):
        """See `NextScale.step`."""
        start, end = self.config.steps[k]
        cache = cache if k == 0 else jnp.concatenate([cache, inputs], axis=1)
        x = _residual_stream(self, end, cache, condition)
        return self.logits(x[:, start:], condition.head), cache
