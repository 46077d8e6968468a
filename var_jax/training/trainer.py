"""The one training loop: input, jit, logging, evaluation, pictures, checkpoints, resume.

A task (`training/task.py`) says what is trained; nothing here knows about tokenizers or transformers.
"""

import contextlib
import dataclasses
import itertools
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.data import transforms
from var_jax.data.loader import batch_indices, eval_batches, local_rows, train_batches
from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError, config_errors
from var_jax.images import save_png
from var_jax.paths import as_path, storage_errors
from var_jax.sharding import (
    batch_sharding,
    check_batch,
    global_batch,
    make_mesh,
    replicated,
    replicated_fraction,
)
from var_jax.training import checkpoint
from var_jax.training.checkpoint_integrity import check_space
from var_jax.training.hosts import (
    check_one_file_system,
    check_same_program,
    from_primary,
    succeeded_everywhere,
)
from var_jax.training.jit_steps import eval_batch_size, jit_eval_step, jit_train_step
from var_jax.training.lock import RunLock
from var_jax.training.metrics import Log, draw_curves, read_metrics
from var_jax.training.nan_guard import LossMonitor, TrainingDiverged, is_finite
from var_jax.training.param_init import InitialValue
from var_jax.training.profiling import Profile, StepRange
from var_jax.training.state import TrainState, count_parameters, create_state
from var_jax.training.task import Task

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
RESUMABLE_FIELDS = ("log_every", "eval_every", "checkpoint_every", "preview_every", "keep", "max_skipped")
# Files and folders whose content is compared instead: a cache by its description, networks by fingerprints.
WEIGHTS = ("stage.perceptual_weights", "stage.adversarial.dino_weights")
PATH_FIELDS = (
    *WEIGHTS,
    "stage.tokenizer",
    "stage.init_from",  # not read where there is a checkpoint
    "stage.train.mesh",
    "stage.train.remat",
    "stage.train.dtype",  # what it stands for is compared
    "stage.transformer.attention",
    "stage.transformer.remat",
    "stage.data.dir",
    "stage.data.tokens",
    "stage.data.threads",
    "stage.data.workers",
)

WORTH_SPLITTING = 2**24  # parameters; fewer may as well lie whole on every device


class Preempted(SystemExit):
    """The run was asked to stop and has saved its state."""


def check_training(cfg: ConfigDict) -> Mesh:
    """The mesh of a stage's `train` section.

    Raises:
      ConfigError: naming the field that makes no run, or does not fit the devices.
    """
    least = dict.fromkeys(("batch", "log_every", "eval_every", "checkpoint_every", "keep"), 1)
    for name, bound in (least | {"preview_every": 0, "max_skipped": 0}).items():
        if cfg.get(name, bound) < bound:
            raise ConfigError(f"train.{name} must be at least {bound}, got {cfg[name]}")
    if not 0 <= cfg.ema < 1:
        raise ConfigError(f"train.ema must be in [0, 1), 0 for no moving average, got {cfg.ema}")
    mesh = make_mesh(**cfg.mesh)
    check_batch(cfg.batch, mesh, cfg.accumulate)
    return mesh


def check_resume_compatible(saved: dict, now: dict, where: Path, defaults: dict | None = None) -> str:
    """Check that a checkpoint is of the same config, model, tokenizer and frozen networks.

    Args:
      saved, now: records of what is trained.
      where: the stage's folder, for the message.
      defaults: of the model's fields, for those that are newer than the run.

    Returns:
      A notice where images are decoded otherwise by now, or `dtype=auto` stands for another type on this
      platform; else "".

    Raises:
      ConfigError: naming each field that differs.
    """
    newer = {"dtype", "weights"} - saved.keys()  # a run of before these were recorded
    saved, now = _flat(saved), _flat({name: value for name, value in now.items() if name not in newer})
    for name, value in _flat(defaults or {}).items():
        for field in {f"model.{name}", f"stage.model.{name}"} & now.keys():
            saved.setdefault(field, value)
    if "stage.transformer.encoder_precision" in now:  # newer than the run, perhaps
        saved.setdefault("stage.transformer.encoder_precision", "high")
    notice = ""
    if saved.pop("transform", 0) != now.pop("transform", 0):
        notice = (
            "this version decodes or crops some images (transparent, turned, of 16 bits, not square) in "
            "another way than the one that began the run"
        )
    same_choice = saved.get("stage.train.dtype") == now.get("stage.train.dtype")
    if "dtype" in now and saved["dtype"] != now["dtype"] and same_choice:
        notice += "\n  " * bool(notice) + (
            f"the run began with matrix products in {saved['dtype']}; train.dtype=auto is {now['dtype']} "
            f"on this platform (--config.train.dtype={saved['dtype']} keeps it)"
        )
        now["dtype"] = saved["dtype"]
    for record in (saved, now):  # all that a run of before tells
        if "dtype" in newer:
            record["config.train.dtype"] = record.get("stage.train.dtype")
        if "weights" in newer:
            for field in WEIGHTS:
                record[f"{field.replace('stage.', 'config.')} is given"] = bool(record.get(field))
    different = [
        f"{field.replace('stage.', 'config.')}: {saved.get(field)!r} there, {now.get(field)!r} now"
        for field in sorted(set(saved) | set(now))
        if (saved.get(field) or None) != (now.get(field) or None)  # absent is off: it may be newer
        and field.rsplit(".", 1)[-1] not in RESUMABLE_FIELDS
        and not field.startswith(PATH_FIELDS)
    ]
    if different:
        raise ConfigError(
            f"the run under {where} was started with another config; use another --workdir, or set back\n  "
            + "\n  ".join(different)
        )
    return notice


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def train(
    task: Task,
    stage: ConfigDict,
    steps: int,
    workdir: epath.PathLike,
    data: tuple[Source, Source],
    given: dict[str, InitialValue] | None = None,
    profile: StepRange | None = None,
) -> None:
    """Trains a task to its last step, going on from the newest checkpoint under `workdir`.

    At a step where several are due, the checkpoint is saved first; then come evaluation and pictures, which a
    stopped run does when it goes on.

    Args:
      task: what to train.
      stage: its config.
      steps: optimiser steps in all.
      workdir: of the run; the stage writes under workdir/task.name and its pictures to workdir.
      data: training and held-out source, both of images, or of tokens where config.data.tokens is given.
      given: parameters to start from where there is no checkpoint to go on from, by path.
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
        _train(task, stage, steps, workdir, data, given, profile, mesh, lock)


def _train(task, stage, steps, workdir, data, given, profile, mesh, lock) -> None:
    """See `train`."""
    # ------------------------------------------------------------------ state, programs
    cfg, directory = stage.train, workdir / task.name
    key = jax.random.key(stage.seed)
    init_key, step_key = jax.random.split(key)
    make_state, abstract = create_state(task.init, task.optimizer, cfg.ema > 0, init_key, mesh)
    frozen = jax.device_put(jax.device_get(task.frozen), replicated(mesh))

    train_step, eval_step = jit_train_step(task, cfg, steps, mesh, abstract), jit_eval_step(task, mesh)
    finite = jax.jit(is_finite, out_shardings=replicated(mesh))
    previews = task.preview_programs(mesh, abstract.sampling_params, frozen) if cfg.preview_every else {}

    # ------------------------------------------------------------------ input
    source, held_out = data
    data_cfg = stage.data
    transform = transform_held_out = None
    if not data_cfg.tokens:
        with config_errors("config."):
            transform = ToPixels(source.name, task.image_size, data_cfg.resize, data_cfg.flip, data_cfg.shift)
            transform_held_out = ToPixels(held_out.name, task.image_size, stage.data.resize, False)
    rows = local_rows(batch_sharding(mesh), cfg.batch)
    eval_batch = eval_batch_size(cfg)
    eval_rows = local_rows(batch_sharding(mesh), eval_batch)

    # ------------------------------------------------------------------ start or resume
    saved = checkpoint.Checkpoints(directory / checkpoint.CHECKPOINT_DIR, cfg.keep)
    choices = task.choices()
    record = {"task": task.name, "model": task.model_fields(), "stage": stage.to_dict(), "steps": steps}
    record["tokenizer"] = task.fingerprint
    record["weights"] = task.frozen_fingerprints()
    record["transform"] = 0 if data_cfg.tokens else transforms.VERSION
    record["dtype"] = choices.get("dtype", "")
    record["cache"] = dataclasses.asdict(source.description) if data_cfg.tokens else {}
    start, notice = saved.latest() or 0, ""
    owed = Owed()
    if saved.latest() is not None:
        notice = check_resume_compatible(saved.config(start), record, directory, task.model_defaults())
        owed = _owed(saved, directory, start, steps, cfg, task.best_metric, bool(previews))
        if start >= steps and not owed.any:
            print(f"{task.name}: already trained for {start} steps under {directory}", flush=True)
            saved.close()
            return
    with config_errors():
        batches = train_batches(
            source, transform, cfg.batch, stage.seed, data_cfg.threads, data_cfg.workers, start, rows
        )
    if start < steps:
        first = next(batches)
        batches = itertools.chain([first], batches)
        check_same_program(
            train_step, (abstract, frozen, _abstract_batch(first, cfg.batch, mesh), step_key), choices
        )
    if saved.latest() is not None:
        state = saved.restore(start, abstract)
    else:
        check_space(directory, abstract)
        state = make_state(given)
    log = Log(directory, task.name, start, steps, cfg.batch, task.flops_per_image())
    size = count_parameters(abstract.params)
    chosen = "".join(f", {name} {value}" for name, value in choices.items())
    log.say(
        f"{task.name}: {size:,} parameters, {source.num_images} images, "
        f"batch {cfg.batch}, steps {start}..{steps}, {jax.device_count()} x {jax.devices()[0].device_kind}"
        f"{chosen}"
    )
    if notice:
        log.say(f"{task.name}: {notice}")

    share = replicated_fraction(abstract.params)
    if mesh.shape["fsdp"] > 1 and share > 0.5 and size > WORTH_SPLITTING:
        log.say(
            f"{task.name}: {share:.0%} of the parameters are whole on every device, since train.mesh.fsdp="
            f"{mesh.shape['fsdp']} does not divide their axes; give an fsdp that divides the width, and data"
        )

    monitor = LossMonitor(
        log,
        cfg.log_every,
        cfg.get("max_skipped", 20),
        lambda step: batch_indices(len(source), cfg.batch, stage.seed, step - 1),
    )

    def evaluate(step: int, state: TrainState, stop: threading.Event) -> None:
        """Evaluates; does nothing more where SIGTERM comes meanwhile."""
        with log.pause(state.step):
            held_out_batches = eval_batches(
                held_out, transform_held_out, eval_batch, data_cfg.threads, eval_rows
            )
            sums = _sums(eval_step, state, frozen, held_out_batches, mesh, stop)
        if sums is not None:
            metrics = task.summarize(sums)
            log.evaluation(step, metrics)
            log.sync()  # before the score: a checkpoint that has one is not evaluated again
            saved.set_score(step, metrics[task.best_metric])

    def draw(step: int, state: TrainState) -> None:
        """Draws; what fails for lack of memory or disk is a warning."""
        with log.pause(state.step):
            examples = _examples(held_out, transform_held_out)
            drawn = _without_failing(
                lambda: task.preview(previews, state.sampling_params, frozen, examples), task.name, step
            )
            if log.active:
                _save_pictures(drawn, workdir, directory, task.name, step)

    def save(step: int, state: TrainState, at_once: bool) -> bool:
        """Saves, unless the step was skipped and there is no need; returns whether it did."""
        with log.pause(state.step):
            monitor.read()
            if not finite(state):
                raise TrainingDiverged(f"{task.name}: the state after step {step} is not finite")
            if monitor.skipping and not at_once:  # checkpoints of before push each other out
                log.say(f"{task.name}: no checkpoint of step {step}, which was skipped")
                return False
            saved.save(step, state, record)
            return True

    # ------------------------------------------------------------------ the loop
    with (
        _closing(log),
        Profile(profile, directory) as traced,
        _checkpoints_settled(saved),
        _termination() as stop,
    ):
        step = start
        if owed.evaluation:
            evaluate(start, state, stop)
        elif np.isfinite(owed.score):
            saved.set_score(start, owed.score)
        if owed.pictures and not stop.is_set():
            draw(start, state)
        stopping = owed.any and stop.is_set()  # without a step: the checkpoint is there
        for step in () if stopping else range(start + 1, steps + 1):
            with traced.step(step, before=state):
                state, metrics = train_step(state, frozen, global_batch(next(batches), mesh), step_key)
            traced.end(step, after=metrics)
            log.flush()  # of the step before, while the device works on this one
            monitor.take(step, metrics)
            log.advance(step)
            last = step == steps
            if step == start + 1:
                jax.block_until_ready(metrics)
                log.restart_clock(step)  # compilation does not count as training
            if step % cfg.log_every == 0 or last or step == 1:
                lock.check()
                saved.poll()
                log.training(step, metrics)
            stopping = stop.is_set() or saved.preempted(step)
            is_saved = False
            if step % cfg.checkpoint_every == 0 or last or stopping:
                is_saved = save(step, state, at_once=last or stopping)
            if not stopping and _is_due(cfg.eval_every, step, steps):
                evaluate(step, state, stop)
            if not (stopping or stop.is_set()) and _is_due(cfg.preview_every, step, steps):
                draw(step, state)
            if stop.is_set() and not stopping:  # while it evaluated or drew
                stopping = True
                if not is_saved:
                    save(step, state, at_once=True)
            if stopping:
                break
        saved.wait()  # within: a second SIGTERM must not end this process while it writes
    saved.close()
    if stopping:
        raise Preempted(f"{task.name}: stopped at step {step}, saved; run the same command again to go on")


def _is_due(every: int, step: int, steps: int) -> bool:
    """True after every `every` steps and after the last one; never where `every` is 0."""
    return every > 0 and (step % every == 0 or step == steps)


@dataclasses.dataclass(frozen=True)
class Owed:
    """What was due at a checkpoint that a stopped run did not come to any more.

    Attributes:
      evaluation: whether to evaluate.
      score: of an evaluation that was logged, but is not with the checkpoint yet; NaN without one.
      pictures: whether to draw.
    """

    evaluation: bool = False
    score: float = np.nan
    pictures: bool = False

    @property
    def any(self) -> bool:
        return self.evaluation or self.pictures or bool(np.isfinite(self.score))


def _owed(
    saved, directory: epath.Path, step: int, steps: int, cfg: ConfigDict, metric: str, draws: bool
) -> Owed:
    """What a run owes the checkpoint that it goes on from, the same on all processes."""
    owed = np.array([0, np.nan, 0], np.float32)
    if step and jax.process_index() == 0:
        lines = [
            x for x in read_metrics(directory / "metrics.jsonl") if (x["step"], x["kind"]) == (step, "eval")
        ]
        if _is_due(cfg.eval_every, step, steps) and saved.score(step) is None:
            owed[:2] = (0, lines[-1][metric]) if lines else (1, np.nan)
        if draws and _is_due(cfg.preview_every, step, steps):
            owed[2] = not list((directory / "previews").glob(f"*_{step:07d}.png"))
    evaluation, score, pictures = from_primary(owed)
    return Owed(bool(evaluation), float(score), bool(pictures))


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


def _without_failing(preview: Callable[[], dict], name: str, step: int) -> dict:
    """The pictures of a preview; none, with a warning on all processes, where memory runs out on one."""
    drawn, failure = {}, None
    try:
        drawn = preview()
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failure = str(error) or "MemoryError"
    if not succeeded_everywhere(failure is None):
        reason = failure or "another host ran out of memory"
        logging.warning("%s: no pictures of step %d; training goes on. %s", name, step, reason)
        return {}
    return drawn


def _save_pictures(drawn: dict, workdir: epath.Path, directory: epath.Path, name: str, step: int) -> None:
    """Writes pictures and curves; a warning where that fails."""
    try:
        for title, picture in drawn.items():
            save_png(picture, directory / "previews" / f"{title}_{step:07d}.png")
            save_png(picture, workdir / f"{title}.png")
        draw_curves(directory, workdir / f"curves_{name}.png", name)
    except storage_errors() as error:
        logging.warning(
            "%s: the pictures of step %d could not be written; training goes on. %s", name, step, error
        )


def _abstract_batch(local: dict, batch: int, mesh: Mesh) -> dict:
    """Shapes and shardings of a global batch, from this process's part."""
    sharding = batch_sharding(mesh)
    shape = lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(shape, local)


def _examples(source: Source, transform: ToPixels | None, count: int = 32) -> np.ndarray | None:
    """uint8 [count, H, W, 3]: some images, the same every time; None of a source of tokens."""
    if transform is None:
        return None
    return np.stack([transform(source[i])["image"] for i in range(min(count, source.num_records))])


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
def _checkpoints_settled(saved: checkpoint.Checkpoints):
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
