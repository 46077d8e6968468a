"""Schedules of learning rate and weight decay, AdamW, gradient accumulation and the moving average."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from var_jax.errors import ConfigError

Schedule = Callable[[jax.Array], jax.Array]

# Parameters with weight decay, by the last name of their path. Biases, norms, start, position and level
# embeddings, adaLN offsets and attention temperatures have none.
DECAYED = ("kernel", "codebook", "class_embedding", "phi_kernel")


# --- Schedules


def learning_rate(
    kind: str, peak: float, steps: int, warmup: int, warmup_start: float = 0.005, end: float = 0.01
) -> Schedule:
    """Make a learning-rate schedule: linear warm-up from `warmup_start * peak`, then decay to `end * peak`.

    Args:
      kind: shape of the decay: cos; lin, lin0, lin00 (constant for 15%, 5%, 0% of the steps after the
        warm-up, then linear); linX (two lines that meet at fraction X); exp (constant for 15%, then
        exponential); constant.
      peak: learning rate after the warm-up.
      steps: total number of steps.
      warmup: number of warm-up steps.
      warmup_start, end: fractions of the peak.

    Raises:
      ConfigError: on an unknown kind.
    """
    decay = _decay_factor(kind, end)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = warmup_start + (1 - warmup_start) * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0, 1)
        return peak * jnp.where(step < warmup, rising, decay(progress))

    return schedule


def _decay_factor(kind: str, end: float) -> Schedule:
    """Make the function from progress after the warm-up, in [0, 1], to the fraction of the peak."""
    if kind == "cos":
        return lambda p: end + (1 - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * p))
    if kind == "constant":
        return jnp.ones_like
    if kind == "exp":
        flat = 0.15
        return lambda p: jnp.where(p < flat, 1.0, jnp.exp((p - flat) / (1 - flat) * math.log(end)))
    if kind in ("lin", "lin0", "lin00"):
        flat = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0}[kind]
        return lambda p: jnp.where(p < flat, 1.0, end + (1 - end) * (1 - p) / (1 - flat))
    try:
        knee = float(kind.removeprefix("lin"))
        if not kind.startswith("lin") or not 0 < knee < 1:
            raise ValueError
    except ValueError:
        kinds = "cos, lin, lin0, lin00, linX with 0 < X < 1 (for instance lin0.3), exp, constant"
        raise ConfigError(f"train.lr_schedule must be one of {kinds}, got {kind!r}") from None
    # Two lines that meet at the knee, halfway between the peak and the straight line from 1 to `end`.
    middle = (1 + end + (1 - end) * (1 - knee)) / 2
    early = lambda p: 1 + (middle - 1) * p / knee
    late = lambda p: end + (middle - end) * (1 - p) / (1 - knee)
    return lambda p: jnp.where(p < knee, early(p), late(p))


def weight_decay(start: float, end: float, steps: int) -> Schedule:
    """Make a weight-decay schedule: half a cosine from `start` to `end` over all steps."""

    def schedule(step):
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)
        return end + (start - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * progress))

    return schedule


def peak_learning_rate(train: ConfigDict) -> float:
    """Scale the base learning rate of a `train` section, which is for 256 images, to its batch."""
    return train.base_learning_rate * train.batch / 256


def schedules(train: ConfigDict, steps: int) -> tuple[Schedule, Schedule]:
    """Make the schedules of learning rate and weight decay of a stage's `train` section."""
    warmup = round(train.warmup_fraction * steps)
    rate = learning_rate(
        train.lr_schedule,
        peak_learning_rate(train),
        steps,
        warmup,
        train.lr_start_fraction,
        train.lr_end_fraction,
    )
    return rate, weight_decay(train.weight_decay, train.weight_decay_end, steps)


# --- AdamW


def decay_mask(params: dict) -> dict:
    """Return the tree of `params` with True at the parameters that weight decay applies to."""

    def decays(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(train: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Make AdamW with the schedules of a `train` section, after clipping by global norm (0: no clipping)."""
    rate, decay = schedules(train, steps)
    adamw = optax.adamw(rate, b1=train.b1, b2=train.b2, weight_decay=decay, mask=decay_mask)
    if not train.grad_clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(train.grad_clip_norm), adamw)


# --- Gradient accumulation


def accumulated_gradients(gradient: Callable, params: dict, batch: dict, key: jax.Array, microbatches: int):
    """Compute the gradient of a mean loss over a batch, one microbatch at a time to save memory.

    Args:
      gradient: (params, batch, key) -> gradients, (metrics, outputs), like `jax.grad(loss, has_aux=True)`;
        outputs are arrays with a leading batch axis.
      params: parameters to differentiate by.
      batch: arrays [B, ...].
      key: random key; the index of the microbatch is folded in.
      microbatches: number of microbatches; must divide B.

    Returns:
      Gradients, and (metrics averaged over the microbatches, outputs of the whole batch).
    """
    if microbatches == 1:
        return gradient(params, batch, key)
    parts = split_microbatches(batch, microbatches)

    def add_microbatch(total, numbered):
        i, part = numbered
        grads, aux = gradient(params, part, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, total, grads), aux

    # Derived from the parameters, so that XLA shards the sum like them and scatters the gradients of each
    # microbatch before adding them; `zeros_like` would be replicated. (Parameters are finite.)
    zeros = jax.tree.map(lambda p: p - p, params)
    total, (metrics, outputs) = jax.lax.scan(add_microbatch, zeros, (jnp.arange(microbatches), parts))
    metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    return jax.tree.map(lambda g: g / microbatches, total), (metrics, join_microbatches(outputs))


def split_microbatches(batch, microbatches: int):
    """Split arrays [B, ...] into [n, B / n, ...]; microbatch i takes images i, i + n, ... of each device."""
    return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def join_microbatches(parts):
    """Invert `split_microbatches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


# --- Moving average


def update_ema(ema: dict, params: dict, decay: float, step: jax.Array) -> dict:
    """Update the moving average of the parameters with decay min(decay, (1 + step) / (10 + step))."""
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
