"""Workloads of the benchmarks: tasks of a config's stages, without trained weights."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.stages import TRANSFORMERS, stages_of
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.lpips import CHANNELS, LAYERS
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.task import compute_dtype, model_config
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.transformer_task import NextScaleTask

NEXT_SCALE_TASKS = ("next_scale", "align")
NUM_CLASSES = 1000
SCHEDULE_STEPS = 1000  # length of the schedules in a benchmarked run


def next_scale_stage(config: ConfigDict) -> ConfigDict:
    """Return the stage of a config that trains or aligns a next-scale transformer.

    Raises:
      ValueError: if it has none.
    """
    by_task = {stage.task: stage for stage in stages_of(config)}
    stages = [by_task[task] for task in NEXT_SCALE_TASKS if task in by_task]
    if not stages:
        raise ValueError(f"--config must have a stage next_scale; this one has {', '.join(by_task)}")
    return stages[0]


def make_tokenizer(config: ConfigDict, dtype: jnp.dtype) -> Tokenizer:
    """Build the tokenizer that a config's own stage trains, else the published one."""
    models = [stage.model for stage in stages_of(config) if stage.task == "tokenizer"]
    scales = next_scale_stage(config).scales
    fields = {"scales": scales} if scales else {}
    return Tokenizer(model_config(TokenizerConfig, models[0]) if models else TokenizerConfig(**fields), dtype)


def make_task(config: ConfigDict, mesh: Mesh, batch: int | None = None) -> NextScaleTask:
    """Build the task of a config's next_scale stage on a mesh; `batch` replaces the stage's own."""
    stage = next_scale_stage(config).copy_and_resolve_references()
    stage.train.batch = batch or stage.train.batch
    tokenizer = make_tokenizer(config, compute_dtype(stage.train.dtype))
    return TRANSFORMERS[stage.task](stage, SCHEDULE_STEPS, tokenizer, {}, NUM_CLASSES, mesh)


def abstract_tokenizer_params(tokenizer: Tokenizer):
    """Return the shapes of a tokenizer's parameters, boxed with their logical axis names."""
    side = tokenizer.config.image_size
    return jax.eval_shape(
        lambda key: tokenizer.init(key, jnp.zeros((1, side, side, 3)))["params"], jax.random.key(0)
    )


def make_tokenizer_task(stage: ConfigDict) -> TokenizerTask:
    """Build the task of a tokenizer stage, with shapes in place of the perceptual loss's weights.

    Raises:
      ValueError: if the discriminator uses DINO, whose shapes are known only from its file.
    """
    stage = stage.copy_and_resolve_references()
    if stage.adversarial.weight and stage.adversarial.network == "dino":
        raise ValueError("config.adversarial.network=dino cannot be planned without its file; use patch")
    return TokenizerTask(stage, SCHEDULE_STEPS, {"vgg": vgg_shapes()} if stage.loss.get("perceptual") else {})


def vgg_shapes() -> dict:
    """Return the shapes of the parameters that `vgg_features` and `perceptual_distance` read."""
    channels, conv = 3, {}
    for layer, convolutions in enumerate(LAYERS):
        for i in convolutions:
            kernel, bias = (3, 3, channels, CHANNELS[layer]), (CHANNELS[layer],)
            conv[str(i)] = {"kernel": _float32(kernel), "bias": _float32(bias)}
            channels = CHANNELS[layer]
    return {"conv": conv, "linear": {str(i): _float32((c,)) for i, c in enumerate(CHANNELS)}}


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
