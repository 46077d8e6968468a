"""Storage that is full or fails: noticed before a run, and told from a bug and explained during one."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable

import jax

from var_jax.errors import UserError
from var_jax.paths import as_path, is_remote
from var_jax.training.state import TrainState

# TensorStore raises ValueError with one of absl's codes in front; INVALID_ARGUMENT would be a bug of ours.
_STATUS = re.compile(
    r"(ABORTED|ALREADY_EXISTS|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|NOT_FOUND|OUT_OF_RANGE"
    r"|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN): "
)


class CheckpointNotWritten(UserError, OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def is_storage_error(error: BaseException | None) -> bool:
    """Whether an error, or the one behind it, is of the storage: OSError, or a status of TensorStore."""
    while error is not None:
        if isinstance(error, OSError) or (isinstance(error, ValueError) and _STATUS.match(str(error))):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def explained(directory: os.PathLike, note: Callable[[], str] = lambda: "  "):
    """Turns an error of the storage while a checkpoint is written into what to do about it.

    Of a full disk Orbax says in one thread that there is no space, and in another, which may come first, that
    a file is missing.  Whatever is not of the storage passes as it is.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_storage_error(error):
            raise
        raise CheckpointNotWritten(
            f"a checkpoint could not be written under {directory}: {error}\n{note()}{_room(directory)}"
            "the same command goes on from the last complete one."
        ) from error


def _room(directory: os.PathLike) -> str:
    """Free space of a local disk, as the start of a sentence; nothing where it is not known."""
    if is_remote(directory):
        return ""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:  # the folder is gone, or the mount
        return ""
    return f"{free / 2**30:.2f} GiB are free there. If that is too little, make room; "


def check_space(directory: os.PathLike, abstract: TrainState) -> None:
    """Raises CheckpointNotWritten unless a local disk has room for two checkpoints of this state."""
    if is_remote(directory):
        return
    need = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    as_path(directory).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < need:
        raise CheckpointNotWritten(
            f"{directory} has {free / 2**30:.2f} GiB free, but two checkpoints of this run take "
            f"{need / 2**30:.2f} GiB; make room or choose another --workdir"
        )
