"""AdamW with weight decay on matrices alone, learning-rate schedules, and gradient accumulation."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from var_jax.errors import ConfigError

Schedule = Callable[[jax.Array], jax.Array]


def _decay(kind: str, end: float) -> Schedule:
    """Share of the peak after the warm-up, as a function of progress in [0, 1]."""
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
        bend = float(kind.removeprefix("lin"))
        if not kind.startswith("lin") or not 0 < bend < 1:
            raise ValueError
    except ValueError:
        kinds = "cos, lin, lin0, lin00, linX with 0 < X < 1 (for instance lin0.3), exp, constant"
        raise ConfigError(f"train.lr_schedule must be one of {kinds}, got {kind!r}") from None
    # Two lines that meet at `bend`, half-way between the peak and where one line would be.
    middle = (1 + end + (1 - end) * (1 - bend)) / 2
    early = lambda p: 1 + (middle - 1) * p / bend  # noqa: E731
    late = lambda p: end + (middle - end) * (1 - p) / (1 - bend)  # noqa: E731
    return lambda p: jnp.where(p < bend, early(p), late(p))


def learning_rate(
    kind: str, peak: float, steps: int, warmup: int, warmup_start: float = 0.005, end: float = 0.01
) -> Schedule:
    """Linear warm-up from `warmup_start` of the peak, then a decay to `end` of it.

    Args:
      kind: cos; lin, lin0, lin00 (flat for 15%, 5%, 0% of the rest, then linear); linX (two lines that
        meet at share X); exp (flat for 15%, then exponential); constant.
      peak: learning rate after the warm-up.
      steps: of the whole training.
      warmup: steps of it.
      warmup_start, end: shares of the peak.

    Raises:
      ValueError: on an unknown kind.
    """
    decay = _decay(kind, end)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = warmup_start + (1 - warmup_start) * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0, 1)
        return peak * jnp.where(step < warmup, rising, decay(progress))

    return schedule


def weight_decay(start: float, end: float, steps: int) -> Schedule:
    """A half cosine from `start` to `end` over all steps."""

    def schedule(step):
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)
        return end + (start - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * progress))

    return schedule


# Everything else does not decay: biases, norms, start, position and level embeddings, adaLN offsets
# and attention temperatures.
DECAYED = ("kernel", "codebook", "class_embedding", "phi_kernel")


def decay_mask(params: dict) -> dict:
    """Same tree with True at the parameters that weight decay applies to."""

    def decays(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def schedules(train: ConfigDict, steps: int) -> tuple[Schedule, Schedule]:
    """Learning rate and weight decay of a run as functions of the step."""
    peak = train.base_learning_rate * train.batch / 256
    warmup = round(train.warmup_fraction * steps)
    rate = learning_rate(
        train.lr_schedule, peak, steps, warmup, train.lr_start_fraction, train.lr_end_fraction
    )
    return rate, weight_decay(train.weight_decay, train.weight_decay_end, steps)


def make_optimizer(train: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by global norm (0: none) and the schedules of `train`."""
    rate, decay = schedules(train, steps)
    adamw = optax.adamw(rate, b1=train.b1, b2=train.b2, weight_decay=decay, mask=decay_mask)
    return (
        optax.chain(optax.clip_by_global_norm(train.grad_clip_norm), adamw) if train.grad_clip_norm else adamw
    )


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
