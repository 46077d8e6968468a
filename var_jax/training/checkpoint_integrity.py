"""Manifests that detect truncated checkpoints, and explanations of failed writes."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

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
def writing(directory: os.PathLike, note: Callable[[], str] = lambda: "  "):
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


FILE = "manifest.json"
NOTES = "_CHECKPOINT_METADATA"  # Orbax's own, JSON too
NOT_LISTED = (FILE, NOTES, atomicity.COMMIT_SUCCESS_FILE)  # written last of all
REQUESTS = 32  # to an object store at a time


class CheckpointDamaged(UserError, ValueError):
    """A checkpoint is there, but not whole; names its directory."""


class SealedPath(atomicity.AtomicRenameTemporaryPath):
    """Commit of a checkpoint on a file system: its files are listed once written, then it is renamed."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # and not one of the items in it
            await asyncio.to_thread(write_manifest, self.get())
        await super().finalize()


class SealedObjects(atomicity.CommitFileTemporaryPath):
    """Commit of a checkpoint in an object store, where no folder can be renamed.

    Its files are listed once written; then comes one more, without which it counts as unfinished.
    """

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():
            await asyncio.to_thread(write_manifest, self.get())
        await super().finalize()


def temporary_path_class(directory: os.PathLike) -> type[atomicity.TemporaryPathBase]:
    """How checkpoints under a directory are committed."""
    return SealedObjects if is_remote(directory) else SealedPath


def write_manifest(directory: os.PathLike) -> None:
    """Writes the list of all files under a directory."""
    directory = as_path(directory)
    (directory / FILE).write_text(json.dumps(_sizes(directory), indent=1))


def add_to_manifest(directory: epath.Path, name: str, content: str) -> None:
    """Adds a text file, by its path under the directory, to a checkpoint that is complete, and to its list.

    Stopped anywhere, it leaves a checkpoint that is whole, with the file or without it.
    """
    listed = json.loads((directory / FILE).read_text())
    listed[name] = len(content.encode())
    (directory / name).parent.mkdir(exist_ok=True)
    for path, text in ((directory / name, content), (directory / FILE, json.dumps(listed, indent=1))):
        partial = directory.parent / f"{path.name}.partial"  # not in the checkpoint, should it be left
        partial.write_text(text)
        partial.replace(path)


def find_corruption(directory: os.PathLike) -> str | None:
    """What is wrong with the files of a checkpoint; None where they are all there."""
    directory, result = as_path(directory), {}
    for name in (FILE, NOTES):
        try:
            result[name] = json.loads((directory / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing: it was not written to its end, or by an older version"
        except ValueError:
            return f"{name} is cut short"
    there = _sizes(directory)
    for name, size in result[FILE].items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != size:
            return f"{name} has {there[name]} bytes in place of {size}"
    return None


def _sizes(directory: epath.Path) -> dict[str, int]:
    """Path under the directory -> bytes, of every file."""
    sizes = _remote_sizes(directory) if is_remote(directory) else _local_sizes(directory)
    return {name: size for name, size in sorted(sizes.items()) if name not in NOT_LISTED}


def _local_sizes(directory: epath.Path) -> dict[str, int]:
    # epath's stat looks up the name of the owner, and fails in a container where the owner has none.
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return {os.path.relpath(path, directory): os.path.getsize(path) for path in paths}


def _remote_sizes(directory: epath.Path) -> dict[str, int]:
    # epath's walk yields paths without gs://.
    sizes, folders = {}, [directory]
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        while folders:
            listings = pool.map(lambda folder: list(folder.iterdir()), folders)
            entries = [entry for listing in listings for entry in listing]
            stats = list(pool.map(lambda entry: entry.stat(), entries))
            folders = [entry for entry, stat in zip(entries, stats, strict=True) if stat.is_directory]
            for entry, stat in zip(entries, stats, strict=True):
                if not stat.is_directory:
                    sizes[os.fspath(entry).removeprefix(f"{os.fspath(directory)}/")] = stat.length
    return sizes


def steps_under(directory: os.PathLike) -> list[int]:
    """Of the checkpoints there, whole or not, in order; in an object store, of those that were finished."""
    directory = as_path(directory)
    paths = [path for path in directory.iterdir() if path.name.isdecimal()] if directory.exists() else []
    if is_remote(directory):
        paths = [path for path in paths if (path / atomicity.COMMIT_SUCCESS_FILE).exists()]
    return sorted(int(path.name) for path in paths)


def verify(directory: os.PathLike) -> None:
    """Raises CheckpointDamaged if a checkpoint has lost something; those of older versions list no files."""
    if (as_path(directory) / FILE).exists() and (wrong := find_corruption(directory)):
        raise CheckpointDamaged(
            f"the checkpoint {directory} is damaged: {wrong}.  "
            "Move it away, put back a copy, or name another step."
        )


def quarantine_corrupt(directory: os.PathLike) -> None:
    """Renames checkpoints that are not whole to STEP.damaged, with a warning each.

    On several processes the first one looks, and all go by what it saw.

    Raises:
      CheckpointDamaged: where none is whole, on all processes; nothing is renamed.
    """
    directory = as_path(directory)
    result = {}
    if jax.process_index() == 0:
        result = {step: find_corruption(directory / str(step)) for step in reversed(steps_under(directory))}
    if jax.process_count() > 1:
        result = dict(_from_first_process(list(result.items())))
    whole = [step for step, wrong in result.items() if not wrong]
    if result and not whole:
        raise CheckpointDamaged(
            f"no checkpoint under {directory} is whole, so that training cannot go on from there\n  "
            + "\n  ".join(f"{step}: {wrong}" for step, wrong in result.items())
            + "\n  Put back a copy of one, or start again in another --workdir."
        )
    damaged = {step: wrong for step, wrong in result.items() if wrong}
    if jax.process_index() == 0:
        for step, wrong in damaged.items():
            logging.warning("%s is damaged: %s.", directory / str(step), wrong)
            logging.warning("It is set aside; going on from step %s.", whole[0])
            aside = directory / f"{step}.damaged"
            aside.rmtree(missing_ok=True)  # of an earlier time
            (directory / str(step)).rename(aside)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")


def _from_first_process(value):
    """A value that JSON knows, as process 0 has it, on all processes."""
    text = json.dumps(value).encode()
    buffer = np.zeros(multihost_utils.broadcast_one_to_all(np.int32(len(text))), np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))


@contextlib.contextmanager
def reading(directory: os.PathLike):
    """Names the checkpoint that is being read where its files are missing, cut short or unreadable.

    Whatever is not damage, such as a parameter of another name, passes as it is.
    """
    try:
        yield
    except Exception as error:  # Orbax raises bare ones from those of TensorStore
        if isinstance(error, json.JSONDecodeError) or is_storage_error(error):
            raise CheckpointDamaged(f"the checkpoint {directory} cannot be read: {error}") from error
        raise
