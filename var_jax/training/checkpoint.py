"""Checkpoints of a stage, by Orbax: written asynchronously and committed atomically.

A checkpoint holds three items: `params`, the parameters to sample with (the moving average if there is one);
`state`, everything else that resuming needs; `config`, the record of what was trained. The position in the
data follows from the step.
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
from var_jax.training.config_fields import rename_fields
from var_jax.training.state import TrainState

CHECKPOINT_DIR = "checkpoints"
MAX_READ_ATTEMPTS = 5  # when a running training keeps replacing the checkpoint that is being read
# Warnings of Orbax whenever a checkpoint is opened to read its parameters alone.
EXPECTED_WARNINGS = (
    "Given directory is read only",
    'Item "state" was found in the checkpoint, but could not',
)
STATE_FIELDS = ("step", "opt_state", "extra", "skipped", "skipped_in_a_row")  # all but the parameters

logging.get_absl_logger().addFilter(lambda record: not record.getMessage().startswith(EXPECTED_WARNINGS))


def _item_handlers() -> dict:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "state": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }


def _score(metrics: dict) -> float:
    """Return the metric minimized to select the best checkpoint."""
    return metrics["score"]


class CheckpointMissing(UserError, FileNotFoundError):
    """Error for a directory without the complete checkpoint that is needed."""


class CheckpointMismatch(UserError, ValueError):
    """Error for a checkpoint whose arrays differ from those of the network restored into; names them."""


def check_storage(path: os.PathLike, name: str) -> epath.Path:
    """Return the absolute path of a directory that Orbax can write checkpoints to: local, or gs://.

    Args:
      path: path from the user.
      name: flag or config field of the path, for the message.

    Raises:
      ValueError: if it is another URL, the packages that gs:// needs are missing, or the bucket cannot be
        reached.
    """
    if not is_remote(path):
        return as_path(path)
    if not os.fspath(path).startswith("gs://"):
        raise ValueError(
            f"{name}={path}: Orbax keeps checkpoints in local directories and under gs:// only. Mount the "
            "bucket and give the path of the mount."
        )
    path = as_path(path)
    try:
        importlib.import_module("google.cloud.storage")  # Orbax queries the bucket with it
        path.exists()
    except ImportError as error:
        raise ValueError(f"{name}={path}: gs:// needs gcsfs (pip install gcsfs): {error}") from error
    except storage_errors() as error:
        raise ValueError(f"{name}={path} cannot be reached: {error}") from error
    return path


class Checkpoints:
    """Checkpoints of one stage of a run.

    On a single process, a save that fails because of the disk is a warning, and the second failure in a row
    an error. Several processes do not know of each other's disks, so the first failure is an error there.

    Attributes:
      directory: absolute path of the checkpoints.
    """

    def __init__(self, directory: os.PathLike, keep: int):
        """Open the checkpoints for saving, and quarantine damaged ones.

        Args:
          directory: directory of the checkpoints.
          keep: number of latest checkpoints to keep, besides the one with the lowest score.

        Raises:
          CheckpointDamaged: if there are checkpoints, but all are damaged.
        """
        self.directory = as_path(directory)
        self._has_pending_save = False
        self._failures_in_a_row = 0
        self._last_failure: CheckpointNotWritten | None = None
        self._unwritten_scores: dict[int, float] = {}  # the checkpoints may still be in progress
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
        """Return the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: dict, score: float | None = None):
        """Start saving, and return as soon as the arrays are copied; a lower `score` is better.

        Raises:
          CheckpointNotWritten: if neither this nor the previous checkpoint could be written.
        """
        self.finish_pending_save()
        params, rest = _split(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(rest),
            config=ocp.args.JsonSave(config),
        )
        self._has_pending_save = self._attempt(lambda: self._manager.save(step, args=items))
        if score is not None:
            self.set_score(step, score)

    def score(self, step: int) -> float | None:
        """Return the score of a checkpoint; None without one."""
        metrics = self._manager.metrics(step)
        return None if metrics is None else _score(metrics)

    def set_score(self, step: int, score: float) -> None:
        """Set the score of a saved checkpoint; a score that is not finite is ignored, so is never the best.

        It is written to Orbax's metrics once the checkpoint is complete: at the latest by the next `save` or
        `wait`.
        """
        if np.isfinite(score):
            self._unwritten_scores[step] = float(score)

    def _write_scores(self) -> None:
        """Write the scores of complete checkpoints, and let Orbax reload them."""
        scores, self._unwritten_scores = self._unwritten_scores, {}
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
        """Restore the state at a step.

        Args:
          step: step of a complete checkpoint.
          abstract: shapes and shardings of the state.

        Raises:
          CheckpointDamaged: if files are missing, truncated or unreadable.
          CheckpointMismatch: if its arrays differ from those of the abstract state; names them.
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
        """Return the record of what was trained, with the current names of config fields."""
        with reading(self.directory / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        return rename_fields(restored["config"])

    def preempted(self, step: int) -> bool:
        """Return whether the machines are about to be preempted; the same on all hosts at a step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
          CheckpointNotWritten: if the last checkpoint could not be written.
        """
        self.finish_pending_save()
        if self._failures_in_a_row:
            raise self._last_failure

    def poll(self) -> None:
        """Warn if the last save has failed, without waiting for a save in progress."""
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.finish_pending_save()

    def close(self) -> None:
        self._manager.close()

    def finish_pending_save(self) -> None:
        """Wait for the save in progress, and warn or raise if it failed."""
        if self._has_pending_save:
            self._has_pending_save = False
            if self._attempt(self._manager.wait_until_finished):
                self._failures_in_a_row = 0
        if self._unwritten_scores:
            self._write_scores()

    def _attempt(self, write: Callable[[], object]) -> bool:
        """Return whether a write succeeded, as far as it is done when the call returns."""
        try:
            with writing(self.directory, self._clean_up_failed_save):
                write()
        except CheckpointNotWritten as error:
            self._failures_in_a_row += 1
            self._last_failure = error
            if self._failures_in_a_row > 1 or jax.process_count() > 1:
                raise
            logging.warning(
                "%s\n  Training goes on; it ends if the next one cannot be written either.", error
            )
            return False
        return True

    def _clean_up_failed_save(self) -> str:
        """Delete the files of a failed save; return a sentence that names the last complete checkpoint."""
        if jax.process_count() == 1 and not is_remote(self.directory):
            for temporary in self.directory.glob(f"*{atomicity.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(temporary, ignore_errors=True)  # files still being written go at the next start
        self._manager.reload()  # the manager has dropped those that the save would have displaced
        return f"  Nothing is lost: the last complete one is of step {self.latest()}. "


def _split(state: TrainState) -> tuple[dict, dict]:
    """Split a state into the parameters to sample with and the rest, as plain trees."""
    rest = {name: getattr(state, name) for name in STATE_FIELDS}
    if state.ema is not None:
        rest["params"] = state.params
    return state.sampling_params, rest


def _join(params: dict, rest: dict, abstract: TrainState) -> TrainState:
    """Join the two items of `_split`."""
    ema = None if abstract.ema is None else params
    return TrainState(
        params=rest.get("params", params), ema=ema, **{name: rest[name] for name in STATE_FIELDS}
    )


def _metadata(manager: ocp.CheckpointManager, step: int, item: str):
    """Return the shapes and dtypes of an item of a checkpoint, as a tree."""
    metadata = manager.item_metadata(step).get(item)
    if metadata is None:
        raise FileNotFoundError(f"{item} is missing")
    return metadata


def _shapes_by_path(tree) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a tree, or of Orbax's metadata of a saved one, by its path."""
    key_name = lambda key: str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(key_name, path)): tuple(leaf.shape) for path, leaf in leaves}


def _differences(saved, abstract) -> list[str]:
    """Describe the arrays that differ between a saved item and an abstract one, a line each."""
    saved, abstract = _shapes_by_path(saved), _shapes_by_path(abstract)
    return [
        f"{path}: {saved.get(path, 'missing')} in the checkpoint, {abstract.get(path, 'missing')} in this run"
        for path in sorted(saved.keys() | abstract.keys())
        if saved.get(path) != abstract.get(path)
    ]


def has_checkpoint(directory: os.PathLike) -> bool:
    """Return whether there is a checkpoint to resume from."""
    return bool(steps_under(directory))


def load_config(directory: os.PathLike, step: int | str = "latest") -> tuple[int, dict]:
    """Load the step and the record of what was trained; arguments and errors as for `load_params`."""
    return _read_with_retries(directory, step, _restore_config)


def unfinished_notice(run: os.PathLike, task: str) -> str:
    """Return a warning if a stage of a run was not trained to its last step, else an empty text."""
    folder = as_path(run) / task
    if not has_checkpoint(folder / CHECKPOINT_DIR):
        return ""
    step, record = load_config(folder / CHECKPOINT_DIR)
    if step >= record.get("steps", 0):
        return ""
    saved = folder / "config.json"
    command = json.loads(saved.read_text()).get("command", "") if saved.exists() else ""
    advice = f"; to go on: python {command}" if command else ""
    return f"warning: {folder} stopped at step {step} of {record['steps']}{advice}"


def _restore_config(manager: ocp.CheckpointManager, step: int) -> tuple[int, dict]:
    restored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return step, rename_fields(restored["config"])


def load_params(directory: os.PathLike, step: int | str = "latest") -> tuple[dict, dict]:
    """Load the parameters to sample with and the config of a checkpoint.

    Args:
      directory: directory of the checkpoints of a stage.
      step: a step, `latest`, or `best` (lowest score at evaluation).

    Returns:
      Parameters (host arrays) and the record of what was trained.

    Raises:
      CheckpointMissing: if there is no such checkpoint; names the directory and the existing steps.
      CheckpointDamaged: if the checkpoint cannot be read; names it.
    """
    return _read_with_retries(directory, step, _restore_params)


def _restore_params(manager: ocp.CheckpointManager, step: int) -> tuple[dict, dict]:
    # Restored as NumPy arrays, so that callers can cast on the host. Broadcast zeros take no memory.
    abstract = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape),
        dict(_metadata(manager, step, "params")),
    )
    items = {"params": ocp.args.StandardRestore(abstract), "config": ocp.args.JsonRestore()}
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    return restored["params"], rename_fields(restored["config"])


def check_is_new(directory: os.PathLike) -> None:
    """Raise FileExistsError if a directory holds checkpoints."""
    if steps_under(directory):
        raise FileExistsError(f"{directory} holds checkpoints already; give another directory")


def save_params(directory: os.PathLike, params: dict, extra: dict, config: dict) -> None:
    """Write a checkpoint of step 0 to sample from, in little more memory than the parameters take.

    Args:
      directory: directory of the checkpoints of a stage; must hold none.
      params: host arrays.
      extra: `TrainState.extra` of the task.
      config: record of what was trained, as the training loop saves it.

    Raises:
      FileExistsError: if there is a checkpoint already.
      CheckpointNotWritten: if the disk is full.
    """
    directory = as_path(directory)
    check_is_new(directory)
    # By default Orbax copies every array, which only asynchronous saving needs.
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
    """Arrays of one item of a checkpoint (`params` or `state`), read one at a time by their paths."""

    def __init__(self, directory: os.PathLike, step: int, item: str):
        self._path = as_path(directory) / str(step) / item
        self._handler = ocp.PyTreeCheckpointHandler()
        tree = self._handler.metadata(self._path).tree if self._path.exists() else {}
        self._leaves = flatten_dict(tree, sep="/")

    def __contains__(self, path: str) -> bool:
        return path in self._leaves

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def read(self, path: str) -> np.ndarray:
        """Read the array at a path like `quantizer/codebook`."""
        leaf = self._leaves[path]
        abstract = unflatten_dict({path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}, sep="/")
        args = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)}, sep="/")
        restore = ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True)
        return jax.tree.leaves(self._handler.restore(self._path, args=restore))[0]


def _read_with_retries(
    directory: os.PathLike, step: int | str, restore: Callable[[ocp.CheckpointManager, int], tuple]
):
    """Read a checkpoint; if a running training removes it meanwhile, read the one that `step` then names."""
    directory = as_path(directory)
    for _ in range(MAX_READ_ATTEMPTS):
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
    """Open the checkpoints of a directory for reading, and resolve `latest` and `best` to a step."""
    if not directory.is_dir():
        raise CheckpointMissing(f"no checkpoints under {directory}: train this stage first")
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, best_fn=_score, best_mode="min"
    )
    handlers = _item_handlers()
    del handlers["state"]  # its metadata would be read, too, which takes twice as long as that of `params`
    try:
        with reading(directory):
            manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    except CheckpointDamaged:  # Orbax reads metadata of every checkpoint, but does not name the damaged one
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
