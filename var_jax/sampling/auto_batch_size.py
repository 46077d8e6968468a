"""How many images to make at once: what the memory of a device holds."""

import os

import jax
import jax.numpy as jnp

from var_jax.sampling.options import ScaleControls
from var_jax.tokenizer.model import Tokenizer
from var_jax.transformer.model import ARTransformer

LARGEST = 128  # images a device; more gains nothing
SHARE = 0.7  # of the free memory that is asked for: the estimate is rough
CODEC_BYTES = 2**31  # activations of the encoder or the decoder at once; fits a 16 GB chip with a d30


def bytes_per_image(tokenizer: Tokenizer, model: ARTransformer, controls: ScaleControls) -> int:
    """Memory that one more image in a batch takes while it is generated, roughly, from above.

    The larger of the two ends: the cache with the logits of the last map, and the decoder's widest level.
    """
    cfg, width = model.config, jnp.dtype(model.dtype).itemsize
    sequences = 2 if controls.num_guided_scales else 1
    positions = cfg.scales[controls.scales - 1] ** 2
    cache = 2 * cfg.depth * cfg.schedule.length * cfg.width * width
    # Kept twice where it is written in a loop; scores of attention in float32 and as they are read.
    scores = 2 * cfg.num_heads * positions * cfg.schedule.length * 4
    logits = 6 * positions * cfg.num_codes * 4  # with and without class, guided, filtered, noise, sorted
    transformer = sequences * (2 * cache + scores) + logits
    return max(transformer, _codec_bytes(tokenizer) + sequences * cache)


def _codec_bytes(tokenizer: Tokenizer) -> int:
    """Memory of one image in the decoder, from above: six arrays of the widest level.

    At 256 pixels and in float32 it gives 240 MiB; the CPU compiler takes 120.
    """
    pixels, widest = tokenizer.config.image_size**2, tokenizer.config.ch * tokenizer.config.ch_mult[0]
    return 6 * pixels * widest * jnp.dtype(tokenizer.dtype).itemsize


def codec_batch(tokenizer: Tokenizer) -> int:
    """Return how many images to encode or decode at once: a power of two that takes CODEC_BYTES or less."""
    wider = tokenizer.dtype_of_encoder.itemsize / jnp.dtype(tokenizer.dtype).itemsize
    fits = max(1, int(CODEC_BYTES / _codec_bytes(tokenizer) / max(wider, 1)))
    return 1 << (fits.bit_length() - 1)


def free_bytes(device: jax.Device) -> int:
    """Free memory of a device; on a CPU its share of what the machine has free."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // jax.local_device_count()


def largest_batch(tokenizer: Tokenizer, model: ARTransformer, controls: ScaleControls, images: int) -> int:
    """Images to make at once over all devices: a power of two a device, and not far over `images`."""
    free = min(free_bytes(device) for device in jax.local_devices())
    fits = int(SHARE * free) // bytes_per_image(tokenizer, model, controls)
    needed = -(-images // jax.device_count())
    each = max(1, min(fits, LARGEST, 1 << (needed - 1).bit_length()))
    return (1 << (each.bit_length() - 1)) * jax.device_count()
