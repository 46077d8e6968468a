"""Programs of training and sampling with abstract arguments: shapes and shardings in place of arrays."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.workload import SCHEDULE_STEPS, abstract_tokenizer_params
from var_jax.sampling.cast_params import in_compute_dtype, tokenizer_in_compute_dtype
from var_jax.sampling.options import PerScaleOptions
from var_jax.sampling.sampler import Networks, generate, image_keys
from var_jax.sharding import batch_sharding, on_mesh, replicated
from var_jax.training.align_task import AlignTask
from var_jax.training.jit_steps import eval_batch_size, jit_eval_step, jit_train_step
from var_jax.training.state import TrainState, create_state
from var_jax.training.task import Task
from var_jax.training.transformer_task import TransformerTask

Programs = dict[str, tuple[Callable, tuple]]  # name -> jitted function and its abstract arguments


def abstract_replicated(tree, mesh: Mesh):
    """Return a tree of shapes that are replicated on every device of a mesh."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), tree
    )


def abstract_frozen(task: Task) -> dict:
    """Return the shapes of `task.frozen`: of the tokenizer's parameters, and of an alignment's reference."""
    if not isinstance(task, TransformerTask):
        return task.frozen
    frozen = {"tokenizer": nn.meta.unbox(abstract_tokenizer_params(task.tokenizer))}
    if isinstance(task, AlignTask):
        frozen["reference"] = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    return frozen


def abstract_batch(task: Task, mesh: Mesh, size: int, from_tokens: bool) -> dict:
    """Return shapes and shardings of a global batch of `size` records of the loader."""
    tokens, label = ((task.config.schedule.length,), jnp.int32), ((), jnp.int32)
    image = ((task.image_size, task.image_size, 3), jnp.uint8)
    fields = {"tokens": tokens} if from_tokens else {"image": image}
    fields |= {"label": label, "valid": ((), jnp.float32)}
    if isinstance(task, AlignTask) and task.stage.align.method == "ddo":
        fields |= {"sample_tokens": tokens, "sample_label": label}
    if from_tokens and task.correction.strength:
        side = task.config.schedule.side
        fields["features"] = ((side, side, task.config.code_dim), jnp.float16)
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in fields.items()
    }


def training_programs(task: Task, mesh: Mesh, from_tokens: bool) -> tuple[Programs, TrainState, dict]:
    """Build the programs that `train.py` compiles for a stage, except small ones that move or check arrays.

    Returns:
      Programs `step`, `evaluation` and those of the previews; the abstract state; and the abstract frozen
      parameters.  State and frozen parameters stay on the devices while any program runs.
    """
    cfg = task.stage.train
    _, state = create_state(task.init, task.optimizer, cfg.ema_decay > 0, jax.random.key(0), mesh)
    shapes, params = abstract_frozen(task), state.sampling_params
    frozen = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        jax.tree.broadcast(task.frozen_shardings(mesh, state.params), shapes),
    )
    key = abstract_replicated(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    batch = abstract_batch(task, mesh, cfg.batch, from_tokens)
    held_out = abstract_batch(task, mesh, eval_batch_size(cfg), from_tokens)
    programs = {
        "step": (jit_train_step(task, cfg, SCHEDULE_STEPS, mesh, state), (state, frozen, batch, key)),
        "evaluation": (jit_eval_step(task, mesh), (params, frozen, held_out)),
    }
    previews = task.preview_programs(mesh, params, frozen) if cfg.preview_every else {}
    return programs | {f"preview {name}": program for name, program in previews.items()}, state, frozen


def sampling_program(task: TransformerTask, mesh: Mesh, batch: int, per_scale: PerScaleOptions) -> Programs:
    """Build the program of `sample.py`: images sharded over all devices, parameters replicated."""
    params = jax.eval_shape(lambda: nn.meta.unbox(task.init(jax.random.key(0))[0]))
    params = jax.eval_shape(partial(in_compute_dtype, dtype=task.model.dtype), params)
    params = jax.eval_shape(task.model.own_layout, params)
    tokenizer = nn.meta.unbox(abstract_tokenizer_params(task.tokenizer))
    tokenizer = jax.eval_shape(partial(tokenizer_in_compute_dtype, tokenizer=task.tokenizer), tokenizer)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    keys = jax.eval_shape(lambda: image_keys(0, jnp.arange(batch)))
    inputs = (
        abstract_replicated(tokenizer, mesh),
        abstract_replicated(params, mesh),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=sharding),
    )

    def sample(tokenizer_params, params, labels, keys):
        networks = Networks(task.tokenizer, task.model, tokenizer_params, params)
        return generate(networks, labels, keys, per_scale)

    return {"sampling": (jax.jit(on_mesh(sample, mesh)), inputs)}
