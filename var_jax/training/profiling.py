"""Traces of some training steps, for Perfetto (https://ui.perfetto.dev) and XProf."""

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
EVENT = "train"  # name of a step's event in the trace; its number is the argument step_num


@dataclasses.dataclass(frozen=True)
class StepRange:
    """The steps first .. last, both among them; numbered from 1, as the log does."""

    first: int
    last: int

    def check(self, stage: str, steps: int) -> None:
        """Raises ConfigError where a stage has no such step."""
        if self.last > steps:
            raise ConfigError(
                f"--profile={self.first}:{self.last}: the stage {stage} ends with step {steps}; give steps "
                "that it has, or train the other stages alone (--config.stages)"
            )


def parse_steps(text: str) -> StepRange:
    """START:STOP -> those steps.

    Raises:
      ConfigError: on something else.
    """
    result = re.fullmatch(r"(\d+):(\d+)", text)
    if not result or not 1 <= int(result[1]) <= int(result[2]):
        raise ConfigError(
            f"--profile={text}: must be START:STOP, the first and the last step to trace, e.g. 10:12; steps "
            "are numbered from 1"
        )
    return StepRange(int(result[1]), int(result[2]))


class Profile:
    """Context of a training loop that writes a trace of some of its steps.

    Every process writes its own, since it sees its own devices alone: under profile/process_0, ...  A run
    that goes on from a checkpoint traces those of the steps that it does itself.
    """

    def __init__(self, steps: StepRange | None, directory: os.PathLike):
        """`directory`: of the stage.  None as `steps` traces nothing."""
        self.steps = steps
        self.folder = as_path(directory) / PROFILE_DIR / f"process_{jax.process_index()}"
        self.tracing = False

    def __enter__(self) -> "Profile":
        return self

    def step(self, step: int, before) -> contextlib.AbstractContextManager:
        """Context of one step, its input too; first waits for the arrays `before`, which are not its own."""
        if self.steps is None or not self.steps.first <= step <= self.steps.last:
            return contextlib.nullcontext()
        if not self.tracing:
            jax.block_until_ready(before)
            options = profiler.ProfileOptions()
            options.python_tracer_level = 0  # of all Python calls: it slows them, and hides the rest
            self.local = self.folder
            if is_remote(self.folder):  # JAX writes traces to local folders alone
                self.local = epath.Path(tempfile.mkdtemp(prefix="profile"))
            profiler.start_trace(os.fspath(self.local), create_perfetto_trace=True, profiler_options=options)
            self.tracing = True
        return profiler.StepTraceAnnotation(EVENT, step_num=step)

    def end(self, step: int, after) -> None:
        """After a step: writes the trace if it was the last of them, once `after` is worked out."""
        if self.tracing and step == self.steps.last:
            jax.block_until_ready(after)
            self._write()

    def __exit__(self, *_) -> None:
        if self.tracing:  # stopped on the way
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
