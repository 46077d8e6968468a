"""Accelerators that are known by name, their memory, and what a training step takes of it."""

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
from var_jax.sampling.options import ScaleControls
from var_jax.sharding import TENSOR
from var_jax.tokenizer.model import Tokenizer
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.flops import matrix_parameters
from var_jax.transformer.model import LOGITS_CHUNK, ARTransformer
from var_jax.transformer.remat import WITH_SCORES, choose_remat, saved_activation_bytes


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      flops: dense bfloat16 peak, FLOP/s.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      link: to other chips of the slice or node, all links of a chip in one direction, bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# By a part of JAX's `device_kind`; the first that fits counts.
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
    """The data sheet of a device, where it is known."""
    return next((result for name, result in CHIPS.items() if name in device.device_kind), None)


def peak_flops(device: jax.Device) -> float | None:
    """Peak of the device in FLOP/s, where known."""
    return result.flops if (result := chip(device)) else None


def memory_bytes(device: jax.Device) -> float | None:
    """Memory of a device of this process, or of one that is only compiled for, in bytes.

    That of its allocator, else of its data sheet, else None; on a CPU its share of the machine's.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    if "bytes_limit" in (stats := _stats(device)):
        return stats["bytes_limit"]
    known = chip(device)
    if known is None:
        return None
    return known.memory * (gpu_allocator_share() if device.platform == "gpu" else 1.0)


def gpu_allocator_share() -> float:
    """Share of a GPU's memory that JAX takes at the start, and never more."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))


def _stats(device: jax.Device) -> dict:
    """What the device says of its memory; nothing where it is only compiled for."""
    try:
        return device.memory_stats() or {}
    except (AttributeError, jax.errors.JaxRuntimeError):
        return {}


SHARE = 0.9  # of the memory that is planned with: compilers and allocators need some
MAX_PREVIEW = 8  # images a device generates at once for a preview


def smallest_memory(mesh: Mesh) -> float | None:
    """Memory in bytes of the smallest device of a mesh, the same value on all its processes.

    A process can ask its own devices only, so the processes gather what each knows.  None where one of them
    does not know.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    known = [memory_bytes(device) for device in own]
    smallest = min(known) if known and None not in known else 0.0
    if jax.process_count() > 1 and len(own) < mesh.size:
        mebibytes = np.int32(smallest / 2**20)  # arrays of JAX have 32 bits
        smallest = float(multihost_utils.process_allgather(mebibytes).min()) * 2**20
    return smallest or None


def state_bytes(stage: ConfigDict, cfg: TransformerConfig, mesh: Mesh) -> float:
    """Bytes of the training state and the gradients on one device: matrices alone, all float32."""
    # Parameters, two moments, gradients and their sum; and what the products read.
    copies = 4 + (stage.train.ema_decay > 0) + (stage.train.grad_accum_steps > 1)
    return 4 * copies * matrix_parameters(cfg) / (mesh.shape["fsdp"] * mesh.shape.get(TENSOR, 1))


def preview_images(
    stage: ConfigDict,
    tokenizer: Tokenizer,
    model: ARTransformer,
    controls: ScaleControls,
    memory: float | None,
    mesh: Mesh,
) -> int:
    """Images that one device generates at once for a preview, beside the training state: 1 to MAX_PREVIEW.

    `memory` of a device is that of `smallest_memory`; None, not known, makes one image at a time.
    """
    room = SHARE * (memory or 0.0) - state_bytes(stage, model.config, mesh)
    fits = int(room / 2 // bytes_per_image(tokenizer, model, controls))
    return max(1, min(fits, MAX_PREVIEW))


def remat_that_fits(stage: ConfigDict, cfg: TransformerConfig, mesh: Mesh, attention: str, dtype) -> str:
    """The policy of `config.transformer.remat` on a mesh; `auto`: the fastest that the chip's memory holds.

    An estimate from above; `benchmarks.plan` asks the compiler.

    Raises:
      ConfigError: on a policy that does not exist; for `auto` where the memory is not known.
    """
    memory = smallest_memory(
        mesh
    )  # gathered whatever the policy, so that hosts with different ones do not hang
    if memory is None:
        if stage.transformer.remat == "auto":
            kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
            raise ConfigError(f"the memory of {kinds} is not known; set config.transformer.remat")
        memory = 0.0
    itemsize, scores = jnp.dtype(dtype).itemsize, attention in WITH_SCORES
    tensor = mesh.shape.get(TENSOR, 1)
    images = stage.train.batch / stage.train.grad_accum_steps / (mesh.size / tensor)
    logits = 3 * 4 * min(LOGITS_CHUNK, cfg.schedule.length) * cfg.num_codes / tensor
    block = (
        saved_activation_bytes(cfg, "none", itemsize, scores) / cfg.depth / tensor
    )  # being worked out again
    room = SHARE * memory - state_bytes(stage, cfg, mesh) - images * (logits + block)
    platform = mesh.devices.flat[0].platform
    with config_errors():
        return choose_remat(cfg, stage.transformer.remat, images / tensor, room, itemsize, scores, platform)
