"""Checkpoints of a stage, by Orbax: written in the background, complete or not there at all.

One checkpoint holds four items: `params`, the parameters to sample with (the moving average where
there is one); `state`, everything else that training goes on from; `data`, the position of the data
iterator; `config`, what was trained.
"""

import shutil
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from var_jax.training.state import TrainState

FOLDER = "checkpoints"


def _score(metrics: dict) -> float:
    """What is least at the best checkpoint."""
    return metrics["score"]


class CheckpointMissing(FileNotFoundError):
    """There is no complete checkpoint where one is needed."""


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one stage of a run.

    Attributes:
      directory: absolute path of their folder.
    """

    def __init__(self, directory: Path, keep: int):
        """Keeps the latest `keep` and the one with the least score."""
        self.directory = Path(directory).absolute()
        best = checkpoint_managers.BestN(
            get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        latest = checkpoint_managers.LatestN(keep)
        policy = checkpoint_managers.AnyPreservationPolicy([latest, best])
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=_score, best_mode="min", cleanup_tmp_directories=True
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "state": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, data: grain.DatasetIterator, config: dict, score: float | None
    ):
        """Starts writing; returns as soon as the arrays are copied.  Less is better in `score`.

        Raises:
          CheckpointNotWritten: if this, or the one before it, could not be written.
        """
        params, rest = _split(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(rest),
            data=grain.checkpoint.CheckpointSave(data),
            config=ocp.args.JsonSave(config),
        )
        metrics = None if score is None else {"score": score}
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics))

    def restore(self, step: int, abstract: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The state at a step, sharded as the abstract state says; moves the data iterator there."""
        params, rest = _split(abstract)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            state=ocp.args.StandardRestore(rest),
            data=grain.checkpoint.CheckpointRestore(data),
        )
        restored = self._manager.restore(step, args=items)
        return _join(restored["params"], restored["state"], abstract)

    def config(self, step: int) -> dict:
        """What was trained, as it was saved."""
        restored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        return restored["config"]

    def preempted(self, step: int) -> bool:
        """Whether the machines are about to be taken away (asked of all hosts at once)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointNotWritten: if it could not be written.
        """
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._manager.close()

    def _guard(self, write) -> None:
        try:
            write()
        except Exception as error:  # Orbax wraps what the disk said in errors of several kinds
            if not _from_disk(error):
                raise
            self._manager.reload()
            raise CheckpointNotWritten(
                f"a checkpoint could not be written under {self.directory}: {error}\n"
                f"  Nothing is lost: the last complete one is of step {self.latest()}. "
                f"{shutil.disk_usage(self.directory).free / 2**30:.2f} GiB are free there. "
                "Make room and run the same command again to go on."
            ) from error


def _from_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is the disk's (TensorStore says so in words only)."""
    words = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota")
    while error is not None:
        if isinstance(error, OSError) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _split(state: TrainState) -> tuple[dict, dict]:
    """The parameters to sample with, and the rest of the state, as plain trees."""
    rest = {"step": state.step, "opt_state": state.opt_state, "extra": state.extra}
    if state.ema is not None:
        rest["params"] = state.params
    return state.sampling_params, rest


def _join(params: dict, rest: dict, like: TrainState) -> TrainState:
    ema = None if like.ema is None else params
    return TrainState(rest["step"], rest.get("params", params), ema, rest["opt_state"], rest["extra"])


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


def load_config(directory: Path, step: int | str = "latest") -> dict:
    """What was trained, as a checkpoint has it; arguments and errors as for `load_params`."""
    manager, step = _open(directory, step)
    with manager:
        return manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]


def load_params(directory: Path, step: int | str = "latest") -> tuple[dict, dict]:
    """Parameters to sample with and the config of a checkpoint, on one device.

    Args:
      directory: folder of the checkpoints of a stage.
      step: a step, `latest`, or `best` (least score at evaluation).

    Returns:
      Parameters and config.

    Raises:
      CheckpointMissing: naming the folder, and the steps that there are.
    """
    manager, step = _open(directory, step)
    with manager:
        device = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            dict(manager.item_metadata(step)["params"]),
        )
        items = {"params": ocp.args.StandardRestore(abstract), "config": ocp.args.JsonRestore()}
        restored = manager.restore(step, args=ocp.args.Composite(**items))
    return restored["params"], restored["config"]


def _open(directory: Path, step: int | str) -> tuple[ocp.CheckpointManager, int]:
    """The checkpoints under a folder for reading, and the number of the step asked for."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise CheckpointMissing(f"no checkpoints under {directory}: train this stage first")
    manager = ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(read_only=True, best_fn=_score, best_mode="min"),
        item_handlers={"params": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()},
    )
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
        raise CheckpointMissing(f"a step must be a number, latest or best, found {step!r}; there are {steps}")
    if int(step) not in steps:
        raise CheckpointMissing(f"no checkpoint of step {step} under {directory}; there are {steps}")
    return manager, int(step)
