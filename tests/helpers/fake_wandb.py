"""Stand-in for the package wandb: the calls that `WandbWriter` makes, with the failures of the real one.

`tests/training/test_writers.py` runs its tests with the real package too, where it is installed.
"""

import os
import sys
import types

MODULE = sys.modules[__name__]


class Error(Exception):
    """Base class of the errors of wandb, as `wandb.Error`."""


class UsageError(Error):
    """Error of a missing API key, and of logging to a finished run."""


class Image:
    def __init__(self, picture):
        self.size = picture.size


class Run:
    def __init__(self, options: dict):
        self.options = options
        self.id = options["id"]
        self.config = options["config"]
        self.rows: list[dict] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.is_finished = False
        self.is_connected = True

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict) -> None:
        if not self.is_connected:
            raise ConnectionResetError("Connection lost")
        if self.is_finished:
            raise UsageError(f"Run ({self.id}) is finished.")
        if not isinstance(data, dict):
            raise TypeError("wandb.log must be passed a dictionary")
        self.rows.append(dict(data))

    @property
    def summary(self) -> dict:
        return {name: value for row in self.rows for name, value in row.items()}

    def finish(self) -> None:
        if not self.is_connected:
            raise ConnectionResetError("Connection lost")
        self.is_finished = True


def init(*, project, group, name, job_type, id, resume, dir, config) -> Run:
    if os.environ.get("WANDB_MODE") != "offline" and "WANDB_API_KEY" not in os.environ:
        raise UsageError("No API key configured. Use `wandb login` to log in.")
    MODULE.run = Run(dict(locals()))
    return MODULE.run


run: Run | types.NoneType = None
