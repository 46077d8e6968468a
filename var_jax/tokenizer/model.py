"""The tokenizer, a multi-scale VQ-VAE or raw patches of pixels: images to token maps and back."""

import zlib
from functools import partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int32

from var_jax.dtypes import product_precision
from var_jax.tokenizer.autoencoder import Conv3x3, Decoder, Encoder, from_patches, to_patches
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.quantizer import Quantized, Quantizer


@flax.struct.dataclass
class Reconstruction:
    """Output of a training pass.

    Attributes:
      images: reconstructions, not clipped to [-1, 1].
      quantized: output of the quantizer.
    """

    images: Float32[Array, "B height width 3"]
    quantized: Quantized


class Codebook(nn.Module):
    """Module with the parameters of the quantizer."""

    config: TokenizerConfig

    @nn.compact
    def __call__(self) -> Quantizer:
        """Return the quantizer with these parameters."""
        cfg = self.config
        bound = cfg.code_dim**-0.5 / 36  # as in the authors' single-scale trainer
        uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        codebook_init = nn.with_logical_partitioning(uniform, ("codes", "code_dim"))
        params = {"codebook": self.param("codebook", codebook_init, (cfg.num_codes, cfg.code_dim))}
        if cfg.num_phis:
            stacked = nn.initializers.lecun_normal(batch_axis=0)
            kernel_init = nn.with_logical_partitioning(stacked, (None,) * 5)
            bias = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, None))
            shape = (cfg.num_phis, 3, 3, cfg.code_dim, cfg.code_dim)
            params["phi_kernel"] = self.param("phi_kernel", kernel_init, shape)
            params["phi_bias"] = self.param("phi_bias", bias, (cfg.num_phis, cfg.code_dim))
        return Quantizer.create(params, cfg)


class Tokenizer(nn.Module):
    """Tokenizer: encoder, quantizer and decoder of images in [-1, 1].

    With `config.patch` there is no encoder and no decoder, and only the codebook is trained.

    Attributes:
      config: the architecture.
      dtype: of the convolutions; features, quantization and decoded images are float32.
      remat: save only the inputs of the residual blocks for the backward pass.
      encoder_dtype: of the encoder; None for `dtype`.  Tokens equal those of the published code only in
        float32.
      encoder_precision: of the encoder's products; None for `product_precision` of its dtype.
    """

    config: TokenizerConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    encoder_dtype: DTypeLike | None = None
    encoder_precision: str | None = None

    def setup(self):
        self.quantizer = Codebook(self.config)
        if self.config.patch:
            return
        dtype = self.dtype_of_encoder
        encoding = dict(dtype=dtype, precision=self.encoder_precision or product_precision(dtype))
        decoding = dict(dtype=self.dtype, precision=product_precision(self.dtype))
        self.encoder = Encoder(self.config, **encoding, remat=self.remat)
        self.quant_conv = Conv3x3(self.config.code_dim, **encoding)
        self.post_quant_conv = Conv3x3(self.config.code_dim, **decoding)
        self.decoder = Decoder(self.config, **decoding, remat=self.remat)

    @property
    def dtype_of_encoder(self) -> jnp.dtype:
        """Dtype of the encoder's convolutions."""
        return jnp.dtype(self.dtype if self.encoder_dtype is None else self.encoder_dtype)

    def __call__(self, images: Float[Array, "B height width 3"], train: bool = False) -> Reconstruction:
        """Reconstruct images, differentiably (see `config.vq_gradient`).

        Args:
          images: in [-1, 1].
          train: apply dropout; needs the rng stream "dropout" if a rate is not 0.
        """
        features = self._features(images, train)
        keep = None
        if train and self.config.quantizer_dropout:
            keep = self._draw_num_maps(images.shape[0])
        quantized = self.quantizer()(features, keep)
        return Reconstruction(self._pixels(quantized.f_hat, train), quantized)

    def features(self, images: Float[Array, "B height width 3"]) -> Float32[Array, "B h w C"]:
        """Compute the features of images."""
        return self._features(images, train=False)

    def encode(self, images: Float[Array, "B height width 3"]) -> Int32[Array, "B L"]:
        """Encode images as tokens."""
        return self.quantizer().tokenize(self.features(images))

    def decode_features(self, f_hat: Float[Array, "B h w C"]) -> Float32[Array, "B height width 3"]:
        """Decode f_hat to images, clipped to [-1, 1]."""
        return jnp.clip(self._pixels(f_hat, train=False), -1, 1)

    def decode(self, tokens: Int[Array, "B n"]) -> Float32[Array, "B height width 3"]:
        """Decode the tokens of all maps, or of the first few, to images."""
        return self.decode_features(self.quantizer().partial_sums(tokens)[-1])

    def _draw_num_maps(self, batch: int) -> jax.Array:
        """Draw numbers of maps, int [B]: K, or 1 .. K - 1 with probability `quantizer_dropout`."""
        dropped_key, num_key = jax.random.split(self.make_rng("dropout"))
        scales = len(self.config.scales)
        dropped = jax.random.bernoulli(dropped_key, self.config.quantizer_dropout, (batch,))
        return jnp.where(dropped, jax.random.randint(num_key, (batch,), 1, max(scales, 2)), scales)

    def _features(self, images, train):
        if self.config.patch:
            return to_patches(images, self.config.patch)
        return self.quant_conv(self.encoder(images, train)).astype(jnp.float32)

    def _pixels(self, f_hat, train):
        if self.config.patch:
            return from_patches(f_hat, self.config.patch)
        return self.decoder(self.post_quant_conv(f_hat), train).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def encode(
    tokenizer: Tokenizer, params: dict, images: Float[Array, "B height width 3"]
) -> Int32[Array, "B L"]:
    """Encode images in [-1, 1] as tokens (jitted)."""
    return tokenizer.apply({"params": params}, images, method="encode")


@partial(jax.jit, static_argnums=0)
def decode(
    tokenizer: Tokenizer, params: dict, tokens: Int[Array, "B n"]
) -> Float32[Array, "B height width 3"]:
    """Decode the tokens of all maps, or of the first few, to images in [-1, 1] (jitted)."""
    return tokenizer.apply({"params": params}, tokens, method="decode")


@partial(jax.jit, static_argnums=0)
def decode_steps(
    tokenizer: Tokenizer, params: dict, tokens: Int[Array, "B n"]
) -> Float32[Array, "B maps height width 3"]:
    """Decode the partial sums of tokens to images in [-1, 1] after 1, 2, ... maps (jitted).

    A loop decodes B images at a time, so it needs no more memory than `decode`.
    """
    quantizer = Quantizer.create(params["quantizer"], tokenizer.config)
    decode_sum = partial(tokenizer.apply, {"params": params}, method="decode_features")
    steps = jax.lax.map(decode_sum, jnp.stack(quantizer.partial_sums(tokens)))
    return jnp.moveaxis(steps, 0, 1)


def fingerprint(params: dict) -> str:
    """Compute the CRC-32 of the paths and values of all parameters, as 8 hexadecimal digits.

    Args:
      params: of a tokenizer, as trained or loaded (not cast to the compute dtype).
    """
    crc = 0
    for path, value in sorted(flatten_dict(params, sep="/").items()):
        crc = zlib.crc32(path.encode(), crc)
        crc = zlib.crc32(np.asarray(value).tobytes(), crc)
    return f"{crc:08x}"
