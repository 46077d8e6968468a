"""What of a chip's memory a training step of the transformer leaves for activations."""

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.partition import TENSOR
from var_jax.training.chips import memory_bytes
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.flops import matrix_parameters
from var_jax.transformer.remat import WITH_SCORES, choose_remat, kept_bytes
from var_jax.transformer.trunk import MOST_LOGITS

SHARE = 0.9  # of the memory that is planned with: compilers and allocators need some


def remat_that_fits(stage: ConfigDict, cfg: TransformerConfig, mesh: Mesh, attention: str, dtype) -> str:
    """The policy of `config.transformer.remat` on a mesh; `auto`: the fastest that the chip's memory holds.

    An estimate from above; `var_jax.benchmarks.plan` asks the compiler.
    """
    itemsize, scores = jnp.dtype(dtype).itemsize, attention in WITH_SCORES
    tensor = mesh.shape.get(TENSOR, 1)
    images = stage.train.batch / stage.train.accumulate / (mesh.size / tensor)
    # Parameters, two moments, gradients and their sum, all float32; and what the products read.
    copies = 4 + (stage.train.ema > 0) + (stage.train.accumulate > 1)
    state = 4 * copies * matrix_parameters(cfg) / (mesh.shape["fsdp"] * tensor)
    logits = 3 * 4 * min(MOST_LOGITS, cfg.schedule.length) * cfg.num_codes / tensor
    block = kept_bytes(cfg, "none", itemsize, scores) / cfg.depth / tensor  # being worked out again
    room = SHARE * memory_bytes(mesh.devices.flat[0]) - state - images * (logits + block)
    platform = mesh.devices.flat[0].platform
    return choose_remat(cfg, stage.transformer.remat, images / tensor, room, itemsize, scores, platform)
