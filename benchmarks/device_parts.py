"""Helpers of `device_check`: the parts of a stage, their runner, comparison and timing."""

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
TIMED_CALLS = 10  # timed calls; the median is reported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One measurement or check of a stage.

    Attributes:
      name: unique in the stage.
      run: function that returns a flat dict of values; all of its `checks`, name -> bool, must be true.
      seconds: expected time on an H100; with less time left, the part does not run.
      is_check: True if a part that does not run fails the stage; False if it only measures.
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
      tiny: use sizes for a CPU.
      platform: "cpu", "gpu" or "tpu".
      goldens: directory of the golden tensors.
      against: path of the PyTorch yardstick; None: no comparison.
      deadline: `time.time()` by which the stage has to end.
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
    """Compute max |values - reference| / max |reference|; NaN if a value is NaN."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if values.shape != reference.shape:
        raise ValueError(f"shape {values.shape} for a reference of {reference.shape}")
    return float(np.abs(values - reference).max() / np.abs(reference).max())


def fraction_equal(tokens, reference) -> float:
    """Compute the fraction of tokens that equal the reference."""
    return float(np.mean(np.asarray(tokens) == np.asarray(reference)))


def median_milliseconds(function: Callable, *inputs) -> float:
    """Measure the median time of a function in milliseconds, after two warm-up calls."""
    times = []
    for _ in range(2 + TIMED_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return float(1e3 * np.median(times[2:]))


class CommandFailed(RuntimeError):
    """A command of this repository exited with a nonzero code; `output` is all that it printed."""

    def __init__(self, command: list[str], code: int, output: str):
        super().__init__(f"{' '.join(command[1:4])} ended with code {code}:\n{output[-3000:]}")
        self.output = output


def run_command(options: Options, command: list[str]) -> str:
    """Run a command of this repository and return its standard output.

    Raises:
      CommandFailed: if it exits with a nonzero code.
      subprocess.TimeoutExpired: if it does not end before the stage's deadline.
    """
    limit = max(options.seconds_left, 1)
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit)
    if process.returncode:
        raise CommandFailed(command, process.returncode, process.stdout + process.stderr)
    return process.stdout


def run_parts(parts: list[Part], options: Options, record: Callable[[dict], None]) -> None:
    """Run parts one after another, and record each one, also if it fails or does not run.

    Args:
      parts: of a stage.
      options: settings; a part runs only if its expected time is left before the deadline.
      record: called with the values of each part as it ends.
    """
    for part in parts:
        if options.seconds_left < (0 if options.tiny else part.seconds):
            record({"part": part.name, "not_run": "no time left", "is_check": part.is_check})
            continue
        start = time.monotonic()
        try:
            values = part.run()
        except subprocess.TimeoutExpired:
            values = {"not_run": "stopped at the deadline of the stage"}
        except Exception:  # report any failure, and run the next part
            values = {"error": traceback.format_exc()}
        seconds = round(time.monotonic() - start, 1)
        record({"part": part.name, "is_check": part.is_check, **values, "took_s": seconds})


def to_json_line(values: dict) -> str:
    """Serialize values as one line of JSON; NaN and infinities, which JSON lacks, become strings."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(plain, allow_nan=False)
