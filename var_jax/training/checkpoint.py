"""Checkpoints of a stage, by Orbax: written in the background, complete or not there at all.

One checkpoint holds three items: `params`, the parameters to sample with (the moving average where
there is one); `state`, everything else that training goes on from; `config`, what was trained.  The
position of the data is the step.
"""

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.checkpoint_manager import METRIC_ITEM_NAME
from orbax.checkpoint.path import atomicity

from var_jax.errors import UserError
from var_jax.paths import as_path, is_remote, storage_errors
from var_jax.training.checkpoint_integrity import (
    CheckpointDamaged,
    CheckpointNotWritten,
    add_to_manifest,
    quarantine_corrupt,
    reading,
    steps_under,
    temporary_path_class,
    verify,
    writing,
)
from var_jax.training.config_fields import with_present_names
from var_jax.training.state import TrainState

CHECKPOINT_DIR = "checkpoints"
READS = 5  # times that the newest checkpoint is asked for while others take its place
STATE_FIELDS = (
    "step",
    "opt_state",
    "extra",
    "skipped",
    "skipped_in_a_row",
)  # of the state, beside parameters


def _item_handlers() -> dict:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "state": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }


def _score(metrics: dict) -> float:
    """What is least at the best checkpoint."""
    return metrics["score"]


class CheckpointMissing(UserError, FileNotFoundError):
    """There is no complete checkpoint where one is needed."""


class CheckpointMismatch(UserError, ValueError):
    """A checkpoint is of another network than the one that it is restored into; names the arrays."""


def check_storage(path: os.PathLike, name: str) -> epath.Path:
    """The absolute path of a folder that checkpoints can be kept in: a local one, or gs://.

    Args:
      path: given by the user.
      name: the flag or config field that it was given by, for the message.

    Raises:
      ValueError: on another URL, on gs:// without the packages that reach it, or on a bucket that cannot be
        reached.
    """
    if not is_remote(path):
        return as_path(path)
    if not os.fspath(path).startswith("gs://"):
        raise ValueError(
            f"{name}={path}: Orbax keeps checkpoints in local folders and under gs:// alone. Mount the "
            "bucket, and give the path of the mount."
        )
    path = as_path(path)
    try:
        importlib.import_module("google.cloud.storage")  # Orbax asks it about the bucket
        path.exists()
    except ImportError as error:
        raise ValueError(f"{name}={path}: gs:// needs gcsfs (pip install gcsfs): {error}") from error
    except storage_errors() as error:
        raise ValueError(f"{name}={path} cannot be reached: {error}") from error
    return path


class Checkpoints:
    """The checkpoints of one stage of a run.

    On one process, a save that fails because of the disk is warned of, and the next one tried; the second
    in a row is an error.  Several processes do not know of each other's disks: there the first one is.

    Attributes:
      directory: absolute path of their folder.
    """

    def __init__(self, directory: os.PathLike, keep: int):
        """Keeps the latest `keep` and the one with the least score; sets aside those that are not whole.

        Raises:
          CheckpointDamaged: where there are some, but none is whole.
        """
        self.directory = as_path(directory)
        self._pending, self._failed = False, 0  # a save not yet waited for; how many failed in a row
        self._scores: dict[int, float] = {}  # of checkpoints that may still be being written
        quarantine_corrupt(self.directory)
        best = checkpoint_managers.BestN(
            get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        latest = checkpoint_managers.LatestN(keep)
        policy = checkpoint_managers.AnyPreservationPolicy([latest, best])
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=True,
                temporary_path_class=temporary_path_class(self.directory),
            ),
            item_handlers=_item_handlers(),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: dict, score: float | None = None):
        """Starts writing; returns as soon as the arrays are copied.  Less is better in `score`.

        Raises:
          CheckpointNotWritten: if this and the one before it could not be written.
        """
        self.finish_pending_save()
        params, rest = _split(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(rest),
            config=ocp.args.JsonSave(config),
        )
        self._pending = self._attempt(lambda: self._manager.save(step, args=items))
        if score is not None:
            self.set_score(step, score)

    def score(self, step: int) -> float | None:
        """The score of a checkpoint, as it was saved with it or set afterwards; None without one."""
        metrics = self._manager.metrics(step)
        return None if metrics is None else _score(metrics)

    def set_score(self, step: int, score: float) -> None:
        """Gives a checkpoint that was saved already its score; one that is not finite is never the best.

        It is written, where Orbax has it, once the checkpoint is: at the latest by the next `save` or `wait`.
        """
        if np.isfinite(score):
            self._scores[step] = float(score)

    def _write_scores(self) -> None:
        """Writes the scores of checkpoints that are complete, and lets Orbax read them."""
        scores, self._scores = self._scores, {}
        scores = {step: score for step, score in scores.items() if step in self._manager.all_steps()}
        if not scores:
            return
        for step, score in scores.items() if jax.process_index() == 0 else ():
            name = f"{METRIC_ITEM_NAME}/{METRIC_ITEM_NAME}"
            try:
                add_to_manifest(as_path(self.directory) / str(step), name, json.dumps({"score": score}))
            except storage_errors() as error:
                logging.warning("the score %g of step %d could not be written: %s", score, step, error)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("scores of checkpoints written")
        self._manager.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at a step, sharded as the abstract state says.

        Raises:
          CheckpointDamaged: where files are missing, cut short or unreadable.
          CheckpointMismatch: where it holds other arrays than the abstract state; names them.
        """
        params, rest = _split(abstract)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), state=ocp.args.StandardRestore(rest)
        )
        with reading(self.directory / str(step)):
            saved = [_metadata(self._manager, step, item) for item in ("params", "state")]
            if differences := _differences(saved[0], params) + _differences(saved[1], rest):
                raise CheckpointMismatch(
                    f"the checkpoint {self.directory / str(step)} is of another network or optimizer\n  "
                    + "\n  ".join(differences)
                    + "\n  Use the config and the version of var_jax that wrote it, or another --workdir."
                )
            restored = self._manager.restore(step, args=items)
        return _join(restored["params"], restored["state"], abstract)

    def config(self, step: int) -> dict:
        """What was trained, as it was saved."""
        with reading(self.directory / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        return with_present_names(restored["config"])

    def preempted(self, step: int) -> bool:
        """Whether the machines are about to be taken away (asked of all hosts at once)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointNotWritten: if it could not be written.
        """
        self.finish_pending_save()
        if self._failed:
            raise self._not_written

    def poll(self) -> None:
        """Warns of a save that has failed meanwhile, without waiting for one that goes on."""
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.finish_pending_save()

    def close(self) -> None:
        self._manager.close()

    def finish_pending_save(self) -> None:
        """Waits for the save before, and says if it failed."""
        if self._pending:
            self._pending = False
            if self._attempt(self._manager.wait_until_finished):
                self._failed = 0
        if self._scores:
            self._write_scores()

    def _attempt(self, write: Callable[[], object]) -> bool:
        """Whether writing succeeded, in so far as it is done when the call returns."""
        try:
            with writing(self.directory, self._not_lost):
                write()
        except CheckpointNotWritten as error:
            self._failed, self._not_written = self._failed + 1, error
            if self._failed > 1 or jax.process_count() > 1:
                raise
            logging.warning(
                "%s\n  Training goes on; it ends if the next one cannot be written either.", error
            )
            return False
        return True

    def _not_lost(self) -> str:
        """Frees what the failed save has taken, and says what there still is."""
        if jax.process_count() == 1 and not is_remote(self.directory):
            for left in self.directory.glob(f"*{atomicity.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(left, ignore_errors=True)  # what is still being written goes at the next start
        self._manager.reload()  # it has forgotten those that would have been deleted by now
        return f"  Nothing is lost: the last complete one is of step {self.latest()}. "


def _split(state: TrainState) -> tuple[dict, dict]:
    """The parameters to sample with, and the rest of the state, as plain trees."""
    rest = {name: getattr(state, name) for name in STATE_FIELDS}
    if state.ema is not None:
        rest["params"] = state.params
    return state.sampling_params, rest


def _join(params: dict, rest: dict, like: TrainState) -> TrainState:
    ema = None if like.ema is None else params
    return TrainState(
        params=rest.get("params", params), ema=ema, **{name: rest[name] for name in STATE_FIELDS}
    )


def _metadata(manager: ocp.CheckpointManager, step: int, item: str):
    """Shapes and types of the arrays of an item of a checkpoint, as a tree."""
    metadata = manager.item_metadata(step).get(item)
    if metadata is None:
        raise FileNotFoundError(f"{item} is missing")
    return metadata


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array of a tree, or of what Orbax tells of a saved one."""
    word = lambda key: str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))  # noqa: E731
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(word, path)): tuple(leaf.shape) for path, leaf in leaves}


def _differences(saved, wanted) -> list[str]:
    """Lines that name the arrays by which a saved item differs from an abstract one."""
    saved, wanted = _shapes(saved), _shapes(wanted)
    names = sorted(saved.keys() | wanted.keys())
    shown = lambda shapes, name: str(shapes.get(name, "missing"))  # noqa: E731
    return [
        f"{name}: {shown(saved, name)} in the checkpoint, {shown(wanted, name)} in this run"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]


def has_checkpoint(directory: os.PathLike) -> bool:
    """Whether there is a checkpoint to go on from."""
    return bool(steps_under(directory))


def load_config(directory: os.PathLike, step: int | str = "latest") -> tuple[int, dict]:
    """Step and what was trained, as a checkpoint has it; arguments and errors as for `load_params`."""
    return _read(directory, step, _restore_config)


def _restore_config(manager: ocp.CheckpointManager, step: int) -> tuple[int, dict]:
    restored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return step, with_present_names(restored["config"])


def load_params(directory: os.PathLike, step: int | str = "latest") -> tuple[dict, dict]:
    """Parameters to sample with and the config of a checkpoint, on one device.

    Args:
      directory: folder of the checkpoints of a stage.
      step: a step, `latest`, or `best` (least score at evaluation).

    Returns:
      Parameters (host arrays) and config.

    Raises:
      CheckpointMissing: naming the folder, and the steps that there are.
      CheckpointDamaged: naming the checkpoint that cannot be read.
    """
    return _read(directory, step, _restore_params)


def _restore_params(manager: ocp.CheckpointManager, step: int) -> tuple[dict, dict]:
    # Numpy arrays are restored as such: who needs another dtype casts on the host. These take no memory.
    abstract = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape),
        dict(_metadata(manager, step, "params")),
    )
    items = {"params": ocp.args.StandardRestore(abstract), "config": ocp.args.JsonRestore()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    return restored["params"], with_present_names(restored["config"])


def check_is_new(directory: os.PathLike) -> None:
    """Raises FileExistsError where a folder of checkpoints holds any."""
    if steps_under(directory):
        raise FileExistsError(f"{directory} holds checkpoints already; give another directory")


def save_params(directory: os.PathLike, params: dict, extra: dict, config: dict) -> None:
    """Writes a checkpoint of step 0 that can be sampled from, in little more memory than the parameters.

    Args:
      directory: folder of the checkpoints of a stage; must hold none.
      params: host arrays.
      extra: what the task carries in its state.
      config: as the training loop saves it.

    Raises:
      FileExistsError: where there is a checkpoint already.
      CheckpointNotWritten: if the disk is full.
    """
    directory = as_path(directory)
    check_is_new(directory)
    # Orbax would copy every array first, for saving in the background; here it is waited for.
    numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy_handler))
    handler = partial(
        ocp.PyTreeCheckpointHandler,
        save_concurrent_gb=1,
        type_handler_registry=registry,
        use_ocdbt=False,
        use_compression=False,
    )
    manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            temporary_path_class=temporary_path_class(directory),
        ),
        item_handlers={"params": handler(), "state": handler(), "config": ocp.JsonCheckpointHandler()},
    )
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(params),
        state=ocp.args.PyTreeSave({"extra": extra}),
        config=ocp.args.JsonSave(config),
    )
    with manager, writing(directory):
        manager.save(0, args=items)


class SavedArrays:
    """The arrays of one item of a checkpoint (`params` or `state`), read one at a time by their paths."""

    def __init__(self, directory: os.PathLike, step: int, item: str):
        self._where, self._handler = as_path(directory) / str(step) / item, ocp.PyTreeCheckpointHandler()
        tree = self._handler.metadata(self._where).tree if self._where.exists() else {}
        self._leaves = flatten_dict(tree, sep="/")

    def __contains__(self, path: str) -> bool:
        return path in self._leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def read(self, path: str) -> np.ndarray:
        """The array at a path like `quantizer/codebook`."""
        leaf = self._leaves[path]
        abstract = unflatten_dict({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}, sep="/")
        args = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)}, sep="/")
        restore = ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True)
        return jax.tree.leaves(self._handler.restore(self._where, args=restore))[0]


def _read(directory: os.PathLike, step: int | str, restore: Callable[[ocp.CheckpointManager, int], tuple]):
    """Reads a checkpoint; where a running training removes it meanwhile, the one that `step` names then."""
    directory = as_path(directory)
    for _ in range(READS):
        steps = steps_under(directory)
        try:
            manager, number = _open(directory, step)
            with manager, reading(directory / str(number)):
                return restore(manager, number)
        except (CheckpointDamaged, OSError) as error:
            failure = error
            if steps_under(directory) == steps:
                break
    raise failure


def _open(directory: epath.Path, step: int | str) -> tuple[ocp.CheckpointManager, int]:
    """The checkpoints under a folder for reading, and the number of the step asked for."""
    if not directory.is_dir():
        raise CheckpointMissing(f"no checkpoints under {directory}: train this stage first")
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, best_fn=_score, best_mode="min"
    )
    try:
        with reading(directory):
            manager = ocp.CheckpointManager(directory, options=options, item_handlers=_item_handlers())
    except CheckpointDamaged:  # it reads a little of every checkpoint, and does not say of which
        for number in steps_under(directory):
            verify(directory / str(number))
        raise
    steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointMissing(f"no complete checkpoint under {directory}: train this stage first")
    if step == "best":
        step = manager.best_step()
        if step is None or manager.metrics(step) is None:
            raise CheckpointMissing(f"no checkpoint under {directory} was evaluated; ask for `latest`")
    elif step == "latest":
        step = steps[-1]
    elif not str(step).isdecimal():
        raise CheckpointMissing(f"a step must be a number, latest or best, got {step!r}; there are {steps}")
    if int(step) not in steps:
        raise CheckpointMissing(f"no checkpoint of step {step} under {directory}; there are {steps}")
    verify(directory / str(step))
    return manager, int(step)
