"""Features of images from a frozen DINO vision transformer (Caron et al. 2021), for a discriminator.

As in the discriminator of StyleGAN-T (Sauer et al. 2023), on which VAR's is modeled, the features are the
tokens after several blocks, with the class token added to each.

Parameters are nested dicts, loaded by `interop/dino_weights.py`, for patches of P x P pixels, width D and a
grid of G x G positions (P = 16, D = 384 and G = 14 in ViT-S/16):
{"patch": {"kernel" [P, P, 3, D], "bias"}, "class_token": [1, D], "positions": [1 + G * G, D], "blocks":
{"norm1": {"scale", "bias"}, "qkv": {"kernel", "bias"}, "proj", "norm2", "fc1", "fc2"}}; parameters of the
blocks are stacked along a leading axis.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from var_jax.dtypes import product_precision
from var_jax.tokenizer.lpips import SCALE, SHIFT
from var_jax.tokenizer.resize import bicubic_resize, bilinear_resize

HEAD_SIZE = 64
MIN_GRID = 4  # patches per side; smaller images are enlarged


def dino_features(
    params: dict,
    images: Float[Array, "B height width 3"],
    layers: tuple[int, ...] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> list[Float[Array, "B h w D"]]:
    """Compute DINO feature maps of square images in [-1, 1]; h = w = ceil(height / P).

    Images keep their size, rounded up to a multiple of P by enlarging them.  Shrinking 256px images to the
    224px of DINO's large crops would remove the finest detail, which the discriminator must see; and DINO,
    trained on crops of 224 and 96 pixels with interpolated positions, accepts other sizes.

    Args:
      params: from `load_dino`.
      images: square; images below 4 patches per side (64 pixels) are enlarged to it.
      layers: 0-based blocks after which features are taken; by default the last of each quarter (2, 5, 8 and
        11 of ViT-S).  Later blocks are not computed.
      dtype: of the matrix products and the features; layer norms are computed in float32.

    Returns:
      1 + len(layers) maps of patch tokens plus the class token: of the embedding, then after each of
      `layers`.

    Raises:
      ValueError: on images that are not square, or layers that do not exist.
    """
    depth = params["blocks"]["qkv"]["kernel"].shape[0]
    if layers is None:
        layers = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    if not layers or not all(0 <= i < depth for i in layers):
        raise ValueError(f"DINO of {depth} blocks has layers 0 to {depth - 1}, got layers={layers}")
    x = _embed(params, images, dtype)
    blocks = jax.tree.map(lambda leaf: leaf[: max(layers) + 1], params["blocks"])
    _, outputs = jax.lax.scan(_block, x, blocks)
    return [_to_feature_map(tokens) for tokens in (x, *(outputs[i] for i in layers))]


def _embed(params: dict, images: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Embed images as tokens [B, 1 + h * h, D], the class token first, and add positions."""
    kernel = params["patch"]["kernel"]
    positions = params["positions"]
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"DINO needs square images [B, H, H, 3], got {images.shape}")
    patch, width = kernel.shape[0], kernel.shape[-1]
    grid = max(-(-images.shape[1] // patch), MIN_GRID)
    x = (bilinear_resize(images, grid * patch) - SHIFT) / SCALE
    x = x.reshape(-1, grid, patch, grid, patch, 3).astype(dtype)
    precision = product_precision(dtype)
    x = jnp.einsum("bhiwjc,ijcd->bhwd", x, kernel.astype(dtype), precision=precision)
    x = x + params["patch"]["bias"].astype(dtype)
    trained_grid = round((len(positions) - 1) ** 0.5)
    patch_positions = bicubic_resize(positions[1:].reshape(1, trained_grid, trained_grid, width), grid)
    x = (x + patch_positions.astype(dtype)).reshape(-1, grid * grid, width)
    class_token = jnp.broadcast_to((params["class_token"] + positions[:1]).astype(dtype), (len(x), 1, width))
    return jnp.concatenate([class_token, x], axis=1)


def _block(x: jax.Array, block: dict) -> tuple[jax.Array, jax.Array]:
    """Apply one block to tokens [B, T, D]; return them twice, as carry and as output of a scan."""
    qkv = _linear(block["qkv"], _norm(block["norm1"], x))
    q, k, v = (part.reshape(*x.shape[:2], -1, HEAD_SIZE) for part in jnp.split(qkv, 3, axis=-1))
    with jax.default_matmul_precision(product_precision(x.dtype)):  # the function has no precision argument
        y = jax.nn.dot_product_attention(q, k, v)
    x = x + _linear(block["proj"], y.reshape(x.shape))
    hidden = jax.nn.gelu(_linear(block["fc1"], _norm(block["norm2"], x)), approximate=False)
    x = x + _linear(block["fc2"], hidden)
    return x, x


def _linear(layer: dict, x: jax.Array) -> jax.Array:
    y = jnp.matmul(x, layer["kernel"].astype(x.dtype), precision=product_precision(x.dtype))
    return y + layer["bias"].astype(x.dtype)


def _norm(layer: dict, x: jax.Array) -> jax.Array:
    """Apply layer normalization in float32."""
    centered = x.astype(jnp.float32) - jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32)
    unit = centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-6)
    return (unit * layer["scale"] + layer["bias"]).astype(x.dtype)


def _to_feature_map(tokens: jax.Array) -> jax.Array:
    """Add the class token to the patch tokens: [B, 1 + h * h, D] to [B, h, h, D]."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return (tokens[:, 1:] + tokens[:, :1]).reshape(len(tokens), side, side, -1)
