"""The decoder: what the maps add up to, to pixels."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.layers import AttentionBlock, Conv3x3, Middle, Norm, Upsample, residual_block


class Decoder(nn.Module):
    """[B, h, w, C] -> images [B, H, W, 3], not clipped, H = h * config.downsample.

    The mirror of the encoder with one more residual block a level.  Levels are numbered as in the
    encoder, so that level 0 is the full resolution.
    """

    config: TokenizerConfig
    dtype: jnp.dtype
    precision: str
    remat: bool = False

    @nn.compact
    def __call__(self, f_hat: jax.Array, train: bool = False) -> jax.Array:
        cfg, last = self.config, len(self.config.ch_mult) - 1
        conv = partial(Conv3x3, dtype=self.dtype, precision=self.precision)
        block = partial(
            residual_block(self.remat),
            groups=cfg.norm_groups,
            dropout=cfg.dropout,
            dtype=self.dtype,
            precision=self.precision,
        )
        attention = partial(AttentionBlock, cfg.norm_groups, self.dtype, self.precision)
        middle = Middle(cfg.norm_groups, cfg.dropout, self.dtype, self.precision, self.remat, name="middle")
        x = conv(cfg.ch * cfg.ch_mult[last], name="conv_in")(f_hat)
        x = middle(x, train)
        for level in reversed(range(len(cfg.ch_mult))):
            for i in range(cfg.num_blocks + 1):
                x = block(cfg.ch * cfg.ch_mult[level], name=f"level{level}_block{i}")(x, train)
                if level == last:
                    x = attention(name=f"level{level}_attention{i}")(x)
            if level != 0:
                x = Upsample(self.dtype, self.precision, name=f"level{level}_upsample")(x)
        x = nn.silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return conv(3, name="conv_out")(x)
