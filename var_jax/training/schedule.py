"""The published schedules of learning rate and weight decay, as functions of the step for Optax."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
        raise ConfigError(f"train.schedule must be one of {kinds}, found {kind!r}") from None
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
