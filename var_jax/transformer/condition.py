"""Encoders of conditions that are sequences: the words of a caption, or the vectors of an embedding.

An encoder returns a vector, which takes the place of the class embedding (adaLN and start tokens), and a
sequence, to which every block attends.  Where all is padding, both are learned: "no condition", for guidance.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from var_jax.conditions import PADDING
from var_jax.sharding import constrain, replicate
from var_jax.transformer.block import MLP, CrossAttention, CrossProjection, dense, normal_init
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.elementwise import layer_norm

Labels = Int[Array | np.ndarray, " B"]
Captions = Int[Array | np.ndarray, "B T"]
Embeddings = Float[Array | np.ndarray, "B T E"]
Conditions = Labels | Captions | Embeddings  # of the kind that the config names (`var_jax/conditions.py`)


class SequenceEncoder(nn.Module):
    """Base of the encoders, whose vector is a linear layer of the mean over the rows of the sequence.

    Attributes:
      config: architecture of the transformer.
      dtype: of the matrix products.
    """

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, condition: Captions | Embeddings
    ) -> tuple[Float32[Array, "B D"], Float[Array, "B T D"], Bool[Array, "B T"]]:
        """Compute the vector, the sequence, and which rows of the sequence are no padding."""
        d = self.config.width
        rows, is_row = self._encode(condition)
        rows = layer_norm(rows, jnp.float32)
        mean = (rows * is_row[..., None]).sum(1) / jnp.maximum(is_row.sum(1), 1)[:, None]
        vector = dense(d, ("embed", "mlp"), normal_init(d), self.dtype, "vector")(mean).astype(jnp.float32)
        init = nn.with_logical_partitioning(normal_init(d), ("embed",))
        null_vector, null_row = (self.param(name, init, (d,)) for name in ("null_vector", "null_row"))
        is_null = ~is_row.any(1)
        vector = jnp.where(is_null[:, None], null_vector, vector)
        # Equal rows are as one: to all of them attention gives the same result, for any length.
        sequence = jnp.where(is_null[:, None, None], null_row, rows).astype(self.dtype)
        return constrain(vector), constrain(sequence), is_row | is_null[:, None]

    def _encode(self, condition: Captions | Embeddings) -> tuple[Float32[Array, "B T D"], Bool[Array, "B T"]]:
        """Compute the rows of the sequence before normalization, and which of them are no padding."""
        raise NotImplementedError


class CaptionEncoder(SequenceEncoder):
    """Transformer over the words of a caption, each of which sees all of them; trained along."""

    def _encode(self, condition):
        cfg = self.config
        init = nn.with_logical_partitioning(normal_init(cfg.width), (None, "embed"))
        words = self.param("word_embedding", init, (2 + len(cfg.vocabulary), cfg.width))
        positions = self.param("position_embedding", init, (cfg.condition_length, cfg.width))
        is_word = condition != PADDING
        x = replicate(words)[condition] + positions[: condition.shape[1]]
        x = constrain(layer_norm(x, jnp.float32))
        for i in range(cfg.text_depth):
            x = TextBlock(cfg, self.dtype, name=f"layers_{i}")(x, is_word)
        return x, is_word


class EmbeddingEncoder(SequenceEncoder):
    """Linear layer on the normalized vectors of an embedding."""

    def _encode(self, condition):
        width = self.config.width
        x = layer_norm(condition.astype(jnp.float32), self.dtype)
        x = dense(width, (None, "embed"), normal_init(x.shape[-1]), self.dtype, "projection")(x)
        return constrain(x).astype(jnp.float32), (condition != 0).any(-1)


class TextBlock(nn.Module):
    """Bidirectional pre-norm block: x += Attn(LN(x)), then x += MLP(LN(x))."""

    config: TransformerConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float32[Array, "B T D"], is_word: Bool[Array, "B T"]) -> Float32[Array, "B T D"]:
        """Apply the block to the words of a caption."""
        h = layer_norm(x, self.dtype)
        _, keys = CrossProjection(self.config, self.dtype, name="keys")((h, is_word), None)
        x = x + CrossAttention(self.config, self.dtype, name="attention")(h, keys)
        return constrain(x + MLP(self.config, self.dtype, name="mlp")(layer_norm(x, self.dtype)))


ENCODERS = {"caption": CaptionEncoder, "embedding": EmbeddingEncoder}
