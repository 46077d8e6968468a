"""A list of a checkpoint's files with their sizes, by which one that was cut off is told from a whole one.

Sizes alone: checksums would mean reading everything twice.
"""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import jax
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from var_jax.errors import UserError

FILE = "manifest.json"
NOTES = "_CHECKPOINT_METADATA"  # Orbax's own, JSON too
NOT_LISTED = (FILE, NOTES, atomicity.COMMIT_SUCCESS_FILE)  # written last of all


class CheckpointDamaged(UserError, ValueError):
    """A checkpoint is there, but not whole; names its directory."""


class SealedPath(atomicity.AtomicRenameTemporaryPath):
    """How Orbax commits a checkpoint: lists its files when all are written, then renames it."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # and not one of the items in it
            await asyncio.to_thread(seal, Path(self.get()))
        await super().finalize()


def seal(directory: Path) -> None:
    """Writes the list of all files under a directory."""
    (directory / FILE).write_text(json.dumps(_sizes(directory), indent=1))


def damage(directory: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where they are all there."""
    found = {}
    for name in (FILE, NOTES):
        try:
            found[name] = json.loads((directory / name).read_text())
        except FileNotFoundError:
            return f"{name} is missing: it was not written to its end, or by an older version"
        except ValueError:
            return f"{name} is cut short"
    there = _sizes(directory)
    for name, size in found[FILE].items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != size:
            return f"{name} has {there[name]} bytes in place of {size}"
    return None


def _sizes(directory: Path) -> dict[str, int]:
    """Path under the directory -> bytes, of every file."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name not in NOT_LISTED}


def steps_under(directory: Path) -> list[int]:
    """Of the checkpoints there, whole or not, in order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def check_whole(directory: Path) -> None:
    """Raises CheckpointDamaged if a checkpoint has lost something; those of older versions list no files."""
    if (directory / FILE).exists() and (wrong := damage(directory)):
        raise CheckpointDamaged(
            f"the checkpoint {directory} is damaged: {wrong}.  "
            "Move it away, put back a copy, or name another step."
        )


def set_damaged_aside(directory: Path) -> None:
    """Renames checkpoints that are not whole to STEP.damaged, with a warning each.

    Raises:
      CheckpointDamaged: where none is whole; nothing is renamed.
    """
    steps = steps_under(directory)
    found = {step: damage(directory / str(step)) for step in reversed(steps)}
    whole = [step for step, wrong in found.items() if not wrong]
    if steps and not whole:
        raise CheckpointDamaged(
            f"no checkpoint under {directory} is whole, so that training cannot go on from there\n  "
            + "\n  ".join(f"{step}: {wrong}" for step, wrong in found.items())
            + "\n  Put back a copy of one, or start anew in another --workdir."
        )
    if jax.process_count() > 1:  # everyone has looked
        multihost_utils.sync_global_devices("checkpoints looked at")
    for step in (step for step, wrong in found.items() if wrong):
        if jax.process_index() == 0:
            logging.warning("%s is damaged: %s.", directory / str(step), found[step])
            logging.warning("It is set aside; going on from step %s.", whole[0])
            aside = directory / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            (directory / str(step)).rename(aside)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints set aside")


@contextlib.contextmanager
def readable(directory: Path):
    """Names the checkpoint that is being read in whatever goes wrong."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise errors of many kinds
        raise CheckpointDamaged(f"the checkpoint {directory} cannot be read: {error}") from error
