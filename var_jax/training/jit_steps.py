"""Jitted training and evaluation steps of a task."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.sharding import on_mesh, replicated
from var_jax.training.nan_guard import skip_if_not_finite
from var_jax.training.optimizer import schedules
from var_jax.training.state import TrainState
from var_jax.training.task import Task


def jit_train_step(task: Task, cfg: ConfigDict, steps: int, mesh: Mesh, abstract: TrainState) -> Callable:
    """Jit the training step: (state, frozen, global batch, key of the run) -> state, metrics.

    The state is donated. A step whose loss or gradient is not finite leaves it unchanged.

    Args:
      task: task to train.
      cfg: section `train` of the stage.
      steps: total number of steps.
      mesh: mesh of the run.
      abstract: shapes and shardings of the state.
    """
    rate, decay = schedules(cfg, steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = on_mesh(task.train_step, mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    def train_step(state, frozen, batch, step_key):  # the key is an argument: all seeds share a program
        updates = state.step - state.skipped  # as the optimizer counts
        scheduled = {"learning_rate": rate(updates), "weight_decay": decay(updates)}
        output = step(state, frozen, batch, jax.random.fold_in(step_key, state.step))
        state, metrics = skip_if_not_finite(state, output)
        return state, metrics | scheduled

    return train_step


def eval_batch_size(cfg: ConfigDict) -> int:
    """Return the images of an evaluation batch: as many as a microbatch of training."""
    return cfg.batch // cfg.grad_accum_steps


def jit_eval_step(task: Task, mesh: Mesh) -> Callable:
    """Jit the evaluation step: (parameters to sample with, frozen, global batch) -> replicated sums."""
    return jax.jit(on_mesh(task.eval_step, mesh), out_shardings=replicated(mesh))
