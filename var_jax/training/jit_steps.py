"""The two programs of a run: a training step of the whole state, and a step of the evaluation."""

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
    """Jitted (state, frozen, global batch, key of the run) -> state, metrics; the state is donated.

    Args:
      cfg: the stage's `train` section.
      steps: of the run.
      abstract: the state's shapes and shardings.
    """
    rate, decay = schedules(cfg, steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = on_mesh(task.train_step, mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    def train_step(state, frozen, batch, step_key):  # an argument, so that all seeds share a program
        taken = state.step - state.skipped  # as the optimiser counts them
        now = {"learning_rate": rate(taken), "weight_decay": decay(taken)}
        output = step(state, frozen, batch, jax.random.fold_in(step_key, state.step))
        state, metrics = skip_if_not_finite(state, output)
        return state, metrics | now

    return train_step


def eval_batch_size(cfg: ConfigDict) -> int:
    """Images of an evaluation batch: as many as training has in memory at once, since it may accumulate."""
    return cfg.batch // cfg.grad_accum_steps


def jit_eval_step(task: Task, mesh: Mesh) -> Callable:
    """Jitted (parameters to sample with, frozen, global batch) -> sums, whole on every device."""
    return jax.jit(on_mesh(task.eval_step, mesh), out_shardings=replicated(mesh))
