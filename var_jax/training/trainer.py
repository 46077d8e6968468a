"""The one training loop: input, jit, logging, evaluation, pictures, checkpoints, resume.

A task (`training/task.py`) says what is trained; nothing here knows about tokenizers or transformers.
"""

import contextlib
import dataclasses
import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.data import transforms
from var_jax.data.loader import batch_indices, eval_batches, local_rows, train_batches
from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError, config_errors
from var_jax.paths import as_path, write_atomic
from var_jax.sharding import (
    batch_sharding,
    check_batch,
    global_batch,
    make_mesh,
    replicated,
    replicated_fraction,
)
from var_jax.training.checkpoint import CHECKPOINT_DIR, Checkpoints
from var_jax.training.checkpoint_integrity import check_space
from var_jax.training.hosts import check_one_file_system, check_same_program
from var_jax.training.jit_steps import eval_batch_size, jit_eval_step, jit_train_step
from var_jax.training.lock import RunLock
from var_jax.training.metrics import Log
from var_jax.training.nan_guard import LossMonitor, TrainingDiverged, is_finite
from var_jax.training.param_init import InitialValue
from var_jax.training.preview import draw_or_warn, example_images, save_previews
from var_jax.training.profiling import Profile, StepRange
from var_jax.training.resume import OwedWork, check_resume_compatible, is_due, owed_work
from var_jax.training.state import TrainState, count_parameters, create_state
from var_jax.training.task import Task

WORTH_SPLITTING = 2**24  # parameters; fewer may as well lie whole on every device


class Preempted(SystemExit):
    """The run was asked to stop and has saved its state."""


def check_training(cfg: ConfigDict) -> Mesh:
    """Check a stage's `train` section and make its mesh.

    Raises:
      ConfigError: naming the field that makes no run, or does not fit the devices.
    """
    least = dict.fromkeys(("batch", "log_every", "eval_every", "checkpoint_every", "max_to_keep"), 1)
    for name, bound in (least | {"preview_every": 0, "max_skipped": 0}).items():
        if cfg.get(name, bound) < bound:
            raise ConfigError(f"train.{name} must be at least {bound}, got {cfg[name]}")
    if not 0 <= cfg.ema_decay < 1:
        raise ConfigError(f"train.ema_decay must be in [0, 1), 0 for no moving average, got {cfg.ema_decay}")
    mesh = make_mesh(**cfg.mesh)
    check_batch(cfg.batch, mesh, cfg.grad_accum_steps)
    return mesh


def train(
    task: Task,
    stage: ConfigDict,
    steps: int,
    workdir: epath.PathLike,
    data: tuple[Source, Source],
    init_values: dict[str, InitialValue] | None = None,
    profile: StepRange | None = None,
) -> None:
    """Train a task to its last step, from the newest checkpoint under `workdir` on.

    At a step where several are due, the checkpoint is saved first; then come evaluation and pictures, which a
    stopped run does when it is resumed.

    Args:
      task: what to train.
      stage: its config.
      steps: optimiser steps in all.
      workdir: of the run; the stage writes under workdir/task.name and its pictures to workdir.
      data: training and held-out source, both of images, or of tokens where config.data.tokens is given.
      init_values: parameters to start from, by path; unused where there is a checkpoint.
      profile: steps to trace.

    Raises:
      ConfigError: on a batch that the mesh does not divide, a checkpoint of another config, or hosts that do
        not share the folder or would run different programs.
      RunLocked: where another process trains this stage of the run.
      CheckpointNotWritten: where the disk is full, and still is at the next checkpoint.
      CheckpointDamaged: where there are checkpoints, but none is whole.
      TrainingDiverged: where steps are not finite any more; the last sound checkpoint is kept.
      Preempted: after SIGTERM, with everything saved.
    """
    workdir = as_path(workdir)
    mesh = check_training(stage.train)
    (workdir / task.name).mkdir(parents=True, exist_ok=True)
    check_one_file_system(workdir / task.name)
    with RunLock(workdir / task.name) as lock:
        Trainer(task, stage, steps, workdir, data, mesh, lock, profile).run(init_values)


class Trainer:
    """One stage of a run: its programs, input, checkpoints and log, and the loop over its steps.

    Attributes:
      start: step of the checkpoint to resume from; 0 without one.
      owed: work that a stopped run left undone at that checkpoint.
    """

    def __init__(
        self,
        task: Task,
        stage: ConfigDict,
        steps: int,
        workdir: epath.Path,
        data: tuple[Source, Source],
        mesh: Mesh,
        lock: RunLock,
        profile: StepRange | None = None,
    ):
        """Trace the programs and compare the newest checkpoint with the config; arguments as for `train`."""
        self.task = task
        self.stage = stage
        self.cfg = stage.train
        self.steps = steps
        self.workdir = workdir
        self.directory = workdir / task.name
        self.mesh = mesh
        self.lock = lock
        self.profile = profile
        self._make_programs()
        self._make_input(*data)
        self._open_checkpoints()

    def _make_programs(self) -> None:
        task, cfg, mesh = self.task, self.cfg, self.mesh
        init_key, self.step_key = jax.random.split(jax.random.key(self.stage.seed))
        self.make_state, self.abstract = create_state(
            task.init, task.optimizer, cfg.ema_decay > 0, init_key, mesh
        )
        self.frozen = jax.device_put(jax.device_get(task.frozen), replicated(mesh))
        self.train_step = jit_train_step(task, cfg, self.steps, mesh, self.abstract)
        self.eval_step = jit_eval_step(task, mesh)
        self.is_finite = jax.jit(is_finite, out_shardings=replicated(mesh))
        self.previews = {}
        if cfg.preview_every:
            self.previews = task.preview_programs(mesh, self.abstract.sampling_params, self.frozen)

    def _make_input(self, source: Source, held_out: Source) -> None:
        data, size = self.stage.data, self.task.image_size
        self.source = source
        self.held_out = held_out
        self.transform = self.eval_transform = None
        if not data.tokens:
            with config_errors(prefix="config."):
                self.transform = ToPixels(source.name, size, data.resize, data.flip, data.shift)
                self.eval_transform = ToPixels(held_out.name, size, data.resize, False)
        self.rows = local_rows(batch_sharding(self.mesh), self.cfg.batch)
        self.eval_batch = eval_batch_size(self.cfg)
        self.eval_rows = local_rows(batch_sharding(self.mesh), self.eval_batch)

    def _open_checkpoints(self) -> None:
        self.checkpoints = Checkpoints(self.directory / CHECKPOINT_DIR, self.cfg.max_to_keep)
        self.choices = self.task.choices()
        self.record = self._describe_run()
        latest = self.checkpoints.latest()
        self.resumes = latest is not None
        self.start = latest or 0
        self.notice = ""
        self.owed = OwedWork()
        if self.resumes:
            saved, defaults = self.checkpoints.config(self.start), self.task.model_defaults()
            self.notice = check_resume_compatible(saved, self.record, self.directory, defaults)
            self.owed = owed_work(
                self.checkpoints,
                self.directory,
                self.start,
                self.steps,
                self.cfg,
                self.task.best_metric,
                bool(self.previews),
            )

    def _describe_run(self) -> dict:
        """Record, saved with every checkpoint, of what is trained on what."""
        task, tokens = self.task, self.stage.data.tokens
        return {
            "task": task.name,
            "model": task.model_fields(),
            "stage": self.stage.to_dict(),
            "steps": self.steps,
            "tokenizer": task.fingerprint,
            "weights": task.frozen_fingerprints(),
            "transform": 0 if tokens else transforms.VERSION,
            "dtype": self.choices.get("dtype", ""),
            "cache": dataclasses.asdict(self.source.description) if tokens else {},
        }

    def run(self, init_values: dict[str, InitialValue] | None = None) -> None:
        """Train to the last step; arguments and errors as for `train`."""
        if self.start >= self.steps and not self.owed.any:
            print(
                f"{self.task.name}: already trained for {self.start} steps under {self.directory}", flush=True
            )
            self.checkpoints.close()
            return
        batches = self.training_batches()
        state = self.restore_or_init(init_values)
        self._start_log()
        with (
            _closing(self.log),
            Profile(self.profile, self.directory) as trace,
            _pending_save_finished(self.checkpoints),
            _termination() as self.stop,
        ):
            step = self.start
            self.do_owed_work(state)
            stopping = self.owed.any and self.stop.is_set()  # without a step: the checkpoint is there
            while step < self.steps and not stopping:
                step += 1
                with trace.step(step, before=state):
                    batch = global_batch(next(batches), self.mesh)
                    state, metrics = self.train_step(state, self.frozen, batch, self.step_key)
                trace.end(step, after=metrics)
                self.log_step(step, metrics)
                stopping = self.after_step(step, state)
            self.checkpoints.wait()  # within: a second SIGTERM must not end this process while it writes
        self.checkpoints.close()
        if stopping:
            raise Preempted(
                f"{self.task.name}: stopped at step {step}, saved; run the same command again to go on"
            )

    def training_batches(self) -> Iterator[dict]:
        """Open the input at the step to resume from, and check that all hosts run the same program."""
        data, cfg = self.stage.data, self.cfg
        with config_errors():
            batches = train_batches(
                self.source,
                self.transform,
                cfg.batch,
                self.stage.seed,
                data.threads,
                data.workers,
                self.start,
                self.rows,
            )
        if self.start >= self.steps:
            return batches
        first = next(batches)
        inputs = self.abstract, self.frozen, _abstract_batch(first, cfg.batch, self.mesh), self.step_key
        check_same_program(self.train_step, inputs, self.choices)
        return itertools.chain([first], batches)

    def restore_or_init(self, init_values: dict[str, InitialValue] | None = None) -> TrainState:
        """Restore the newest checkpoint, or make the initial state with `init_values` put into it."""
        if self.resumes:
            return self.checkpoints.restore(self.start, self.abstract)
        check_space(self.directory, self.abstract)
        return self.make_state(init_values)

    def _start_log(self) -> None:
        task, cfg = self.task, self.cfg
        self.log = Log(self.directory, task.name, self.start, self.steps, cfg.batch, task.flops_per_image())
        size = count_parameters(self.abstract.params)
        chosen = "".join(f", {name} {value}" for name, value in self.choices.items())
        self.log.say(
            f"{task.name}: {size:,} parameters, {self.source.num_images} images, batch {cfg.batch}, "
            f"steps {self.start}..{self.steps}, {jax.device_count()} x {jax.devices()[0].device_kind}{chosen}"
        )
        path = self.directory / "config.json"
        if self.log.active:
            write_atomic(path, json.dumps(self.record, indent=1).encode())
        self.log.say(f"{task.name}: the config of this run is in {path}")
        if self.notice:
            self.log.say(f"{task.name}: {self.notice}")
        share, fsdp = replicated_fraction(self.abstract.params), self.mesh.shape["fsdp"]
        if fsdp > 1 and share > 0.5 and size > WORTH_SPLITTING:
            self.log.say(
                f"{task.name}: {share:.0%} of the parameters are whole on every device, since "
                f"train.mesh.fsdp={fsdp} does not divide their axes; give an fsdp that divides the width, "
                "and data"
            )
        self.monitor = LossMonitor(self.log, cfg.log_every, cfg.get("max_skipped", 20), self._record_numbers)

    def _record_numbers(self, step: int) -> np.ndarray:
        """Numbers of the images in the batch of a step."""
        return batch_indices(len(self.source), self.cfg.batch, self.stage.seed, step - 1)

    def do_owed_work(self, state: TrainState) -> None:
        """Evaluate and draw at the checkpoint where the run before was stopped, where that is owed."""
        if self.owed.evaluation:
            self.evaluate(self.start, state)
        elif np.isfinite(self.owed.score):
            self.checkpoints.set_score(self.start, self.owed.score)
        if self.owed.pictures and not self.stop.is_set():
            self.preview(self.start, state)

    def log_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Hand the metrics of a step to the log and the monitor."""
        self.log.flush()  # of the step before, while the device works on this one
        self.monitor.add(step, metrics)
        self.log.advance(step)
        if step == self.start + 1:
            jax.block_until_ready(metrics)
            self.log.restart_clock(step)  # compilation does not count as training
        if step % self.cfg.log_every == 0 or step in (1, self.steps):
            self.lock.check()
            self.checkpoints.poll()
            self.log.training(step, metrics)

    def after_step(self, step: int, state: TrainState) -> bool:
        """Save, evaluate and draw what is due; return whether to stop."""
        cfg, last = self.cfg, step == self.steps
        stopping = self.stop.is_set() or self.checkpoints.preempted(step)
        is_saved = False
        if step % cfg.checkpoint_every == 0 or last or stopping:
            is_saved = self.save(step, state, force=last or stopping)
        if not stopping and is_due(cfg.eval_every, step, self.steps):
            self.evaluate(step, state)
        if not (stopping or self.stop.is_set()) and is_due(cfg.preview_every, step, self.steps):
            self.preview(step, state)
        interrupted = self.stop.is_set() and not stopping  # while it evaluated or drew
        if interrupted and not is_saved:
            self.save(step, state, force=True)
        return stopping or interrupted

    def save(self, step: int, state: TrainState, force: bool) -> bool:
        """Save a checkpoint; return False where the step was skipped, unless forced."""
        with self.log.pause(state.step):
            self.monitor.check()
            if not self.is_finite(state):
                raise TrainingDiverged(f"{self.task.name}: the state after step {step} is not finite")
            if self.monitor.skipping and not force:  # older checkpoints would be pushed out
                self.log.say(f"{self.task.name}: no checkpoint of step {step}, which was skipped")
                return False
            self.checkpoints.save(step, state, self.record)
            return True

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluate on the held-out data, log the metrics and score the checkpoint; SIGTERM cuts it short."""
        with self.log.pause(state.step):
            batches = eval_batches(
                self.held_out, self.eval_transform, self.eval_batch, self.stage.data.threads, self.eval_rows
            )
            sums = _sums(self.eval_step, state, self.frozen, batches, self.mesh, self.stop)
        if sums is None:
            return
        metrics = self.task.summarize(sums)
        self.log.evaluation(step, metrics)
        self.log.sync()  # before the score: a checkpoint that has one is not evaluated again
        self.checkpoints.set_score(step, metrics[self.task.best_metric])

    def preview(self, step: int, state: TrainState) -> None:
        """Draw pictures and curves; a failure for lack of memory or disk is a warning."""
        with self.log.pause(state.step):
            examples = example_images(self.held_out, self.eval_transform)
            draw = partial(self.task.preview, self.previews, state.sampling_params, self.frozen, examples)
            pictures = draw_or_warn(draw, self.task.name, step)
            if self.log.active:
                save_previews(pictures, self.workdir, self.directory, self.task.name, step)


def _sums(
    eval_step: Callable, state: TrainState, frozen: dict, batches: Iterable, mesh: Mesh, stop: threading.Event
) -> dict | None:
    """Sums of an evaluation over all batches; None once `stop` is set."""
    sums = {}
    for batch in batches:
        if stop.is_set():
            return None
        part = jax.device_get(eval_step(state.sampling_params, frozen, global_batch(batch, mesh)))
        sums = jax.tree.map(np.add, sums, part) if sums else part
    return sums


def _abstract_batch(local: dict, batch: int, mesh: Mesh) -> dict:
    """Shapes and shardings of a global batch, from this process's part."""
    sharding = batch_sharding(mesh)
    shape = lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(shape, local)


@contextlib.contextmanager
def _closing(log: Log):
    """Closes the log; where training fails, what was logged so far is written, if it can be."""
    try:
        yield
    except BaseException:
        log.sync()
        raise
    log.close()


@contextlib.contextmanager
def _pending_save_finished(saved: Checkpoints):
    """Wait for the save in progress where training fails; append the last checkpoint to TrainingDiverged."""
    try:
        yield
    except TrainingDiverged as error:
        saved.wait()
        saved.close()
        raise TrainingDiverged(
            f"{error}\n  The last checkpoint under {saved.directory} is of step {saved.latest()}.\n"
            "  Run the same command again to go on from it.  If that ends like this, look at the records\n"
            "  named above, or start another run from it (config.init_from) with a lower learning rate."
        ) from error
    except BaseException:
        if jax.process_count() == 1:  # one of several must not wait for the others
            saved.finish_pending_save()  # the next call would read what this deletes
        raise


class _termination:
    """Context that turns SIGTERM into an event, in the main thread of a single process.

    Several processes must stop at the same step: there, JAX's own notice is asked for it.
    """

    def __enter__(self) -> threading.Event:
        event, self.previous = threading.Event(), None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
        return event

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
