"""Storage errors of checkpoints, and manifests that detect damaged ones.

A manifest lists the files of a checkpoint with their sizes. It is written last, before the rename (on object
storage: the marker file) that commits the checkpoint, so an incomplete or truncated one is always noticed.
"""

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

MANIFEST_FILE = "manifest.json"
ORBAX_METADATA_FILE = "_CHECKPOINT_METADATA"  # JSON too
UNLISTED_FILES = (MANIFEST_FILE, ORBAX_METADATA_FILE, atomicity.COMMIT_SUCCESS_FILE)  # written after the list
MAX_REMOTE_REQUESTS = 32  # to an object store at a time
# TensorStore raises ValueError with a status code of absl in front. INVALID_ARGUMENT is not in the list: it
# would be a bug of ours.
_STORAGE_STATUS = re.compile(
    r"(ABORTED|ALREADY_EXISTS|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|NOT_FOUND|OUT_OF_RANGE"
    r"|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN): "
)


class CheckpointNotWritten(UserError, OSError):
    """Error for a checkpoint that could not be written; earlier ones are untouched."""


class CheckpointDamaged(UserError, ValueError):
    """Error for a checkpoint with missing, truncated or unreadable files; names its directory."""


# --- Storage errors


def is_storage_error(error: BaseException | None) -> bool:
    """Return whether an error or its cause is an OSError or a storage status of TensorStore."""
    while error is not None:
        is_status = isinstance(error, ValueError) and _STORAGE_STATUS.match(str(error))
        if is_status or isinstance(error, OSError):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def writing(directory: os.PathLike, note: Callable[[], str] = lambda: "  "):
    """Convert storage errors while a checkpoint is written into CheckpointNotWritten.

    On a full disk one thread of Orbax raises that no space is left, and another, possibly first, that a file
    is missing; so any storage error counts. Other errors pass unchanged.

    Args:
      directory: directory of the checkpoints.
      note: called after a failure; returns a sentence to add to the message.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not is_storage_error(error):
            raise
        raise CheckpointNotWritten(
            f"a checkpoint could not be written under {directory}: {error}\n{note()}{_free_space(directory)}"
            "the same command goes on from the last complete one."
        ) from error


@contextlib.contextmanager
def reading(directory: os.PathLike):
    """Convert storage and JSON errors while a checkpoint is read into CheckpointDamaged.

    Other errors, such as a parameter of another name, pass unchanged.
    """
    try:
        yield
    except Exception as error:  # Orbax raises bare exceptions from those of TensorStore
        if isinstance(error, json.JSONDecodeError) or is_storage_error(error):
            raise CheckpointDamaged(f"the checkpoint {directory} cannot be read: {error}") from error
        raise


def _free_space(directory: os.PathLike) -> str:
    """Describe the free space of a local disk, as the start of a sentence; "" if it is unknown."""
    if is_remote(directory):
        return ""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:  # the directory or its mount is gone
        return ""
    return f"{free / 2**30:.2f} GiB are free there. If that is too little, make room; "


def check_checkpoint_space(directory: os.PathLike, abstract: TrainState) -> None:
    """Raise CheckpointNotWritten unless a local disk has room for two checkpoints of this state."""
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


# --- Writing manifests


def write_manifest(directory: os.PathLike) -> None:
    """Write the manifest of all files under a directory."""
    directory = as_path(directory)
    (directory / MANIFEST_FILE).write_text(json.dumps(_file_sizes(directory), indent=1))


def add_to_manifest(directory: epath.Path, name: str, content: str) -> None:
    """Add a text file to a complete checkpoint and to its manifest.

    Interrupted anywhere, it leaves an intact checkpoint, with the file or without it.

    Args:
      directory: directory of the checkpoint.
      name: path of the file under the directory.
      content: text of the file.
    """
    sizes = json.loads((directory / MANIFEST_FILE).read_text())
    sizes[name] = len(content.encode())
    (directory / name).parent.mkdir(exist_ok=True)
    for path, text in ((directory / name, content), (directory / MANIFEST_FILE, json.dumps(sizes, indent=1))):
        partial = directory.parent / f"{path.name}.partial"  # outside the checkpoint, if left behind
        partial.write_text(text)
        partial.replace(path)


def _file_sizes(directory: epath.Path) -> dict[str, int]:
    """Return the bytes of every listed file by its path under the directory."""
    sizes = _remote_sizes(directory) if is_remote(directory) else _local_sizes(directory)
    return {name: size for name, size in sorted(sizes.items()) if name not in UNLISTED_FILES}


def _local_sizes(directory: epath.Path) -> dict[str, int]:
    # epath's stat looks up the owner's name, and fails in a container where the owner has none.
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names)
    return {os.path.relpath(path, directory): os.path.getsize(path) for path in paths}


def _remote_sizes(directory: epath.Path) -> dict[str, int]:
    # epath's walk yields paths without gs://.
    sizes, folders = {}, [directory]
    with concurrent.futures.ThreadPoolExecutor(MAX_REMOTE_REQUESTS) as pool:
        while folders:
            listings = pool.map(lambda folder: list(folder.iterdir()), folders)
            entries = [entry for listing in listings for entry in listing]
            stats = list(pool.map(lambda entry: entry.stat(), entries))
            folders = [entry for entry, stat in zip(entries, stats, strict=True) if stat.is_directory]
            for entry, stat in zip(entries, stats, strict=True):
                if not stat.is_directory:
                    sizes[os.fspath(entry).removeprefix(f"{os.fspath(directory)}/")] = stat.length
    return sizes


class ManifestRenamePath(atomicity.AtomicRenameTemporaryPath):
    """Commit of a checkpoint on a file system: write its manifest, then rename it."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # a checkpoint, not one of its items
            await asyncio.to_thread(write_manifest, self.get())
        await super().finalize()


class ManifestCommitFilePath(atomicity.CommitFileTemporaryPath):
    """Commit of a checkpoint in an object store: write its manifest, then the file that marks it complete.

    Object stores cannot rename directories.
    """

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():
            await asyncio.to_thread(write_manifest, self.get())
        await super().finalize()


def temporary_path_class(directory: os.PathLike) -> type[atomicity.TemporaryPathBase]:
    """Return the class by which Orbax commits checkpoints under a directory."""
    return ManifestCommitFilePath if is_remote(directory) else ManifestRenamePath


# --- Detecting damage


def steps_under(directory: os.PathLike) -> list[int]:
    """Return the sorted steps of the checkpoints in a directory, damaged ones included.

    In an object store, checkpoints that were not committed are left out.
    """
    directory = as_path(directory)
    paths = [path for path in directory.iterdir() if path.name.isdecimal()] if directory.exists() else []
    if is_remote(directory):
        paths = [path for path in paths if (path / atomicity.COMMIT_SUCCESS_FILE).exists()]
    return sorted(int(path.name) for path in paths)


def find_corruption(directory: os.PathLike) -> str | None:
    """Describe the first missing or truncated file of a checkpoint; None if there is none."""
    directory = as_path(directory)
    contents = {}
    for name in (MANIFEST_FILE, ORBAX_METADATA_FILE):
        try:
            contents[name] = json.loads((directory / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing: the checkpoint is incomplete, or of an older version"
        except ValueError:
            return f"{name} is truncated"
    sizes = _file_sizes(directory)
    for name, size in contents[MANIFEST_FILE].items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes in place of {size}"
    return None


def verify(directory: os.PathLike) -> None:
    """Raise CheckpointDamaged if a checkpoint is damaged; an older one without manifest passes."""
    if (as_path(directory) / MANIFEST_FILE).exists() and (damage := find_corruption(directory)):
        raise CheckpointDamaged(
            f"the checkpoint {directory} is damaged: {damage}. Move it away, restore a copy, or name another "
            "step."
        )


def quarantine_corrupt(directory: os.PathLike) -> None:
    """Rename damaged checkpoints to STEP.damaged, with a warning each.

    Process 0 checks them for all processes.

    Raises:
      CheckpointDamaged: if all are damaged, on all processes; nothing is renamed.
    """
    directory = as_path(directory)
    damage_by_step = {}
    if jax.process_index() == 0:
        steps = reversed(steps_under(directory))
        damage_by_step = {step: find_corruption(directory / str(step)) for step in steps}
    if jax.process_count() > 1:
        damage_by_step = dict(_broadcast_json(list(damage_by_step.items())))
    intact = [step for step, damage in damage_by_step.items() if not damage]
    if damage_by_step and not intact:
        raise CheckpointDamaged(
            f"no checkpoint under {directory} is intact, so training cannot resume from one\n  "
            + "\n  ".join(f"{step}: {damage}" for step, damage in damage_by_step.items())
            + "\n  Restore a copy of one, or start again in another --workdir."
        )
    if jax.process_index() == 0:
        for step, damage in damage_by_step.items():
            if not damage:
                continue
            logging.warning("%s is damaged: %s.", directory / str(step), damage)
            logging.warning("It is renamed to %d.damaged; going on from step %s.", step, intact[0])
            target = directory / f"{step}.damaged"
            target.rmtree(missing_ok=True)  # from an earlier quarantine
            (directory / str(step)).rename(target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")


def _broadcast_json(value):
    """Return process 0's value, serializable as JSON, on all processes."""
    text = json.dumps(value).encode()
    buffer = np.zeros(multihost_utils.broadcast_one_to_all(np.int32(len(text))), np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
