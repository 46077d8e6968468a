"""Metrics of a run: printed lines, metrics.jsonl, the chosen writers, and curves as PNG."""

import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import absl.logging
import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from var_jax.paths import as_path, storage_errors, write_atomic
from var_jax.training.hardware import peak_flops
from var_jax.training.writers import AppendFile, open_writer

# Metrics of the files that the printed line leaves out.
_NOT_PRINTED = re.compile(
    r".*_\d+|images_per_s|tflops|.*gradient_norm|code_norm|f_hat_norm|weight_decay|skipped.*"
)


# --- metrics.jsonl


def finite_or_none(tree):
    """Replace NaN and infinities, which JSON does not have, by None in nested lists and dicts."""
    if isinstance(tree, dict):
        return {name: finite_or_none(value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [finite_or_none(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _json_line(line: dict) -> bytes:
    return json.dumps(finite_or_none(line), allow_nan=False).encode() + b"\n"


def read_metrics(path: os.PathLike) -> list[dict]:
    """Read the lines of a metrics.jsonl; null, and the bare NaN of older runs, become NaN.

    A truncated last line, of a run that was killed, is left out.

    Raises:
      ValueError: if another line is not JSON; names it.
    """
    path = as_path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise ValueError(f"{path} line {number + 1} is not JSON: {line[:80]!r}") from error
            break
        if isinstance(values, dict):
            values = {name: math.nan if value is None else value for name, value in values.items()}
        metrics.append(values)
    return metrics


# --- The log of a stage


class Log:
    """Log of one stage: printed lines, metrics.jsonl and the chosen writers; process 0 only.

    Metrics of a training step are passed as device arrays and fetched by `flush`, after the next step has
    been dispatched, so that the device never waits for the log.  As a context it opens its files on entry; if
    training fails, it only writes what was logged, as far as possible, on exit.
    """

    def __init__(
        self,
        directory: os.PathLike,
        stage: str,
        start: int,
        steps: int,
        batch: int,
        flops_per_image: float,
        writers: Sequence[str] = ("tensorboard",),
        config: Mapping = MappingProxyType({}),
    ):
        """Set up the log; `open` opens its files.

        Args:
          directory: directory of the stage.
          stage: its name.
          start: step to resume from.
          steps: total number of steps.
          batch: images per step.
          flops_per_image: matrix FLOPs of a training step per image.
          writers: names of the writers.
          config: config of the stage, for writers that show it.
        """
        self.directory = as_path(directory)
        self.stage = stage
        self.start = start
        self.steps = steps
        self.batch = batch
        self.flops_per_image = flops_per_image
        self.writers = tuple(writers)
        self.config = config
        self.active = jax.process_index() == 0
        self._pending_metrics = None
        self.restart_clock(start)

    def open(self) -> "Log":
        """Open the files after step `start`, dropping later lines of an interrupted run; return the log."""
        self.restart_clock(self.start)
        if not self.active:
            return self
        path = self.directory / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= self.start]
        self._lines = AppendFile(path, b"".join(map(_json_line, kept)))
        self._writers = [
            open_writer(name, self.directory, self.stage, self.start, self.config, kept)
            for name in self.writers
        ]
        self._writable = True
        self._bar = tqdm(
            total=self.steps,
            initial=self.start,
            desc=self.stage,
            disable=not sys.stderr.isatty(),
            smoothing=0.1,
        )
        return self

    def __enter__(self) -> "Log":
        return self.open()

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self.close()
        else:
            self.sync()

    def restart_clock(self, step: int) -> None:
        """Start measuring rates from this step."""
        self._clock_start = time.monotonic()
        self._clock_step = step
        self._paused = 0.0

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.active:
            self._bar.update(step - self._bar.n)

    def training(self, step: int, metrics: dict) -> None:
        """Add the metrics of a training step (device arrays), to be written by the next `flush`."""
        self._pending_metrics = (step, metrics)

    def flush(self) -> None:
        """Write the pending metrics, waiting until the device has computed them."""
        if self._pending_metrics is None:
            return
        step, metrics = self._pending_metrics
        self._pending_metrics = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        elapsed = time.monotonic() - self._clock_start - self._paused
        num_steps = step - self._clock_step
        self.restart_clock(step)
        if not num_steps:  # the first step has no rate
            self.write(step, "train", metrics, "")
            return
        rate = num_steps * self.batch / max(elapsed, 1e-9)
        seconds_left = (self.steps - step) * self.batch / max(rate, 1e-9)
        speed = {"images_per_s": rate, "tflops": rate * self.flops_per_image / 1e12}
        if peak := peak_flops(jax.devices()[0]):
            speed["mfu"] = speed["tflops"] * 1e12 / (peak * jax.device_count())
        self.write(step, "train", {**metrics, **speed}, f"{rate:.0f} images/s  {duration(seconds_left)} left")

    def event(
        self, step: int, kind: str, metrics: dict[str, float], note: str, records: Sequence[int]
    ) -> None:
        """Report an unusual step.

        The line has the first records of the batch, metrics.jsonl all of them.

        Args:
          step: the step.
          kind: `skipped` or `spike`.
          metrics: numbers of the step.
          note: explanation for the line.
          records: indices of the batch's records in the data set.
        """
        if not self.active:
            return
        self._record(step, kind, metrics, records=[int(i) for i in records])
        first = ", ".join(str(i) for i in records[:8]) + (", ..." if len(records) > 8 else "")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self.stage} {kind}: step {step}  {shown}  {note}; records {first}")

    def evaluation(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Write the metrics of an evaluation: `eval` on held-out data, or `samples`."""
        self.flush()
        self.write(step, kind, metrics, "")

    def write(self, step: int, kind: str, metrics: dict[str, float], note: str) -> None:
        """Print a line with the main metrics, and write all metrics to the files."""
        if not self.active:
            return
        self._record(step, kind, metrics)
        shown = "  ".join(f"{n} {value:.4g}" for n, value in metrics.items() if not _NOT_PRINTED.fullmatch(n))
        self.say(f"{self.stage} {kind:5} {step:>{len(str(self.steps))}}/{self.steps}  {shown}  {note}")

    def pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Pass previews to the writers."""
        for writer in self._writers if self.active else ():
            writer.write_pictures(step, pictures)

    def _record(self, step: int, kind: str, metrics: dict[str, float], **more) -> None:
        self._lines.write(_json_line({"step": step, "kind": kind, **metrics, **more}))
        for writer in self._writers:
            writer.write(step, kind, metrics)
        self.sync(now=False)

    def sync(self, now: bool = True) -> None:
        """Write what is pending to storage; on failure warn once, and retry at the next call.

        Without `now`, only if writing does not slow training down.
        """
        if not self.active:
            return
        try:
            self._lines.flush(now)
            for writer in self._writers:
                writer.flush(now)
        except storage_errors() as error:
            if self._writable:
                absl.logging.warning(
                    "The log under %s cannot be written: %s\n  Lines are kept in memory until it can.",
                    self.directory,
                    error,
                )
            self._writable = False
        else:
            self._writable = True

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self._bar.write(line.rstrip(), file=sys.stdout)
            sys.stdout.flush()

    def pause(self, after: jax.Array):
        """Return a context whose time does not count as training; it first waits for the array `after`."""
        return _Pause(self, after)

    def close(self) -> None:
        """Write everything and close the files.

        Raises:
          OSError: if the log cannot be written.
        """
        self.flush()
        if self.active:
            self._bar.close()
            self._lines.flush(now=True)
            for writer in self._writers:
                writer.close()


class _Pause:
    """Context of `Log.pause`."""

    def __init__(self, log: Log, after: jax.Array):
        self.log = log
        self.after = after

    def __enter__(self):
        jax.block_until_ready(self.after)
        self.log.flush()
        self.log.sync()  # so that the log has every step of the next checkpoint
        self.start = time.monotonic()

    def __exit__(self, *_):
        self.log._paused += time.monotonic() - self.start


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


# --- Curves


def plot_curves(directory: os.PathLike, path: os.PathLike, title: str) -> None:
    """Plot losses, accuracies and FID of training and evaluation over the steps, as a PNG.

    Args:
      directory: directory of the stage, with metrics.jsonl.
      path: file to write.
      title: prefix of the titles.
    """
    lines = read_metrics(as_path(directory) / "metrics.jsonl")
    names = [
        name
        for name in ("loss", "l2", "codebook", "accuracy", "perplexity", "fid")
        if any(name in line for line in lines)
    ]
    if not names:  # nothing is logged yet
        return
    from matplotlib.figure import Figure  # imported here, since it takes half a second

    figure = Figure(figsize=(4.5 * len(names), 3.2))
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for kind, style in (("train", "-"), ("eval", "o-"), ("samples", "s-")):
            points = np.array([(x["step"], x[name]) for x in lines if x["kind"] == kind and name in x])
            if len(points):
                axis.plot(points[:, 0], points[:, 1], style, markersize=3, linewidth=1, label=kind)
        axis.set(xlabel="step", title=f"{title}: {name}")
        if name in ("l2", "codebook"):
            axis.set_yscale("log")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_atomic(path, content.getvalue())
