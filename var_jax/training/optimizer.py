"""AdamW as published: which parameters decay, clipping, schedules; gradients of microbatches; EMA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from var_jax.training import schedule

# Everything else does not decay: biases, norms, start, position and level embeddings, adaLN offsets
# and attention temperatures.
DECAYED = ("kernel", "codebook", "class_embedding", "phi_kernel")


def decay_mask(params: dict) -> dict:
    """Same tree with True at the parameters that weight decay applies to."""

    def decays(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def schedules(train: ConfigDict, steps: int) -> tuple[schedule.Schedule, schedule.Schedule]:
    """Learning rate and weight decay of a run as functions of the step."""
    peak = train.learning_rate * train.batch / 256
    warmup = round(train.warmup * steps)
    rate = schedule.learning_rate(train.schedule, peak, steps, warmup, train.warmup_start, train.end)
    return rate, schedule.weight_decay(train.weight_decay, train.weight_decay_end, steps)


def make_optimizer(train: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by global norm (0: none) and the schedules of `train`."""
    rate, decay = schedules(train, steps)
    adamw = optax.adamw(rate, b1=train.b1, b2=train.b2, weight_decay=decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(train.clip), adamw) if train.clip else adamw


def accumulated_gradients(gradient: Callable, params: dict, batch: dict, key: jax.Array, microbatches: int):
    """Gradient of a mean loss over a batch, worked out in equal parts to save memory.

    Args:
      gradient: (params, batch, key) -> gradients, (metrics, outputs), as `jax.grad(loss, has_aux=True)` is;
        outputs are arrays led by the batch.
      params: to differentiate by.
      batch: arrays [B, ...].
      key: random key; each part folds in its number.
      microbatches: number of parts; must divide B.

    Returns:
      Gradients, and (metrics averaged over the parts, outputs of the whole batch).
    """
    if microbatches == 1:
        return gradient(params, batch, key)
    # Part i takes images i, i + n, ...: every device keeps its own images.
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def part(total, numbered):
        i, part_of_batch = numbered
        grads, aux = gradient(params, part_of_batch, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, grads), aux

    # Derived from the parameters, so that XLA shards the sum as it shards them: each part's gradients are
    # scattered before they are added. `zeros_like` would be replicated. (Parameters are finite.)
    zeros = jax.tree.map(lambda p: p - p, params)
    total, (metrics, outputs) = jax.lax.scan(part, zeros, (jnp.arange(microbatches), parts))
    outputs = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    return jax.tree.map(lambda g: g / microbatches, total), (metrics, outputs)


def update_ema(ema: dict, params: dict, decay: float, step: jax.Array) -> dict:
    """Moving average of the parameters, quicker while the run is young: min(decay, (1 + t) / (10 + t))."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
