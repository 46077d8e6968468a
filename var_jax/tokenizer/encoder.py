"""The encoder: pixels to features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.layers import AttentionBlock, Conv3x3, Downsample, Middle, Norm, residual_block


class Encoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> [B, h, w, C], h = H / config.downsample."""

    config: TokenizerConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        cfg, last = self.config, len(self.config.ch_mult) - 1
        x = Conv3x3(cfg.ch, dtype=self.dtype, name="conv_in")(images)
        for level, mult in enumerate(cfg.ch_mult):
            for i in range(cfg.num_blocks):
                block = residual_block(self.remat)(
                    cfg.ch * mult, cfg.norm_groups, cfg.dropout, self.dtype, name=f"level{level}_block{i}"
                )
                x = block(x, train)
                if level == last:
                    x = AttentionBlock(cfg.norm_groups, self.dtype, name=f"level{level}_attention{i}")(x)
            if level != last:
                x = Downsample(self.dtype, name=f"level{level}_downsample")(x)
        x = Middle(cfg.norm_groups, cfg.dropout, self.dtype, self.remat, name="middle")(x, train)
        x = nn.silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return Conv3x3(cfg.code_dim, dtype=self.dtype, name="conv_out")(x)
