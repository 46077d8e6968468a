"""Estimates of the number of images that fit into device memory at once."""

import os

import jax
import jax.numpy as jnp

from var_jax.sampling.options import PerScaleOptions
from var_jax.tokenizer.model import Tokenizer
from var_jax.transformer.model import ARTransformer

MAX_IMAGES_PER_DEVICE = 128  # larger batches are not faster
MEMORY_FRACTION = 0.7  # of the free memory; the rest is a margin, since the estimate is rough
CODEC_BYTES = 2**31  # activations of the encoder or the decoder at once; fits a 16 GB chip with a d30


def bytes_per_image(tokenizer: Tokenizer, model: ARTransformer, per_scale: PerScaleOptions) -> int:
    """Estimate an upper bound of the memory that each image of a generated batch takes.

    The larger of two peaks: the cache with the logits of the last map, and the decoder's widest level.
    """
    cfg, itemsize = model.config, jnp.dtype(model.dtype).itemsize
    sequences = 2 if per_scale.num_guided_scales else 1
    positions = cfg.scales[per_scale.num_maps - 1] ** 2
    keys = cfg.schedule.length if cfg.uses_cache else positions
    cache = 2 * cfg.depth * cfg.schedule.length * cfg.width * itemsize if cfg.uses_cache else 0
    cross = 0
    if cfg.condition != "label":
        keys += cfg.condition_length
        cross = 2 * cfg.depth * cfg.condition_length * cfg.width * itemsize
    # A cache that is written in a loop is held twice, attention scores in float32 and in the compute dtype.
    scores = 2 * cfg.num_heads * positions * keys * 4
    logits = 6 * positions * cfg.num_codes * 4  # with and without class, guided, filtered, noise, sorted
    transformer = sequences * (2 * cache + cross + scores) + logits
    return max(transformer, _codec_bytes(tokenizer) + sequences * (cache + cross))


def _codec_bytes(tokenizer: Tokenizer) -> int:
    """Estimate an upper bound of the decoder's memory for one image: six arrays of the widest level.

    At 256 pixels and in float32 it gives 240 MiB; the CPU compiler takes 120.
    """
    pixels = tokenizer.config.image_size**2
    channels = tokenizer.config.ch * tokenizer.config.ch_mult[0]
    return 6 * pixels * channels * jnp.dtype(tokenizer.dtype).itemsize


def codec_batch(tokenizer: Tokenizer) -> int:
    """Return the number of images to encode or decode at once: a power of two that fits CODEC_BYTES."""
    dtype_ratio = tokenizer.dtype_of_encoder.itemsize / jnp.dtype(tokenizer.dtype).itemsize
    capacity = max(1, int(CODEC_BYTES / _codec_bytes(tokenizer) / max(dtype_ratio, 1)))
    return 1 << (capacity.bit_length() - 1)


def free_bytes(device: jax.Device) -> int:
    """Return the free memory of a device; for a CPU device, its share of the machine's free memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // jax.local_device_count()


def largest_batch(
    tokenizer: Tokenizer,
    model: ARTransformer,
    per_scale: PerScaleOptions,
    images: int,
    refiner: ARTransformer | None = None,
) -> int:
    """Return the number of images to generate at once over all devices, a power of two per device.

    Args:
      tokenizer: decodes the images.
      model: generates the tokens.
      per_scale: sampling options of every scale.
      images: number of images wanted; the batch is at most the next power of two per device.
      refiner: generates the tokens of the last maps, after the model.
    """
    models = [model] if refiner is None else [model, refiner]
    free = min(free_bytes(device) for device in jax.local_devices())
    capacity = int(MEMORY_FRACTION * free) // max(bytes_per_image(tokenizer, m, per_scale) for m in models)
    needed = -(-images // jax.device_count())
    per_device = max(1, min(capacity, MAX_IMAGES_PER_DEVICE, 1 << (needed - 1).bit_length()))
    return (1 << (per_device.bit_length() - 1)) * jax.device_count()
