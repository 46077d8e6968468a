"""Transformers without a KV cache: every step of generation recomputes all positions so far.

They are the baseline that shows what a cache saves.  They replace the cached models in the sampler
(`sampling/sampler.py`), have the same parameters and sample the same tokens; their cache holds only the
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
      module: bound module.
      count: number of positions.
      inputs: float32 [B, count - num_start_tokens, C], for all positions after the start tokens.
      condition: of the labels [B].
    """
    context = module.attention_context(module.config.position_tables.at(0, count, count), masked=True)
    return module.blocks(module.embed(condition, inputs), condition.blocks, condition.cross, context)[0]


class UncachedNextToken(NextToken):
    """Next-token transformer whose every step runs over the whole sequence.

    A compiled loop body has one length, so future positions are padding, which the mask hides.
    """

    def empty_cache(self, batch: int) -> jax.Array:
        """Return zeros [B, L, C] in place of the inputs; the first is never read."""
        return jnp.zeros((batch, self.config.length, self.config.code_dim))

    def step(self, i: jax.Array, inputs: jax.Array, condition: Condition, cache: jax.Array):
        """Compute logits of position i; see `NextToken.step`."""
        cache = jax.lax.dynamic_update_slice_in_dim(cache, inputs, i, axis=1)
        x = _residual_stream(self, self.config.length, cache[:, 1:], condition)
        return self.logits(jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), condition.head), cache


class UncachedNextScale(NextScale):
    """Next-scale transformer whose every step runs over all maps so far, without padding."""

    def empty_cache(self, batch: int) -> jax.Array:
        """Return an empty array of inputs [B, 0, C]."""
        return jnp.zeros((batch, 0, self.config.code_dim))

    def step(self, k: int, inputs: jax.Array | None, condition: Condition, cache: jax.Array):
        """Compute logits of map k; see `NextScale.step`."""
        start, end = self.config.steps[k]
        cache = cache if k == 0 else jnp.concatenate([cache, inputs], axis=1)
        x = _residual_stream(self, end, cache, condition)
        return self.logits(x[:, start:], condition.head), cache
