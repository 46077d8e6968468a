"""Parts of the stages of `device_check`: what one is, and running them one after another."""

import dataclasses
import json
import math
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

REPOSITORY = Path(__file__).parent.parent
TIMED = 10  # calls, of which the median counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One measurement or check of a stage.

    Attributes:
      name: unique in the stage.
      run: returns a flat dict of values; its `checks`, name -> bool, must all be true.
      seconds: expected on an H100; with less time left the part is not run.
      is_check: whether it decides if the device is sound; else it only measures.
    """

    name: str
    run: Callable[[], dict]
    seconds: float
    is_check: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of all stages.

    Attributes:
      out: directory for runs, traces and results.
      tiny: sizes for a CPU, to try the command.
      platform: "cpu", "gpu" or "tpu".
      goldens: directory of the golden tensors.
      against: path of the PyTorch yardstick; None for no comparison.
      deadline: `time.time()` at which the stage has to end.
    """

    out: Path
    tiny: bool
    platform: str
    goldens: Path
    against: str | None
    deadline: float

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()


def relative_error(values, reference) -> float:
    """Largest absolute difference over the largest magnitude of the reference; NaN if a value is NaN."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if values.shape != reference.shape:
        raise ValueError(f"shape {values.shape} for a reference of {reference.shape}")
    return float(np.abs(values - reference).max() / np.abs(reference).max())


def share_equal(tokens, reference) -> float:
    return float(np.mean(np.asarray(tokens) == np.asarray(reference)))


def milliseconds(function: Callable, *inputs) -> float:
    """Median time of a compiled function; two calls warm up."""
    times = []
    for _ in range(2 + TIMED):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return float(1e3 * np.median(times[2:]))


class CommandFailed(RuntimeError):
    """A command of this repository ended with another code than 0; `output` is all that it printed."""

    def __init__(self, command: list[str], code: int, output: str):
        super().__init__(f"{' '.join(command[1:4])} ended with code {code}:\n{output[-3000:]}")
        self.output = output


def run_command(options: Options, command: list[str]) -> str:
    """Output of a command of this repository.

    Raises:
      CommandFailed: if it fails.
      subprocess.TimeoutExpired: if the time of the stage is over.
    """
    limit = max(options.seconds_left, 1)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise CommandFailed(command, done.returncode, done.stdout + done.stderr)
    return done.stdout


def run_parts(parts: list[Part], options: Options, record: Callable[[dict], None]) -> None:
    """Runs parts one after another; records each as it ends, failed or not run ones too."""
    for part in parts:
        if options.seconds_left < (0 if options.tiny else part.seconds):
            record({"part": part.name, "not_run": "no time left", "is_check": part.is_check})
            continue
        start = time.monotonic()
        try:
            values = part.run()
        except subprocess.TimeoutExpired:
            values = {"not_run": "stopped, since the time was over"}
        except Exception:  # a check of a device reports whatever goes wrong, and goes on with the next part
            values = {"error": traceback.format_exc()}
        seconds = round(time.monotonic() - start, 1)
        record({"part": part.name, "is_check": part.is_check, **values, "took_s": seconds})


def as_json(values: dict) -> str:
    """One line; numbers that are not finite, which JSON lacks, as text."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain, allow_nan=False)
