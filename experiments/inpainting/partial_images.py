"""Inpainting of partially known images without leaks from the unknown part.

The unknown part must not reach the model.  A token depends on more than its own cell: the encoder's
convolutions overlap, its attention and norms see the whole image, and the coarse maps average over all of it.
Therefore the unknown part is painted over with a color of the known part before the image is encoded.

A token is known if its cell lies in the known part.  Cells that the mask touches are resampled, 1x1 maps
included.  (`LoadedVAR.inpaint` keeps 1x1 maps, as published; here they would hold the code of a half-painted
image.)

The maps of VAR's tokenizer add up, and each encodes the residual of those before it.  If some tokens are
sampled, the residual changes: known tokens are therefore encoded map by map, against the maps sampled so far.
For a tokenizer of one map, this is a single encoding.
"""

import dataclasses
from functools import partial

import jax
import numpy as np

import var_jax
from var_jax.images import denormalize_to_uint8, normalize
from var_jax.sampling.editing import mask_from_pixels
from var_jax.sampling.sampler import KnownTokens
from var_jax.scales import Scales
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.tokenizer.resize import area_matrix, area_resize
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.orders import inverse_permutation

GENERATE_BATCH = 256  # images


def unknown_masks(side: int) -> dict[str, np.ndarray]:
    """Return the unknown part of each task, bool [side, side]: upper half, left half, and center quarter."""
    masks = {name: np.zeros((side, side), bool) for name in ("top", "left", "centre")}
    half, quarter = side // 2, side // 4
    masks["top"][:half] = True
    masks["left"][:, :half] = True
    masks["centre"][quarter : side - quarter, quarter : side - quarter] = True
    return masks


def mask_with_median(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paint the unknown part of images in the median color of their known part (mostly its background).

    Args:
      images: uint8 [N, H, W, 3].
      mask: bool [H, W], True where unknown.

    Returns:
      uint8 [N, H, W, 3]; under the mask, each channel has the median of the other pixels.
    """
    median = np.median(images[:, ~mask], axis=1).astype(np.uint8)
    return np.where(mask[..., None], median[:, None, None], images)


def touching_tokens(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """Return the tokens whose cell has a pixel under the mask bool [H, W], as bool [L]; 1x1 maps included."""
    maps = []
    for side in scales.sides:
        rows, columns = (area_matrix(size, side) for size in mask.shape)
        maps.append((rows @ mask @ columns.T).ravel() > 0)
    return np.concatenate(maps)


def published_tokens(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """Return the tokens that published editing resamples under a mask [H, W], as bool [L]; not 1x1 maps."""
    return mask_from_pixels(mask[None], scales)[0]


def mostly_unknown_tokens(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """Return the tokens that published editing resamples under a mask [H, W], and 1x1 maps, as bool [L]."""
    return published_tokens(mask, scales) | (np.asarray(scales.sides)[scales.levels] == 1)


def share_of_known_seen(config: TransformerConfig, resample: np.ndarray) -> float:
    """Compute the share of the known tokens that precede a resampled token of the last map, on average.

    Args:
      config: of the transformer.
      resample: bool [L], True where a token is resampled.
    """
    scales = config.schedule
    last = resample & (scales.levels == len(scales) - 1)
    step = scales.levels  # VAR predicts a map at once
    if not config.predicts_maps:
        step = inverse_permutation(config.cells)
    return float((step[last][:, None] > step[~resample]).mean())


def fill_unknown(
    model: var_jax.LoadedVAR,
    images: np.ndarray,
    resample: np.ndarray,
    labels: np.ndarray,
    seed: int,
    once: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample the unknown part of images with the sampling options of the model's run.

    Args:
      model: VAR or next-token.
      images: uint8 [N, H, W, 3], with the unknown part painted over.
      resample: bool [L], tokens to sample.
      labels: int [N]; num_classes for "no class".
      seed: image i depends on (seed, i) alone.
      once: encode the known tokens of all maps at once, as published editing does, and not against the maps
        sampled so far.

    Returns:
      Images uint8 [N, H, W, 3], and their tokens int32 [N, L].
    """
    scales = model.module.config.schedule
    resample = np.broadcast_to(resample, (len(images), scales.length))
    tokenizer, params = model.tokenizer.module, model.tokenizer.params
    if once:
        tokens = model.tokenizer.encode(images.astype(np.float32) / 255)
        return _generate_first_maps(model, KnownTokens(tokens, resample), labels, seed, len(scales))
    features = _encode_features(tokenizer, params, images)
    tokens = np.zeros(resample.shape, np.int32)
    for k, (start, end) in enumerate(zip(scales.starts, scales.ends, strict=True)):
        tokens[:, start:end] = _encode_residual_map(tokenizer, params, features, tokens, k)
        known = KnownTokens(tokens, resample & (scales.levels == k))
        filled, sampled = _generate_first_maps(model, known, labels, seed, k + 1)
        tokens[:, start:end] = sampled[:, start:end]
    return filled, tokens


def _generate_first_maps(
    model, known: KnownTokens, labels, seed: int, num_maps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Generate images uint8 [N, H, W, 3] and tokens int32 [N, L] of the first `num_maps` maps."""
    options = dataclasses.replace(model.options, upto=num_maps)
    batch = min(GENERATE_BATCH, len(labels))
    images, tokens = zip(
        *model.generate_batches(labels, seed, batch, options, known=known, postprocess=denormalize_to_uint8),
        strict=True,
    )
    return np.concatenate(images), np.concatenate(tokens)


@partial(jax.jit, static_argnums=0)
def _encode_features(tokenizer: Tokenizer, params: dict, images: jax.Array) -> jax.Array:
    """Encode images uint8 [B, H, W, 3] as features float32 [B, h, w, C]."""
    return tokenizer.apply({"params": params}, normalize(images), method="features")


@partial(jax.jit, static_argnums=(0, 4))
def _encode_residual_map(tokenizer: Tokenizer, params: dict, features: jax.Array, tokens: jax.Array, k: int):
    """Encode the residual of features after the first k maps of tokens [B, L] as map k, int32 [B, s_k^2]."""
    quantizer = Quantizer.create(params["quantizer"], tokenizer.config)
    if k:
        features = features - quantizer.partial_sums(tokens[:, : quantizer.scales.starts[k]])[-1]
    small = area_resize(features, quantizer.scales.sides[k])
    return quantizer.nearest(small.reshape(small.shape[0], -1, small.shape[-1]))
