"""A disk that is full: noticed before a run, and explained where it fills up during one."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from var_jax.errors import UserError
from var_jax.training.state import TrainState


class CheckpointNotWritten(UserError, OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


@contextlib.contextmanager
def explained(directory: Path, note: Callable[[], str] = lambda: "  "):
    """Turns whatever goes wrong while a checkpoint is written into what to do about it.

    It may be the disk in any guise: of a full one Orbax says in one thread that there is no space, and in
    another, which may come first, that a file is missing.
    """
    try:
        yield
    except Exception as error:
        raise CheckpointNotWritten(
            f"a checkpoint could not be written under {directory}: {error}\n{note()}"
            f"{shutil.disk_usage(directory).free / 2**30:.2f} GiB are free there. "
            "If that is too little, make room; the same command goes on from the last complete one."
        ) from error


def check_space(directory: Path, abstract: TrainState) -> None:
    """Raises CheckpointNotWritten unless the disk has room for two checkpoints of this state."""
    need = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < need:
        raise CheckpointNotWritten(
            f"{directory} has {free / 2**30:.2f} GiB free, but two checkpoints of this run take "
            f"{need / 2**30:.2f} GiB; make room or choose another --workdir"
        )
