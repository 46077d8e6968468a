"""The training loop: input, jitted steps, log, evaluation, previews, checkpoints and resuming.

A `Task` (training/task.py) defines what is trained; nothing here knows about tokenizers or transformers.
"""

import contextlib
import datetime
import itertools
import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator

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
from var_jax.training.checkpoint_integrity import check_checkpoint_space
from var_jax.training.hosts import check_one_file_system, check_same_program
from var_jax.training.jit_steps import eval_batch_size, jit_eval_step, jit_train_step
from var_jax.training.lock import RunLock
from var_jax.training.metrics import Log
from var_jax.training.nan_guard import LossMonitor, TrainingDiverged, is_finite
from var_jax.training.optimizer import peak_learning_rate
from var_jax.training.param_init import InitialValue
from var_jax.training.preview import example_images, run_or_warn, save_previews
from var_jax.training.profiling import Profile, StepRange
from var_jax.training.resume import (
    UnfinishedWork,
    check_resume_compatible,
    is_due,
    score_kind,
    unfinished_work,
)
from var_jax.training.sample_scores import SampleScorer, sample_conditions
from var_jax.training.software import describe_software
from var_jax.training.state import TrainState, count_parameters, create_state
from var_jax.training.task import Task
from var_jax.training.writers import parse_writers

STARTS_FILE = "starts.jsonl"  # a line each time that the stage was started
MIN_SHARDED_PARAMS = 2**24  # a smaller network may be replicated without a warning


def describe_devices() -> str:
    """Return the number and kind of the devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


class Preempted(SystemExit):
    """Exit of a run that was asked to stop and has saved its state."""


def check_training(cfg: ConfigDict) -> Mesh:
    """Check a stage's `train` section and make its mesh.

    Raises:
      ConfigError: if a field is out of range or does not fit the devices; names the field.
    """
    minimums = dict.fromkeys(("batch", "log_every", "eval_every", "checkpoint_every", "max_to_keep"), 1)
    minimums |= {"preview_every": 0, "max_skipped": 0, "fid_every": 0, "fid_samples": 2}
    for name, minimum in minimums.items():
        if cfg.get(name, minimum) < minimum:
            raise ConfigError(f"train.{name} must be at least {minimum}, got {cfg[name]}")
    if not 0 <= cfg.ema_decay < 1:
        raise ConfigError(f"train.ema_decay must be in [0, 1), 0 for no moving average, got {cfg.ema_decay}")
    if cfg.get("best_by", "loss") not in ("loss", "fid"):
        raise ConfigError(f"train.best_by must be loss or fid, got {cfg.best_by!r}")
    if cfg.get("best_by") == "fid" and (not cfg.fid_every or cfg.fid_every % cfg.checkpoint_every):
        raise ConfigError(
            "train.best_by=fid: train.fid_every must be a multiple of train.checkpoint_every="
            f"{cfg.checkpoint_every}, got {cfg.fid_every}"
        )
    mesh = make_mesh(**cfg.mesh)
    parse_writers(cfg.get("writers", ()))
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
    scorer: SampleScorer | None = None,
) -> None:
    """Train a task to its last step, resuming from the newest checkpoint under `workdir`.

    When several things are due at a step, the checkpoint is saved first, then the held-out data is evaluated,
    then samples are scored, then previews are drawn. A run that was stopped in between does the rest when it
    is resumed.

    Args:
      task: the task to train.
      stage: its config.
      steps: total number of optimizer steps.
      workdir: directory of the run; the stage writes to workdir/task.name, and its previews to workdir too.
      data: training and held-out source, of images, or of tokens if config.data.tokens is set.
      init_values: initial parameters by path; not used if there is a checkpoint.
      profile: steps to trace.
      scorer: what scores samples of the transformer every train.fid_every steps; None for no scores.

    Raises:
      ConfigError: if the mesh does not divide the batch, the checkpoint has another config, or the hosts do
        not share the directory or would run different programs.
      RunLocked: if another process trains this stage of the run.
      CheckpointNotWritten: if the disk is full, and still is at the next checkpoint.
      CheckpointDamaged: if there are checkpoints, but all are damaged.
      TrainingDiverged: if too many steps in a row are not finite; the last good checkpoint is kept.
      Preempted: after SIGTERM, with everything saved.
    """
    workdir = as_path(workdir)
    mesh = check_training(stage.train)
    (workdir / task.name).mkdir(parents=True, exist_ok=True)
    check_one_file_system(workdir / task.name)
    with RunLock(workdir / task.name) as lock:
        Trainer(task, stage, steps, workdir, data, mesh, lock, profile, scorer).run(init_values)


class Trainer:
    """Training of one stage: its jitted steps, input, checkpoints and log, and the loop over the steps.

    Attributes:
      start: step of the checkpoint to resume from; 0 without one.
      unfinished: evaluation, scores and previews that a stopped run did not finish at that checkpoint.
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
        scorer: SampleScorer | None = None,
    ):
        """Set up everything that can fail before the first step; arguments and errors as for `train`."""
        self.task = task
        self.stage = stage
        self.cfg = cfg = stage.train
        self.steps = steps
        self.workdir = workdir
        self.directory = workdir / task.name
        self.mesh = mesh
        self.lock = lock
        self.profile = profile
        self.scorer = scorer
        self.fid_every = cfg.fid_every if scorer else 0
        self.best_metric = "fid" if cfg.get("best_by") == "fid" else task.best_metric

        # Jitted functions, and the shapes and shardings of the state.
        init_key, self.step_key = jax.random.split(jax.random.key(stage.seed))
        use_ema = cfg.ema_decay > 0
        self.make_state, self.abstract = create_state(task.init, task.optimizer, use_ema, init_key, mesh)
        frozen_shardings = task.frozen_shardings(mesh, self.abstract.params)
        self.frozen = jax.device_put(jax.device_get(task.frozen), frozen_shardings)
        self.train_step = jit_train_step(task, cfg, steps, mesh, self.abstract)
        self.eval_step = jit_eval_step(task, mesh)
        self.is_finite = jax.jit(is_finite, out_shardings=replicated(mesh))
        self.previews = {}
        if cfg.preview_every or scorer:
            self.previews = task.preview_programs(mesh, self.abstract.sampling_params, self.frozen)

        # Input: transforms of the images, and the rows of each global batch that this process feeds.
        self.source, self.held_out = data
        self.transform = self.eval_transform = None
        if not stage.data.tokens:
            size, resize = task.image_size, stage.data.resize
            with config_errors(prefix="config."):
                self.transform = ToPixels(self.source.name, size, resize, stage.data.flip, stage.data.shift)
                self.eval_transform = ToPixels(self.held_out.name, size, resize, False)
        self.rows = local_rows(batch_sharding(mesh), cfg.batch)
        self.eval_batch = eval_batch_size(cfg)
        self.eval_rows = local_rows(batch_sharding(mesh), self.eval_batch)

        # Checkpoints: the record saved with each, and a comparison with that of the newest.
        self.checkpoints = Checkpoints(self.directory / CHECKPOINT_DIR, cfg.max_to_keep)
        self.choices = task.choices()
        self.record = self._describe_run()
        latest = self.checkpoints.latest()
        self.resumes = latest is not None
        self.start = latest or 0
        self.notice = ""
        self.unfinished = UnfinishedWork()
        if self.resumes:
            saved = self.checkpoints.config(self.start)
            defaults = task.model_defaults()
            self.notice = check_resume_compatible(saved, self.record, self.directory, defaults)
            self.unfinished = unfinished_work(
                self.checkpoints,
                self.directory,
                self.start,
                steps,
                cfg,
                self.fid_every,
                self.best_metric,
                has_previews=bool(self.previews),
            )

        # Log, monitor of the losses, and the event that SIGTERM sets.
        self.log = Log(
            self.directory,
            task.name,
            self.start,
            steps,
            cfg.batch,
            task.flops_per_image(),
            parse_writers(cfg.get("writers", ("tensorboard",))),
            self.record["stage"],
        )
        self.monitor = LossMonitor(self.log, cfg.log_every, cfg.get("max_skipped", 20), self._batch_records)
        self.stop = threading.Event()

    def _describe_run(self) -> dict:
        """Return the record of model, config and data that is saved with every checkpoint."""
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
            "cache": self.source.record if tokens else {},
            "class_names": list(self.source.class_names),
        }

    def run(self, init_values: dict[str, InitialValue] | None = None) -> None:
        """Train to the last step; arguments and errors as for `train`."""
        name = self.task.name
        if self.start >= self.steps and not self.unfinished.any:
            print(f"{name}: already trained for {self.start} steps under {self.directory}", flush=True)
            self.checkpoints.close()
            return
        batches = self.training_batches()
        state = self.restore_or_init(init_values)
        with (
            self.log,
            Profile(self.profile, self.directory) as trace,
            _finishing_pending_save(self.checkpoints),
            _sigterm_sets(self.stop),
        ):
            self.print_summary(self.write_config())
            step = self.start
            self.finish_work(state)
            stopping = self.unfinished.any and self.stop.is_set()  # before any step: the checkpoint exists
            while step < self.steps and not stopping:
                step += 1
                with trace.step(step, before=state):
                    batch = global_batch(next(batches), self.mesh)
                    state, metrics = self.train_step(state, self.frozen, batch, self.step_key)
                trace.end(step, after=metrics)
                self.log_step(step, metrics)
                stopping = self.after_step(step, state)
            self.checkpoints.wait()  # in the context, so that a second SIGTERM does not interrupt the save
        self.checkpoints.close()
        if stopping:
            raise Preempted(f"{name}: stopped at step {step}, saved; run the same command again to go on")

    def training_batches(self) -> Iterator[dict]:
        """Open the input at the step to resume from, and check that all hosts run the same program."""
        cfg, data = self.cfg, self.stage.data
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
        sharding = batch_sharding(self.mesh)
        abstract_batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((cfg.batch, *x.shape[1:]), x.dtype, sharding=sharding), first
        )
        args = (self.abstract, self.frozen, abstract_batch, self.step_key)
        check_same_program(self.train_step, args, self.choices)
        return itertools.chain([first], batches)

    def restore_or_init(self, init_values: dict[str, InitialValue] | None = None) -> TrainState:
        """Restore the newest checkpoint, or make the initial state with `init_values` merged into it."""
        if self.resumes:
            return self.checkpoints.restore(self.start, self.abstract)
        check_checkpoint_space(self.directory, self.abstract)
        return self.make_state(init_values)

    def write_config(self) -> epath.Path:
        """Write the whole config to config.json, and a line on this start to starts.jsonl.

        Returns:
          The path of config.json.
        """
        path = self.directory / "config.json"
        if self.log.active:
            command = shlex.join(sys.argv)
            content = {
                "command": command,
                "peak_learning_rate": peak_learning_rate(self.cfg),
                **self.record,
            }
            write_atomic(path, json.dumps(content, indent=1).encode())
            start = {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "step": self.start,
                "command": command,
                "parameters": count_parameters(self.abstract.params),
                "images": self.source.num_images,
                "devices": describe_devices(),
                "processes": jax.process_count(),
                **describe_software(),
            }
            starts = self.directory / STARTS_FILE
            earlier = starts.read_bytes() if starts.exists() else b""
            write_atomic(starts, earlier + json.dumps(start).encode() + b"\n")
        return path

    def print_summary(self, config_path: epath.Path) -> None:
        """Print the summary of the run and its warnings."""
        task, cfg, log = self.task, self.cfg, self.log
        num_params = count_parameters(self.abstract.params)
        choices = "".join(f", {name} {value}" for name, value in self.choices.items())
        log.say(
            f"{task.name}: {num_params:,} parameters, {self.source.num_images} images, batch {cfg.batch}, "
            f"steps {self.start}..{self.steps}, {describe_devices()}{choices}"
        )
        log.say(
            f"{task.name}: peak learning rate {peak_learning_rate(cfg):.4g}; "
            f"the whole config is in {config_path}"
        )
        log.say(f"{task.name}: compiling the step, which may take minutes; the next start finds it on disk")
        if self.notice:
            log.say(f"{task.name}: {self.notice}")
        fraction, fsdp = replicated_fraction(self.abstract.params), self.mesh.shape["fsdp"]
        if fsdp > 1 and fraction > 0.5 and num_params > MIN_SHARDED_PARAMS:
            log.say(
                f"{task.name}: {fraction:.0%} of the parameters are replicated on every device, because "
                f"train.mesh.fsdp={fsdp} does not divide their axes; set train.mesh.fsdp to a divisor of "
                "the width, and train.mesh.data to the rest"
            )

    def _batch_records(self, step: int) -> np.ndarray:
        """Return the indices of the data set's records in the batch of a step."""
        return batch_indices(len(self.source), self.cfg.batch, self.stage.seed, step - 1)

    def finish_work(self, state: TrainState) -> None:
        """Evaluate, score and draw at the checkpoint to resume from, if the stopped run did not."""
        self.checkpoints.set_score(self.start, self.unfinished.score)
        if self.unfinished.evaluation:
            self.evaluate(self.start, state)
        if self.unfinished.samples and not self.stop.is_set():
            self.score_samples(self.start, state)
        if self.unfinished.pictures and not self.stop.is_set():
            self.preview(self.start, state)

    def log_step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Pass the metrics of a step to the log and the monitor."""
        self.log.flush()  # the step before, while the device works on this one
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
        """Save, evaluate, score and draw what is due; return whether to stop."""
        cfg, is_last = self.cfg, step == self.steps
        stopping = self.stop.is_set() or self.checkpoints.preempted(step)
        is_saved = False
        if stopping:
            self.log.say(f"{self.task.name}: stopping at step {step}: saving")
        elif is_last:
            self.log.say(f"{self.task.name}: saving, evaluating and drawing, which may compile first")
        if step % cfg.checkpoint_every == 0 or is_last or stopping:
            is_saved = self.save(step, state, force=is_last or stopping)
        if not stopping and is_due(cfg.eval_every, step, self.steps):
            self.evaluate(step, state)
        if not (stopping or self.stop.is_set()) and is_due(self.fid_every, step, self.steps):
            self.score_samples(step, state)
        if not (stopping or self.stop.is_set()) and is_due(cfg.preview_every, step, self.steps):
            self.preview(step, state)
        interrupted = self.stop.is_set() and not stopping  # during evaluation or preview
        if interrupted and not is_saved:
            self.save(step, state, force=True)
        return stopping or interrupted

    def save(self, step: int, state: TrainState, force: bool) -> bool:
        """Save a checkpoint; return False, without saving, if the step was skipped and `force` is not set."""
        with self.log.pause(state.step):
            self.monitor.check()
            if not self.is_finite(state):
                raise TrainingDiverged(f"{self.task.name}: the state after step {step} is not finite")
            if self.monitor.skipping and not force:  # it would displace an older checkpoint
                self.log.say(f"{self.task.name}: no checkpoint of step {step}, which was skipped")
                return False
            self.checkpoints.save(step, state, self.record)
            return True

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluate on the held-out data and log the metrics; stop early on SIGTERM."""
        sums = {}
        with self.log.pause(state.step):
            threads = self.stage.data.threads
            for batch in eval_batches(
                self.held_out, self.eval_transform, self.eval_batch, threads, self.eval_rows
            ):
                if self.stop.is_set():
                    return
                batch = global_batch(batch, self.mesh)
                batch_sums = jax.device_get(self.eval_step(state.sampling_params, self.frozen, batch))
                sums = jax.tree.map(np.add, sums, batch_sums) if sums else batch_sums
        self.log_scores(step, "eval", self.task.summarize(sums))

    def score_samples(self, step: int, state: TrainState) -> None:
        """Draw samples and log their FID, or warn if memory runs out; stop early on SIGTERM."""
        labels = sample_conditions(self.source, self.cfg.fid_samples)
        with self.log.pause(state.step):
            program, params = self.previews["samples"], state.sampling_params
            metrics = run_or_warn(
                lambda: self.scorer.score(
                    program, params, self.frozen, labels, self.stage.seed, self.stop.is_set
                ),
                f"{self.task.name}: no FID of step {step}",
            )
        if metrics:
            self.log_scores(step, "samples", metrics)

    def log_scores(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Log the metrics of an evaluation, and score the checkpoint by them if they have the best metric."""
        self.log.evaluation(step, kind, metrics)
        self.log.sync()  # before the score, so that a resumed run finds the line
        if kind == score_kind(self.best_metric):
            self.checkpoints.set_score(step, metrics[self.best_metric])

    def preview(self, step: int, state: TrainState) -> None:
        """Draw previews and metric curves; warn if memory or disk space runs out."""
        task, params = self.task, state.sampling_params
        with self.log.pause(state.step):
            examples = example_images(self.held_out, self.eval_transform)
            pictures = run_or_warn(
                lambda: task.preview(self.previews, params, self.frozen, examples),
                f"{task.name}: no pictures of step {step}",
            )
            if self.log.active:
                save_previews(pictures, self.workdir, self.directory, task.name, step)
                self.log.pictures(step, pictures)


@contextlib.contextmanager
def _finishing_pending_save(checkpoints: Checkpoints):
    """Finish the save in progress if training fails; append the last checkpoint to TrainingDiverged."""
    try:
        yield
    except TrainingDiverged as error:
        checkpoints.wait()
        checkpoints.close()
        raise TrainingDiverged(
            f"{error}\n"
            f"  The last checkpoint under {checkpoints.directory} is of step {checkpoints.latest()}.\n"
            "  Run the same command again to go on from it. If that diverges too, look at the records named\n"
            "  above, or start another run from it (config.init_from) with a lower learning rate."
        ) from error
    except BaseException:
        if jax.process_count() == 1:  # one of several processes must not wait for the others
            checkpoints.finish_pending_save()  # else the next run would delete the unfinished checkpoint
        raise


@contextlib.contextmanager
def _sigterm_sets(event: threading.Event):
    """Set an event on SIGTERM, in the main thread of a single-process run.

    Several processes must stop at the same step; there, `Checkpoints.preempted` uses JAX's own handler.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
