"""What is measured: a stage of a config, with random weights or shapes for what it builds on."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.stages import stages_of
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.lpips import CHANNELS, LAYERS
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.task import compute_dtype, model_config
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.transformer_task import NextScaleTask

CLASSES = 1000
STEPS = 1000  # of the run, as far as its schedules are concerned


def next_scale_stage(config: ConfigDict) -> ConfigDict:
    """The next_scale stage of a config.

    Raises:
      ValueError: where it has none.
    """
    result = {stage.task: stage for stage in stages_of(config)}
    if "next_scale" not in result:
        raise ValueError(f"--config must have a stage next_scale; this one has {', '.join(result)}")
    return result["next_scale"]


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


def make_tokenizer_task(stage: ConfigDict) -> TokenizerTask:
    """The task of a tokenizer stage; the networks of the perceptual loss are shapes.

    Raises:
      ValueError: where the discriminator uses DINO, whose shapes only its file has.
    """
    stage = stage.copy_and_resolve_references()
    if stage.adversarial.weight and stage.adversarial.network == "dino":
        raise ValueError("config.adversarial.network=dino cannot be planned without its file; use patch")
    return TokenizerTask(stage, STEPS, {"vgg": vgg_shapes()} if stage.loss.get("perceptual") else {})


def vgg_shapes() -> dict:
    """Shapes of the parameters that `vgg_features` and `perceptual_distance` read."""
    channels, conv = 3, {}
    for layer, convolutions in enumerate(LAYERS):
        for i in convolutions:
            kernel, bias = (3, 3, channels, CHANNELS[layer]), (CHANNELS[layer],)
            conv[str(i)] = {"kernel": _float32(kernel), "bias": _float32(bias)}
            channels = CHANNELS[layer]
    return {"conv": conv, "linear": {str(i): _float32((c,)) for i, c in enumerate(CHANNELS)}}


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
