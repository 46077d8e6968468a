"""Features of images from a frozen DINO vision transformer (Caron et al. 2021), for a discriminator.

They are those of StyleGAN-T's discriminator (Sauer et al. 2023), which VAR's is of the kind of: tokens of
several depths, the class token added to each.

Parameters are a plain tree, read from a file by `interop/dino.py`, with patches of P x P pixels, width D and
a grid of G x G positions (P = 16, D = 384 and G = 14 in ViT-S/16):
{"patch": {"kernel" [P, P, 3, D], "bias"}, "class_token": [1, D], "positions": [1 + G * G, D], "blocks":
{"norm1": {"scale", "bias"}, "qkv": {"kernel", "bias"}, "proj", "norm2", "fc1", "fc2"}}, those of the blocks
with a leading axis.
"""

import jax
import jax.numpy as jnp

from var_jax.dtypes import product_precision
from var_jax.tokenizer.lpips import SCALE, SHIFT
from var_jax.tokenizer.resize import bicubic_resize, bilinear_resize

HEAD_SIZE = 64
SMALLEST_GRID = 4  # patches a side; smaller images are enlarged


def dino_features(
    params: dict, images: jax.Array, layers: tuple[int, ...] | None = None, dtype: jnp.dtype = jnp.float32
) -> list[jax.Array]:
    """Square images [B, H, H, 3] in [-1, 1] -> 1 + len(layers) feature maps [B, h, h, D], h = ceil(H / P).

    Images are taken at their own size, enlarged to the next multiple of P.  Shrinking 256 pixels to the 224
    of DINO's larger crops would hide the finest detail from the discriminator, which is what it is for; and
    DINO, trained on crops of 224 and 96 pixels with interpolated positions, is not bound to one size.

    Args:
      params: of `load_dino`; no gradient flows to them where they are not differentiated.
      images: at least 4 patches a side, or they are enlarged to that (16 pixels to 64).
      layers: blocks, counted from 0, after which features are taken; by default the last of each quarter
        (2, 5, 8 and 11 of ViT-S).  Blocks past the last are not computed.
      dtype: of the matrix products and of what is returned; normalisation is in float32.

    Returns:
      Patch tokens, with the class token added to each: first the embedding, then after each of `layers`.

    Raises:
      ValueError: on images of another shape, or layers that the network does not have.
    """
    depth = params["blocks"]["qkv"]["kernel"].shape[0]
    if layers is None:
        layers = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    if not layers or not all(0 <= i < depth for i in layers):
        raise ValueError(f"DINO of {depth} blocks has layers 0 to {depth - 1}, asked for {layers}")
    x = _embed(params, images, dtype)
    blocks = jax.tree.map(lambda leaf: leaf[: max(layers) + 1], params["blocks"])
    _, after = jax.lax.scan(_block, x, blocks)
    return [_as_map(tokens) for tokens in (x, *(after[i] for i in layers))]


def _embed(params: dict, images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Images -> tokens [B, 1 + h * h, D], the class token first, positions added."""
    kernel, positions = params["patch"]["kernel"], params["positions"]
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise ValueError(f"DINO needs square images [B, H, H, 3], got {images.shape}")
    patch, width = kernel.shape[0], kernel.shape[-1]
    grid = max(-(-images.shape[1] // patch), SMALLEST_GRID)
    x = (bilinear_resize(images, grid * patch) - SHIFT) / SCALE
    x = x.reshape(-1, grid, patch, grid, patch, 3).astype(dtype)
    precision = product_precision(dtype)
    x = jnp.einsum("bhiwjc,ijcd->bhwd", x, kernel.astype(dtype), precision=precision)
    x = x + params["patch"]["bias"].astype(dtype)
    trained = round((len(positions) - 1) ** 0.5)
    at_patch = bicubic_resize(positions[1:].reshape(1, trained, trained, width), grid)
    x = (x + at_patch.astype(dtype)).reshape(-1, grid * grid, width)
    first = jnp.broadcast_to((params["class_token"] + positions[:1]).astype(dtype), (len(x), 1, width))
    return jnp.concatenate([first, x], axis=1)


def _block(x: jax.Array, block: dict) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, T, D] and one block's parameters -> tokens twice: to go on with, and to collect."""
    qkv = _linear(block["qkv"], _norm(block["norm1"], x))
    q, k, v = (part.reshape(*x.shape[:2], -1, HEAD_SIZE) for part in jnp.split(qkv, 3, axis=-1))
    with jax.default_matmul_precision(product_precision(x.dtype)):  # it takes no precision as an argument
        attended = jax.nn.dot_product_attention(q, k, v)
    x = x + _linear(block["proj"], attended.reshape(x.shape))
    hidden = jax.nn.gelu(_linear(block["fc1"], _norm(block["norm2"], x)), approximate=False)
    x = x + _linear(block["fc2"], hidden)
    return x, x


def _linear(layer: dict, x: jax.Array) -> jax.Array:
    y = jnp.matmul(x, layer["kernel"].astype(x.dtype), precision=product_precision(x.dtype))
    return y + layer["bias"].astype(x.dtype)


def _norm(layer: dict, x: jax.Array) -> jax.Array:
    """Layer normalisation, in float32."""
    centred = x.astype(jnp.float32) - jnp.mean(x, axis=-1, keepdims=True, dtype=jnp.float32)
    unit = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
    return (unit * layer["scale"] + layer["bias"]).astype(x.dtype)


def _as_map(tokens: jax.Array) -> jax.Array:
    """Tokens [B, 1 + h * h, D] -> [B, h, h, D] with the class token added."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return (tokens[:, 1:] + tokens[:, :1]).reshape(len(tokens), side, side, -1)
