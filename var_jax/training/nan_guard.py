"""Keeps a long run sound: skips steps that are not finite, and says what is odd, with its records."""

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.errors import UserError
from var_jax.training.metrics import Log
from var_jax.training.state import TrainState
from var_jax.training.task import StepOutput

WINDOW, MIN_LOSSES = 200, 20  # losses that a spike is told from, at most and at least
SPIKE = 6.0  # standard deviations above the median


class TrainingDiverged(UserError, RuntimeError):
    """Too many steps in a row were not finite."""


def skip_if_not_finite(old: TrainState, output: StepOutput) -> tuple[TrainState, dict[str, jax.Array]]:
    """Keep the old state, but for the step count, where a loss or a gradient norm is not finite.

    To be traced by `jit`.

    Args:
      old: before the step.
      output: of the step.

    Returns:
      The state after the step, and all metrics, with `skipped` and `skipped_in_a_row` as they are after it.

    Raises:
      TypeError: where a metric is no scalar.
    """
    new, metrics = output.state_and_metrics()
    if other := {name: jnp.shape(value) for name, value in metrics.items() if jnp.shape(value)}:
        raise TypeError(f"metrics of a task's train_step must be scalars, got shapes {other}")
    checked = ("loss", *output.must_be_finite, "gradient_norm")
    fine = jnp.isfinite(jnp.stack([metrics[name] for name in checked])).all()
    state = jax.tree.map(lambda now, before: jnp.where(fine, now, before), new, old)
    counts = {
        "skipped": old.skipped + ~fine,
        "skipped_in_a_row": jnp.where(fine, 0, old.skipped_in_a_row + 1),
    }
    return state.replace(step=new.step, **counts), metrics | counts


def is_finite(state: TrainState) -> jax.Array:
    """Whether every number of a state is; to be traced by `jit`."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


class LossMonitor:
    """Reads the loss and the counts of every step, on all processes, where a log line waits for them anyway.

    A step that was skipped, and a loss far above what is usual, are said with the records of the batch.
    """

    def __init__(self, log: Log, every: int, most_skipped: int, records: Callable[[int], np.ndarray]):
        """Reads every so many steps; `records` gives those of a step's batch."""
        self.log, self.every, self.most_skipped, self.records = log, every, most_skipped, records
        self._waiting: list[tuple[int, dict]] = []
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._high = False
        self.skipping = False  # whether the last step read was skipped

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's device arrays; reads those of the steps before it where their turn has come."""
        if self._waiting and self._waiting[-1][0] % self.every == 0:
            self.check()
        self._waiting.append((step, {name: metrics[name] for name in ("loss", "skipped_in_a_row")}))

    def check(self) -> None:
        """Looks at all steps that were taken.

        Raises:
          TrainingDiverged: where `most_skipped` in a row (0 is 1) were not finite; on all processes alike.
        """
        waiting, self._waiting = self._waiting, []
        for (step, _), result in zip(waiting, jax.device_get([result for _, result in waiting]), strict=True):
            loss, in_a_row = float(result["loss"]), int(result["skipped_in_a_row"])
            self.skipping = in_a_row > 0
            if self.skipping:
                self._report(step, "skipped", {"loss": loss}, "its loss or gradient is not finite")
            if self.skipping and in_a_row >= self.most_skipped:
                self.log.sync()
                raise TrainingDiverged(
                    f"{self.log.stage}: the last {in_a_row} steps, {step - in_a_row + 1} to {step}, were "
                    "skipped since their loss or gradient was not finite (train.max_skipped)"
                )
            if not self.skipping:
                self._look_for_spike(step, loss)

    def _look_for_spike(self, step: int, loss: float) -> None:
        """What is usual, the median and the spread about it say, which other spikes move little.

        Of a loss that stays high the first step is said.
        """
        usual = np.median(self._losses) if self._losses else loss
        spread = 1.4826 * np.median(np.abs(np.array(self._losses) - usual)) if self._losses else 0.0
        high = len(self._losses) >= MIN_LOSSES and loss > usual + SPIKE * max(spread, 1e-3 * abs(usual))
        if high and not self._high:
            self._report(step, "spike", {"loss": loss, "usual": float(usual)}, f"usual are {usual:.4g}")
        self._high = high
        self._losses.append(loss)

    def _report(self, step: int, kind: str, metrics: dict[str, float], note: str) -> None:
        self.log.event(step, kind, metrics, note, self.records(step))
