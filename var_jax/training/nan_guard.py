"""NaN guard: skip steps that are not finite; report them and loss spikes with the records of the batch."""

from collections import deque
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.errors import UserError
from var_jax.training.metrics import Log
from var_jax.training.state import TrainState
from var_jax.training.task import StepOutput

MAX_LOSSES = 200  # that a spike is compared with
MIN_LOSSES = 20
SPIKE_THRESHOLD = 6.0  # robust standard deviations above the median


class TrainingDiverged(UserError, RuntimeError):
    """Error after too many steps in a row that were not finite."""


def skip_if_not_finite(old: TrainState, output: StepOutput) -> tuple[TrainState, dict[str, jax.Array]]:
    """Keep the old state, except for the step count, if a loss or a gradient norm is not finite.

    Args:
      old: state before the step.
      output: result of the step.

    Returns:
      The state after the step, and all metrics, including the updated `skipped` and `skipped_in_a_row`.

    Raises:
      TypeError: if a metric is not a scalar.
    """
    new, metrics = output.state_and_metrics()
    if shapes := {name: jnp.shape(value) for name, value in metrics.items() if jnp.shape(value)}:
        raise TypeError(f"metrics of a task's train_step must be scalars, got shapes {shapes}")
    checked = ("loss", *output.must_be_finite, "gradient_norm")
    finite = jnp.isfinite(jnp.stack([metrics[name] for name in checked])).all()
    state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
    counts = {
        "skipped": old.skipped + ~finite,
        "skipped_in_a_row": jnp.where(finite, 0, old.skipped_in_a_row + 1),
    }
    return state.replace(step=new.step, **counts), metrics | counts


def is_finite(state: TrainState) -> jax.Array:
    """Return whether every number of a state is finite; traced by jit."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


class LossMonitor:
    """Monitor of the loss and the skip counts of every step, on all processes.

    It fetches them when a log line waits for the device anyway, and reports skipped steps and loss spikes
    with the records of the batch.

    Attributes:
      skipping: whether the last checked step was skipped.
    """

    def __init__(self, log: Log, every: int, max_skipped: int, records: Callable[[int], np.ndarray]):
        """Start with an empty history.

        Args:
          log: log to report to.
          every: number of steps between two checks.
          max_skipped: skipped steps in a row at which training ends.
          records: function from a step to the indices of its batch's records.
        """
        self.log = log
        self.every = every
        self.max_skipped = max_skipped
        self.records = records
        self.skipping = False
        self._unchecked: list[tuple[int, dict]] = []
        self._losses: deque[float] = deque(maxlen=MAX_LOSSES)
        self._in_spike = False

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Add the metrics (device arrays) of a step; check the steps before it every `every` steps."""
        if self._unchecked and self._unchecked[-1][0] % self.every == 0:
            self.check()
        self._unchecked.append((step, {name: metrics[name] for name in ("loss", "skipped_in_a_row")}))

    def check(self) -> None:
        """Check all steps added since the last check.

        Raises:
          TrainingDiverged: on all processes, if `max_skipped` steps in a row (0 counts as 1) were not finite.
        """
        unchecked, self._unchecked = self._unchecked, []
        fetched = jax.device_get([metrics for _, metrics in unchecked])
        for (step, _), metrics in zip(unchecked, fetched, strict=True):
            loss, in_a_row = float(metrics["loss"]), int(metrics["skipped_in_a_row"])
            self.skipping = in_a_row > 0
            if self.skipping:
                self._report(step, "skipped", {"loss": loss}, "its loss or gradient is not finite")
            if self.skipping and in_a_row >= self.max_skipped:
                self.log.sync()
                raise TrainingDiverged(
                    f"{self.log.stage}: the last {in_a_row} steps, {step - in_a_row + 1} to {step}, were "
                    "skipped because their loss or gradient was not finite (train.max_skipped)"
                )
            if not self.skipping:
                self._check_spike(step, loss)

    def _check_spike(self, step: int, loss: float) -> None:
        """Report a loss more than SPIKE_THRESHOLD robust standard deviations above the running median.

        The standard deviation comes from the median absolute deviation, which other spikes hardly move. Only
        the first step of a sustained spike is reported.
        """
        median = np.median(self._losses) if self._losses else loss
        std = 1.4826 * np.median(np.abs(np.array(self._losses) - median)) if self._losses else 0.0
        threshold = median + SPIKE_THRESHOLD * max(std, 1e-3 * abs(median))
        is_spike = len(self._losses) >= MIN_LOSSES and loss > threshold
        if is_spike and not self._in_spike:
            self._report(step, "spike", {"loss": loss, "usual": float(median)}, f"usual are {median:.4g}")
        self._in_spike = is_spike
        self._losses.append(loss)

    def _report(self, step: int, kind: str, metrics: dict[str, float], note: str) -> None:
        self.log.event(step, kind, metrics, note, self.records(step))
