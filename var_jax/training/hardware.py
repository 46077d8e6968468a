"""Data sheets of accelerators, device memory, and what of it training and previews take."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.errors import ConfigError, config_errors
from var_jax.sampling.auto_batch_size import bytes_per_image
from var_jax.sampling.options import PerScaleOptions
from var_jax.sharding import TENSOR
from var_jax.tokenizer.model import Tokenizer
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.flops import matrix_parameters
from var_jax.transformer.model import LOGITS_CHUNK, ARTransformer
from var_jax.transformer.remat import WITH_SCORES, choose_remat, recomputed_block_bytes

USABLE_MEMORY_FRACTION = 0.9  # of a device; the compiler and the allocator need the rest
MAX_PREVIEW_IMAGES = 8  # that a device generates at once


# --- Data sheets


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data sheet of one device, as JAX counts devices.

    Attributes:
      flops: dense bfloat16 peak, FLOP/s.
      memory: bytes.
      bandwidth: memory bandwidth, bytes/s.
      link: bandwidth to other chips of the slice or node, all links in one direction, bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# By a part of JAX's `device_kind`; the first match counts.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1.23e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.82e12, 200e9),
    "TPU v5e": Chip(197e12, 16 * 2**30, 0.82e12, 200e9),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.77e12, 600e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.77e12, 600e9),
    "TPU v6": Chip(918e12, 32 * 2**30, 1.64e12, 400e9),
    "H100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9),
    "A100": Chip(312e12, 40e9, 1.56e12, 300e9),
}


def chip(device: jax.Device) -> Chip | None:
    """Look up the data sheet of a device; None if it is unknown."""
    return next((sheet for name, sheet in CHIPS.items() if name in device.device_kind), None)


def peak_flops(device: jax.Device) -> float | None:
    """Return the dense bfloat16 peak of a device in FLOP/s; None if it is unknown."""
    return sheet.flops if (sheet := chip(device)) else None


# --- Memory of devices


def gpu_allocator_share() -> float:
    """Return the fraction of a GPU's memory that JAX preallocates and never exceeds."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))


def memory_bytes(device: jax.Device) -> float | None:
    """Return the memory in bytes of a device of this process, or of one that is only compiled for.

    It is the limit of the allocator, else the memory of the data sheet, else None; on CPU an equal share of
    the machine's memory.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    try:
        stats = device.memory_stats() or {}
    except (AttributeError, jax.errors.JaxRuntimeError):  # a device that is only compiled for
        stats = {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    sheet = chip(device)
    if sheet is None:
        return None
    return sheet.memory * (gpu_allocator_share() if device.platform == "gpu" else 1.0)


def smallest_memory(mesh: Mesh) -> float | None:
    """Return the memory in bytes of the smallest device of a mesh, the same value on all its processes.

    A process can only query its own devices, so the processes gather their values. None if the memory of any
    device is unknown.
    """
    local_devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    memory = [memory_bytes(device) for device in local_devices]
    smallest = min(memory) if memory and None not in memory else 0.0
    if jax.process_count() > 1 and len(local_devices) < mesh.size:
        mebibytes = np.int32(smallest / 2**20)  # JAX gathers 32-bit integers
        smallest = float(multihost_utils.process_allgather(mebibytes).min()) * 2**20
    return smallest or None


# --- Memory of training and previews


def rows_per_image(stage: ConfigDict) -> int:
    """Return the number of sequences of a training step per image: two in an alignment."""
    return 2 if stage.get("task") == "align" else 1


def state_bytes(stage: ConfigDict, cfg: TransformerConfig, mesh: Mesh) -> float:
    """Estimate the float32 bytes of the training state and gradients on one device, matrices only."""
    # Parameters, two moments and gradients; the moving average, and the sum of accumulated gradients.
    copies = 4 + (stage.train.ema_decay > 0) + (stage.train.grad_accum_steps > 1)
    copies += stage.get("task") == "align"  # the reference
    return 4 * copies * matrix_parameters(cfg) / (mesh.shape["fsdp"] * mesh.shape.get(TENSOR, 1))


def preview_images(
    stage: ConfigDict,
    tokenizer: Tokenizer,
    model: ARTransformer,
    per_scale: PerScaleOptions,
    memory: float | None,
    mesh: Mesh,
) -> int:
    """Choose how many preview images a device generates at once, with the training state in memory.

    Args:
      stage: config of the stage.
      tokenizer: decodes the images.
      model: predicts the tokens.
      per_scale: sampling options.
      memory: bytes of a device, as `smallest_memory` returns it; None gives one image.
      mesh: mesh of the run.

    Returns:
      A number from 1 to MAX_PREVIEW_IMAGES.
    """
    room = USABLE_MEMORY_FRACTION * (memory or 0.0) - state_bytes(stage, model.config, mesh)
    fits = int(room / 2 // bytes_per_image(tokenizer, model, per_scale))
    return max(1, min(fits, MAX_PREVIEW_IMAGES))


def remat_that_fits(
    stage: ConfigDict, cfg: TransformerConfig, mesh: Mesh, attention: str, dtype, scan_layers: bool
) -> str:
    """Resolve `config.transformer.remat`; `auto` is the fastest policy whose activations fit into memory.

    The estimate is an upper bound; `benchmarks.plan` asks the compiler.

    Args:
      stage: config of the stage.
      cfg: architecture.
      mesh: mesh of the run.
      attention: attention implementation.
      dtype: of the activations.
      scan_layers: whether the layers are scanned.

    Raises:
      ConfigError: if the policy does not exist, or is `auto` and the memory is unknown.
    """
    memory = smallest_memory(mesh)  # gathered for any policy, so that hosts with different ones do not hang
    if memory is None:
        if stage.transformer.remat == "auto":
            kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
            raise ConfigError(f"the memory of {kinds} is not known; set config.transformer.remat")
        memory = 0.0
    itemsize = jnp.dtype(dtype).itemsize
    scores = attention in WITH_SCORES
    tensor = mesh.shape.get(TENSOR, 1)
    images = stage.train.batch / stage.train.grad_accum_steps / (mesh.size / tensor) * rows_per_image(stage)
    logits = 3 * 4 * min(LOGITS_CHUNK, cfg.schedule.length) * cfg.num_codes / tensor
    block = recomputed_block_bytes(cfg, itemsize, scores) / tensor
    room = USABLE_MEMORY_FRACTION * memory - state_bytes(stage, cfg, mesh) - images * (logits + block)
    platform = mesh.devices.flat[0].platform
    with config_errors():
        policy = stage.transformer.remat
        return choose_remat(cfg, policy, images / tensor, room, itemsize, scores, platform, scan_layers)
