"""The encoder: pixels to features."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.layers import AttentionBlock, Conv3x3, Downsample, Middle, Norm, residual_block


class Encoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> [B, h, w, C], h = H / config.downsample."""

    config: TokenizerConfig
    dtype: jnp.dtype
    precision: str
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
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
        x = conv(cfg.ch, name="conv_in")(images)
        for level, mult in enumerate(cfg.ch_mult):
            for i in range(cfg.num_blocks):
                x = block(cfg.ch * mult, name=f"level{level}_block{i}")(x, train)
                if level == last:
                    x = attention(name=f"level{level}_attention{i}")(x)
            if level != last:
                x = Downsample(self.dtype, self.precision, name=f"level{level}_downsample")(x)
        x = middle(x, train)
        x = nn.silu(Norm(cfg.norm_groups, dtype=self.dtype, name="norm_out")(x))
        return conv(cfg.code_dim, name="conv_out")(x)
