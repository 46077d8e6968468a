"""Profiler traces of training steps, for Perfetto (https://ui.perfetto.dev) and XProf."""

import contextlib
import dataclasses
import os
import re
import tempfile

import jax
from etils import epath
from jax import profiler

from var_jax.errors import ConfigError
from var_jax.paths import as_path, is_remote

PROFILE_DIR = "profile"
EVENT = "train"  # name of a step's event in the trace, whose argument step_num is the step


@dataclasses.dataclass(frozen=True)
class StepRange:
    """Range of steps, both ends included; steps are numbered from 1, as in the log."""

    first: int
    last: int

    def check(self, stage: str, steps: int) -> None:
        """Raise ConfigError if a stage ends before the last step of the range."""
        if self.last > steps:
            raise ConfigError(
                f"--profile={self.first}:{self.last}: the stage {stage} ends with step {steps}; give steps "
                "up to that one, or train only the other stages (--config.stages)"
            )


def parse_steps(text: str) -> StepRange:
    """Parse START:STOP.

    Raises:
      ConfigError: if the text has another form, or START is not in 1 .. STOP.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            f"--profile={text}: must be START:STOP, the first and the last step to trace, e.g. 10:12; steps "
            "are numbered from 1"
        )
    return StepRange(int(match[1]), int(match[2]))


class Profile:
    """Context of a training loop that writes a trace of some of its steps.

    Every process writes the trace of its own devices, under profile/process_0 and so on. A resumed run traces
    the remaining steps of the range.
    """

    def __init__(self, steps: StepRange | None, directory: os.PathLike):
        """Prepare the trace.

        Args:
          steps: steps to trace; None traces nothing.
          directory: directory of the stage.
        """
        self.steps = steps
        self.folder = as_path(directory) / PROFILE_DIR / f"process_{jax.process_index()}"
        self.tracing = False

    def __enter__(self) -> "Profile":
        return self

    def step(self, step: int, before) -> contextlib.AbstractContextManager:
        """Return the context of one step and its input; before the first, wait for the arrays `before`."""
        if self.steps is None or not self.steps.first <= step <= self.steps.last:
            return contextlib.nullcontext()
        if not self.tracing:
            jax.block_until_ready(before)
            options = profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing Python calls slows them, and hides the rest
            self.local = self.folder
            if is_remote(self.folder):  # JAX writes traces to local folders only
                self.local = epath.Path(tempfile.mkdtemp(prefix="profile"))
            profiler.start_trace(os.fspath(self.local), create_perfetto_trace=True, profiler_options=options)
            self.tracing = True
        return profiler.StepTraceAnnotation(EVENT, step_num=step)

    def end(self, step: int, after) -> None:
        """End a step; after the last of the range, wait for the arrays `after` and write the trace."""
        if self.tracing and step == self.steps.last:
            jax.block_until_ready(after)
            self._write()

    def __exit__(self, *_) -> None:
        if self.tracing:  # training stopped within the range
            self._write()

    def _write(self) -> None:
        self.tracing = False
        profiler.stop_trace()
        if self.local != self.folder:
            _move(self.local, self.folder)


def _move(folder: epath.Path, target: epath.Path) -> None:
    """Move the files under a local folder to an object store."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = epath.Path(root) / name
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    folder.rmtree()
