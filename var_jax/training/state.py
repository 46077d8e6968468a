"""All that changes during training, as one pytree."""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from var_jax.sharding import tree_shardings
from var_jax.training.optimizer import update_ema
from var_jax.training.param_init import merge_params, shard_params


@flax.struct.dataclass
class TrainState:
    """State of a run between two steps.

    Attributes:
      step: int32 scalar, optimiser steps taken.
      params: being trained.
      ema: moving average of the parameters to evaluate and sample with; None without one.
      opt_state: of Optax.
      extra: what else the task carries from step to step.
      skipped: int32 scalar, steps that changed nothing since their loss or gradient was not finite.
      skipped_in_a_row: int32 scalar, how many of them the last steps were.
    """

    step: jax.Array
    params: dict
    ema: dict | None
    opt_state: optax.OptState
    extra: dict
    skipped: jax.Array | int = 0
    skipped_in_a_row: jax.Array | int = 0

    @property
    def sampling_params(self) -> dict:
        """Parameters to evaluate and sample with."""
        return self.params if self.ema is None else self.ema


def create_state(
    init: Callable, optimizer: optax.GradientTransformation, use_ema: bool, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Makes the state where it will live.

    Args:
      init: of a task.
      optimizer: of the parameters.
      use_ema: whether to keep a moving average.
      key: of the initial parameters.
      mesh: to shard over.

    Returns:
      A function that makes the state sharded, with the parameters that it is given in place of the initial
      ones (see `fine_tune`); and the abstract state (ShapeDtypeStructs with shardings).
    """

    def boxed_state(given):
        params, extra = init(key, given.keys())
        params = merge_params(params, given)
        ema = jax.tree.map(jnp.copy, params) if use_ema else None
        none = jnp.zeros((), jnp.int32)
        return TrainState(none, params, ema, optimizer.init(params), extra, none, none)

    boxed = jax.eval_shape(boxed_state, {})
    shardings = tree_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )
    make = jax.jit(lambda given: nn.meta.unbox(boxed_state(given)), out_shardings=shardings)
    return lambda given=None: make(shard_params(given or {}, abstract.params)), abstract


def optimizer_step(
    state: TrainState, grads: dict, optimizer: optax.GradientTransformation
) -> tuple[dict, optax.OptState]:
    """Compute the parameters and the optimiser's state after one step."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def advance(state: TrainState, params: dict, opt_state: optax.OptState, ema_decay: float) -> TrainState:
    """Put new parameters into the state, count the step and update the moving average if there is one."""
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, params, ema_decay, state.step)
    return state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


def count_parameters(params: dict) -> int:
    """Number of numbers in a tree of arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
