"""The decoder: what the maps add up to, to pixels."""

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
    remat: bool = False

    @nn.compact
    def __call__(self, f_hat: jax.Array, train: bool = False) -> jax.Array:
        cfg, last = self.config, len(self.config.ch_mult) - 1
        x = Conv3x3(cfg.ch * cfg.ch_mult[last], dtype=self.dtype, name="conv_in")(f_hat)
        x = Middle(cfg.norm_groups, cfg.dropout, self.dtype, self.remat, name="middle")(x, train)
        for level in reversed(range(len(cfg.ch_mult))):
            for i in range(cfg.num_blocks + 1):
                features = cfg.ch * cfg.ch_mult[level]
                block = residual_block(self.remat)(
                    features, cfg.norm_groups, cfg.dropout, self.dtype, name=f"level{level}_block{i}"
                )
                x = block(x, train)
                if level == last:
                    x = AttentionBlock(cfg.norm_groups, self.dtype, name=f"level{level}_attention{i}")(x)
            if level != 0:
                x = Upsample(self.dtype, name=f"level{level}_upsample")(x)
        x = nn.silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return Conv3x3(3, dtype=self.dtype, name="conv_out")(x)
