"""What is measured: the next_scale stage of a config, beside a tokenizer of random weights."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.stages import stages_of
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.task import compute_dtype, model_config
from var_jax.training.transformer_task import NextScaleTask

CLASSES = 1000
STEPS = 1000  # of the run, as far as its schedules are concerned


def next_scale_stage(config: ConfigDict) -> ConfigDict:
    """The next_scale stage of a config.

    Raises:
      ValueError: where it has none.
    """
    found = {stage.task: stage for stage in stages_of(config)}
    if "next_scale" not in found:
        raise ValueError(f"--config must have a stage next_scale; this one has {', '.join(found)}")
    return found["next_scale"]


def tokenizer_of(config: ConfigDict, dtype: jnp.dtype) -> Tokenizer:
    """The tokenizer that a config trains too, else the published one."""
    own = [stage.model for stage in stages_of(config) if stage.task == "tokenizer"]
    scales = next_scale_stage(config).scales
    fields = {"scales": scales} if scales else {}
    return Tokenizer(model_config(TokenizerConfig, own[0]) if own else TokenizerConfig(**fields), dtype)


def make_task(config: ConfigDict, mesh: Mesh, batch: int | None = None) -> NextScaleTask:
    """The task of a config's next_scale stage, with its own batch or another, on a mesh."""
    stage = next_scale_stage(config).copy_and_resolve_references()
    stage.train.batch = batch or stage.train.batch
    tokenizer = tokenizer_of(config, compute_dtype(stage.train.dtype))
    return NextScaleTask(stage, STEPS, tokenizer, {}, CLASSES, mesh)


def tokenizer_shapes(tokenizer: Tokenizer):
    """The tokenizer's parameters as shapes, with their logical axis names."""
    side = tokenizer.config.image_size
    return jax.eval_shape(
        lambda key: tokenizer.init(key, jnp.zeros((1, side, side, 3)))["params"], jax.random.key(0)
    )
