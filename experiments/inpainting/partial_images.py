"""Images that are known in part: what a model is told of them, and how it makes the rest.

Nothing of the unknown part may reach the model.  A token sees far beyond its own cell: the encoder's
convolutions overlap, its attention and its norms see the whole image, and the coarse maps are means over all
of it.  So the unknown part is painted over before the image is encoded, with a colour of the known part.

A token is then known where its cell lies in the known part.  A cell that the mask touches is made anew, and a
1x1 map with it: `LoadedVAR.inpaint` keeps that as published, and would here keep the code of a half-painted
image.

The maps of VAR's tokenizer add up, and each encodes what those before it left.  With some of them drawn, what
is left is another: known tokens are therefore encoded map by map, against what was drawn so far.  For a
tokenizer of one map that is to encode once.
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
from var_jax.transformer.positions import inverse

BATCH = 256  # images made at once


def masks(side: int) -> dict[str, np.ndarray]:
    """What is unknown in each task, bool [side, side]: the upper half, the left half, the centre quarter."""
    result = {name: np.zeros((side, side), bool) for name in ("top", "left", "centre")}
    half, quarter = side // 2, side // 4
    result["top"][:half] = True
    result["left"][:, :half] = True
    result["centre"][quarter : side - quarter, quarter : side - quarter] = True
    return result


def mask_with_median(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Images whose unknown part has the colour that is usual in their known part (its background, mostly).

    Args:
      images: uint8 [N, H, W, 3].
      mask: bool [H, W], True where unknown.

    Returns:
      uint8 [N, H, W, 3]; under the mask the median of the other pixels, channel by channel.
    """
    usual = np.median(images[:, ~mask], axis=1).astype(np.uint8)
    return np.where(mask[..., None], usual[:, None, None], images)


def touching_tokens(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """bool [L]: tokens whose cell has a pixel under the mask, bool [H, W]; a 1x1 map is one such cell."""
    maps = []
    for side in scales.sides:
        rows, columns = (area_matrix(size, side) for size in mask.shape)
        maps.append((rows @ mask @ columns.T).ravel() > 0)
    return np.concatenate(maps)


def published(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """bool [L]: tokens that published editing makes anew under a mask [H, W]; 1x1 maps are kept."""
    return mask_from_pixels(mask[None], scales)[0]


def mostly_unknown(mask: np.ndarray, scales: Scales) -> np.ndarray:
    """bool [L]: tokens that published editing makes anew under a mask [H, W], and all 1x1 maps."""
    return published(mask, scales) | (np.asarray(scales.sides)[scales.levels] == 1)


def share_seen(config: TransformerConfig, resample: np.ndarray) -> float:
    """Share of the known tokens that a token of the last map sees when it is made, mean over those made anew.

    Args:
      config: of the transformer.
      resample: bool [L], True where a token is made anew.
    """
    scales = config.schedule
    last = resample & (scales.levels == len(scales) - 1)
    when = scales.levels  # of VAR, a map at once
    if not config.predicts_maps:
        when = inverse(config.cells)
    return float((when[last][:, None] > when[~resample]).mean())


def fill(
    model: var_jax.LoadedVAR,
    images: np.ndarray,
    resample: np.ndarray,
    labels: np.ndarray,
    seed: int,
    once: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the unknown part of images, drawing as the model's run does.

    Args:
      model: VAR or next-token.
      images: uint8 [N, H, W, 3], painted over.
      resample: bool [L], tokens to make anew.
      labels: int [N]; num_classes for "no class".
      seed: image i depends on (seed, i) alone.
      once: encode the known tokens of all maps at once, as published editing does, and not against what is
        drawn.

    Returns:
      Images uint8 [N, H, W, 3], and their tokens int32 [N, L].
    """
    scales = model.module.config.schedule
    resample = np.broadcast_to(resample, (len(images), scales.length))
    tokenizer, params = model.tokenizer.module, model.tokenizer.params
    if once:
        tokens = model.tokenizer.encode(images.astype(np.float32) / 255)
        return _drawn(model, KnownTokens(tokens, resample), labels, seed, len(scales))
    features = _features(tokenizer, params, images)
    tokens = np.zeros(resample.shape, np.int32)
    for k, (start, end) in enumerate(zip(scales.starts, scales.ends, strict=True)):
        tokens[:, start:end] = _map_of_rest(tokenizer, params, features, tokens, k)
        given = KnownTokens(tokens, resample & (scales.levels == k))
        made, drawn = _drawn(model, given, labels, seed, k + 1)
        tokens[:, start:end] = drawn[:, start:end]
    return made, tokens


def _drawn(model, given: KnownTokens, labels, seed: int, maps: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 and tokens of the first so many maps."""
    options = dataclasses.replace(model.options, upto=maps)
    batch = min(BATCH, len(labels))
    images, tokens = zip(
        *model.generate_batches(labels, seed, batch, options, known=given, postprocess=denormalize_to_uint8),
        strict=True,
    )
    return np.concatenate(images), np.concatenate(tokens)


@partial(jax.jit, static_argnums=0)
def _features(tokenizer: Tokenizer, params: dict, images: jax.Array) -> jax.Array:
    """Images uint8 -> features float32 [B, h, w, C]."""
    return tokenizer.apply({"params": params}, normalize(images), method="features")


@partial(jax.jit, static_argnums=(0, 4))
def _map_of_rest(tokenizer: Tokenizer, params: dict, features: jax.Array, tokens: jax.Array, k: int):
    """Tokens int32 [B, s_k^2] of map k of what the maps before it, of tokens [B, L], leave of features."""
    quantizer = Quantizer.create(params["quantizer"], tokenizer.config)
    if k:
        features = features - quantizer.partial_sums(tokens[:, : quantizer.scales.starts[k]])[-1]
    small = area_resize(features, quantizer.scales.sides[k])
    return quantizer.nearest(small.reshape(small.shape[0], -1, small.shape[-1]))
