"""What the chips can do, from their vendors' data sheets, and the memory that a device has."""

import dataclasses
import os

import jax


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
    return next((found for name, found in CHIPS.items() if name in device.device_kind), None)


def peak_flops(device: jax.Device) -> float | None:
    """Peak of the device in FLOP/s, where known."""
    return found.flops if (found := chip(device)) else None


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
