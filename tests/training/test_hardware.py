"""Choices that depend on the memory of devices, known or unknown."""

import types

import jax
import pytest

from configs import var
from var_jax.errors import ConfigError
from var_jax.sampling.options import SamplingOptions
from var_jax.sharding import make_mesh
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training import hardware
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.next_scale import NextScale

GIB = 2**30


def gpu(kind: str, stats: dict | None):
    return types.SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: stats)


def of_another_process():
    raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices")


def test_memory_is_the_allocators_then_the_data_sheets():
    assert hardware.memory_bytes(gpu("NVIDIA L40S", {"bytes_limit": 33 * GIB})) == 33 * GIB
    assert (
        60e9 <= hardware.memory_bytes(gpu("NVIDIA H100 80GB HBM3", None)) <= 80e9
    )  # JAX takes a share of it
    assert hardware.memory_bytes(gpu("NVIDIA L40S", None)) is None
    far = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA L40S", memory_stats=of_another_process)
    assert hardware.memory_bytes(far) is None


def choose(monkeypatch, known, **transformer) -> str:
    """Return the remat policy for eight devices with these amounts of memory."""
    values = iter(known)
    monkeypatch.setattr(hardware, "memory_bytes", lambda _: next(values))
    stage = var.get_config("d16")
    stage.train.batch = 48 * 8
    stage.transformer.update(transformer)
    return hardware.remat_that_fits(stage, NextScaleConfig(depth=16), make_mesh(), "splash", "bfloat16", True)


def test_the_smallest_of_the_devices_decides(monkeypatch):
    assert choose(monkeypatch, [80 * GIB] * 8) == "none"
    assert choose(monkeypatch, [80 * GIB] * 7 + [8 * GIB]) == "full"


def test_unknown_memory_asks_for_a_policy(monkeypatch):
    unknown = [80 * GIB] * 7 + [None]
    with pytest.raises(ConfigError, match="the memory of cpu is not known; set config.transformer.remat"):
        choose(monkeypatch, unknown)
    assert choose(monkeypatch, unknown, remat="mlp") == "mlp"


@pytest.mark.parametrize(
    ("depth", "gib", "devices", "images"),
    [(16, 80, 8, 8), (16, 16, 8, 8), (30, 16, 1, 1), (36, 16, 8, 1), (16, None, 8, 1)],
)
def test_images_of_a_preview_fit_beside_the_state(depth, gib, devices, images):
    stage = var.get_config(f"d{depth}")
    tokenizer = Tokenizer(TokenizerConfig(scales=stage.scales), "bfloat16")
    config = NextScaleConfig(depth=depth, width=64 * depth, num_heads=depth, scales=stage.scales)
    per_scale = SamplingOptions().per_scale(config.schedule, config.num_codes)
    mesh = make_mesh(devices=jax.devices()[:devices])
    bytes_of = None if gib is None else gib * GIB
    args = stage, tokenizer, NextScale(config, "bfloat16"), per_scale, bytes_of, mesh
    assert hardware.preview_images(*args) == images
