"""Training state as one pytree: parameters, moving average, optimizer state and counters."""

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
      step: int32 scalar, number of steps taken, skipped ones included.
      params: trained parameters.
      ema: moving average of the parameters, to evaluate and sample with; None without one.
      opt_state: state of the optax optimizer.
      extra: further state of the task.
      skipped: int32 scalar, number of steps skipped because their loss or gradient was not finite.
      skipped_in_a_row: int32 scalar, number of skipped steps since the last one that was not.
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
        """Return the parameters to evaluate and sample with."""
        return self.params if self.ema is None else self.ema


def create_state(
    init: Callable, optimizer: optax.GradientTransformation, use_ema: bool, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Prepare the initial state, to be created sharded.

    Args:
      init: `Task.init`.
      optimizer: optimizer of the parameters.
      use_ema: whether to keep a moving average.
      key: random key of the initial parameters.
      mesh: mesh to shard over.

    Returns:
      A function that makes the sharded state, from initial values by path (see `param_init`) or None; and the
      abstract state (ShapeDtypeStructs with shardings).
    """

    def boxed_state(init_values):
        params, extra = init(key, init_values.keys())
        params = merge_params(params, init_values)
        ema = jax.tree.map(jnp.copy, params) if use_ema else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, ema, optimizer.init(params), extra, zero, zero)

    boxed = jax.eval_shape(boxed_state, {})
    shardings = tree_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )
    # On a CPU, LLVM's higher levels take four times as long for the same bits: 15 s instead of 4 for digits.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    make = jax.jit(
        lambda values: nn.meta.unbox(boxed_state(values)),
        out_shardings=shardings,
        compiler_options={"xla_backend_optimization_level": 1} if is_cpu else None,
    )
    return lambda init_values=None: make(shard_params(init_values or {}, abstract.params)), abstract


def optimizer_step(
    state: TrainState, grads: dict, optimizer: optax.GradientTransformation
) -> tuple[dict, optax.OptState]:
    """Compute the parameters and the optimizer state after one step."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state


def advance(state: TrainState, params: dict, opt_state: optax.OptState, ema_decay: float) -> TrainState:
    """Set new parameters, count the step, and update the moving average if there is one."""
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, params, ema_decay, state.step)
    return state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


def count_parameters(params: dict) -> int:
    """Count the numbers in a tree of arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
