"""What a run says: one plain line a log step, JSONL, TensorBoard, and curves."""

import contextlib
import io
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence

import absl.logging
import jax
import numpy as np
import tensorboardX
from etils import epath
from tensorboardX.record_writer import register_writer_factory
from tqdm import tqdm

from var_jax.paths import as_path, is_remote, storage_errors, write_atomic
from var_jax.training.hardware import peak_flops

SHARE = 0.05  # of the time at most is spent on writing


class AppendFile:
    """File that grows; what was flushed survives the process and the machine.

    A local file is opened and closed at each flush: mounts of object stores (gcsfuse) upload a file when it
    is closed.  An object cannot be appended to and is written again as a whole.  Where either takes long, a
    flush may leave the writing to one of the next.
    """

    def __init__(self, path: os.PathLike, content: bytes = b""):
        """Create the file with this content, in place of one that may be there."""
        self.path = as_path(path)
        self._size, self._pending = len(content), bytearray()
        self._whole = bytearray(content) if is_remote(self.path) else None
        self._next = 0.0  # no flush before this time
        self._lock = threading.Lock()  # of what is pending
        write_atomic(self.path, content)

    def write(self, content: bytes) -> None:
        """Take content, to be written by `flush`; may be called from another thread."""
        with self._lock:
            self._pending += content

    def flush(self, now: bool = False) -> None:
        """Write what was taken; without `now` only if the last time was long enough ago.

        Raises:
          OSError: if it cannot be written; it is kept for the next flush, and the file stays as it was.
        """
        start = time.monotonic()
        content = bytes(self._pending)
        if not content or (start < self._next and not now):
            return
        if self._whole is None:
            self._append(content)
        else:
            write_atomic(self.path, bytes(self._whole + content))
            self._whole += content
        self._size += len(content)
        with self._lock:
            del self._pending[: len(content)]
        end = time.monotonic()
        self._next = end + (end - start) / SHARE

    def _append(self, content: bytes) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(content)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)  # without the part that there was room for
            raise


def duration(seconds: float) -> str:
    """Seconds -> h:mm:ss or m:ss."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Log:
    """Writes the metrics of one stage; does nothing on processes other than 0.

    Metrics of a training step are handed over as device arrays and only fetched by `flush`, when the
    next step has been handed to the device, so that it never waits for the log.
    """

    def __init__(
        self, directory: os.PathLike, stage: str, start: int, steps: int, batch: int, flops_per_image: float
    ):
        """Goes on after step `start`: what an interrupted run logged beyond it is dropped."""
        directory = as_path(directory)
        self.directory, self.stage, self.steps, self.batch = directory, stage, steps, batch
        self.flops_per_image = flops_per_image
        self.active = jax.process_index() == 0
        self._pending = None
        self.restart_clock(start)
        if not self.active:
            return
        kept = [line for line in read_metrics(directory / "metrics.jsonl") if line["step"] <= start]
        self._lines = AppendFile(directory / "metrics.jsonl", b"".join(map(_json_line, kept)))
        files = _EventFiles()
        self._board = tensorboardX.SummaryWriter(
            files.path(directory / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}"
        )
        self._events, self._writable = files.file, True
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, desc=stage, disable=not terminal, smoothing=0.1)

    def restart_clock(self, step: int) -> None:
        """Rates are taken from here on."""
        self._mark, self._mark_step, self._paused = time.monotonic(), step, 0.0

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self.active:
            self._bar.update(step - self._bar.n)

    def training(self, step: int, metrics: dict) -> None:
        """Takes the metrics of a training step (device arrays), to be written by the next `flush`."""
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Writes the metrics last taken, waiting for the device to have worked them out."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        elapsed, done = now - self._mark - self._paused, step - self._mark_step
        self.restart_clock(step)
        if not done:  # the first step since the start: nothing to take a rate from
            self.write(step, "train", metrics, "")
            return
        rate = done * self.batch / max(elapsed, 1e-9)
        left = (self.steps - step) * self.batch / max(rate, 1e-9)
        speed = {"images_per_s": rate, "tflops": rate * self.flops_per_image / 1e12}
        if peak := peak_flops(jax.devices()[0]):
            speed["mfu"] = speed["tflops"] * 1e12 / (peak * jax.device_count())
        self.write(step, "train", {**metrics, **speed}, f"{rate:.0f} images/s  {duration(left)} left")

    def event(
        self, step: int, kind: str, metrics: dict[str, float], note: str, records: Sequence[int]
    ) -> None:
        """Something odd in a step: said with the first records of its batch; metrics.jsonl has them all."""
        if not self.active:
            return
        self._record({"step": step, "kind": kind, **metrics, "records": [int(i) for i in records]})
        first = ", ".join(str(i) for i in records[:8]) + (", ..." if len(records) > 8 else "")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.say(f"{self.stage} {kind}: step {step}  {shown}  {note}; records {first}")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes metrics of the held-out set."""
        self.flush()
        self.write(step, "eval", metrics, "")

    def write(self, step: int, kind: str, metrics: dict[str, float], note: str) -> None:
        """One line on the screen (totals, not single scales), all metrics in the files."""
        if not self.active:
            return
        self._record({"step": step, "kind": kind, **metrics})
        for name, value in metrics.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        hidden = re.compile(
            r".*_\d+|images_per_s|tflops|.*gradient_norm|code_norm|f_hat_norm|weight_decay|skipped.*"
        )  # to be found in the files
        shown = "  ".join(f"{n} {value:.4g}" for n, value in metrics.items() if not hidden.fullmatch(n))
        self.say(f"{self.stage} {kind:5} {step:>{len(str(self.steps))}}/{self.steps}  {shown}  {note}")

    def _record(self, line: dict) -> None:
        self._lines.write(_json_line(line))
        self.sync(now=False)

    def sync(self, now: bool = True) -> None:
        """Write to storage what was logged; where it cannot be, a warning, and it is tried again later.

        Without `now`, only if that does not slow training down.
        """
        if not self.active:
            return
        try:
            self._lines.flush(now)
            self._events.flush(now)
        except storage_errors() as error:
            if self._writable:
                absl.logging.warning(
                    "The log under %s cannot be written: %s\n  It is kept, and written once it can be.",
                    self.directory,
                    error,
                )
            self._writable = False
        else:
            self._writable = True

    def say(self, line: str) -> None:
        """A line on the screen that leaves the bar alone."""
        if self.active:
            self._bar.write(line.rstrip(), file=sys.stdout)
            sys.stdout.flush()

    def pause(self, after: jax.Array):
        """Context whose time does not count as training; first waits until `after` is worked out."""
        return _Pause(self, after)

    def close(self) -> None:
        """Write everything.

        Raises:
          OSError: if it cannot be written.
        """
        self.flush()
        if self.active:
            self._bar.close()
            self._board.close()
            self._lines.flush(now=True)
            self._events.flush(now=True)


class _Pause:
    def __init__(self, log: Log, after: jax.Array):
        self.log, self.after = log, after

    def __enter__(self):
        jax.block_until_ready(self.after)
        self.log.flush()
        self.log.sync()  # a checkpoint never knows of more steps than the log
        self.start = time.monotonic()

    def __exit__(self, *_):
        self.log._paused += time.monotonic() - self.start


class _EventFile:
    """File of TensorBoard's events, for tensorboardX to write to from its thread.

    Nothing in that thread can fail: were it dead, the training loop would wait for it for ever, in the tenth
    `add_scalar` after that.  `Log.sync` does the writing.
    """

    def __init__(self, path: str):
        self.file = AppendFile(path)

    def write(self, content: bytes) -> None:
        self.file.write(content)

    def flush(self) -> None:
        pass

    close = flush


class _EventFiles:
    """Opens the one file of a SummaryWriter; tensorboardX finds it by the prefix of the path."""

    PREFIX = "var_jax"

    def path(self, folder: epath.Path) -> str:
        """A folder as SummaryWriter must name it, for its file to be opened here."""
        register_writer_factory(self.PREFIX, self)
        return f"{self.PREFIX}:{folder}"

    def directory_check(self, path: str) -> None:
        """AppendFile makes the folder."""

    def open(self, path: str) -> _EventFile:
        event_file = _EventFile(path.removeprefix(f"{self.PREFIX}:"))
        self.file = event_file.file
        return event_file


def finite_or_none(tree):
    """Lists and dicts of numbers, with None for NaN and infinities, which JSON does not have."""
    if isinstance(tree, dict):
        return {name: finite_or_none(value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [finite_or_none(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _json_line(line: dict) -> bytes:
    return json.dumps(finite_or_none(line), allow_nan=False).encode() + b"\n"


def read_metrics(path: os.PathLike) -> list[dict]:
    """Read the lines of a metrics.jsonl; null, and the bare NaN of older runs, become NaN.

    A last line cut short by a kill is left out.

    Raises:
      ValueError: naming the line that is not JSON.
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


def draw_curves(directory: os.PathLike, path: os.PathLike, title: str) -> None:
    """Draws the losses (and accuracies) of training and evaluation over the steps as a PNG."""
    lines = read_metrics(as_path(directory) / "metrics.jsonl")
    names = [
        n for n in ("loss", "l2", "codebook", "accuracy", "perplexity") if any(n in line for line in lines)
    ]
    if not names:  # a picture before the first line
        return
    from matplotlib.figure import Figure  # half a second, which a start need not wait for

    figure = Figure(figsize=(4.5 * len(names), 3.2))
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for kind, style in (("train", "-"), ("eval", "o-")):
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
