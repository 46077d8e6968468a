"""The one training loop: input, jit, logging, evaluation, pictures, checkpoints, resume.

A task (`training/task.py`) says what is trained; nothing here knows about tokenizers or transformers.
"""

import contextlib
import dataclasses
import signal
import threading
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.data.loader import batch_indices, eval_batches, local_rows, train_batches
from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels
from var_jax.sampling import pictures
from var_jax.training import checkpoint
from var_jax.training.disk import check_space
from var_jax.training.fine_tune import Given
from var_jax.training.logging import Log, draw_curves
from var_jax.training.profile import Profile, Steps
from var_jax.training.sharding import (
    batch_sharding,
    check_batch,
    global_batch,
    make_mesh,
    replicated,
    whole_share,
)
from var_jax.training.state import count_parameters, create_state
from var_jax.training.step import eval_program, train_program
from var_jax.training.task import Task
from var_jax.training.watch import TrainingDiverged, Watch, is_finite

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
FREE_TO_CHANGE = ("log_every", "eval_every", "checkpoint_every", "preview_every", "keep", "max_skipped")
# What the tokens of a cache are is checked by its description, and a tokenizer by its fingerprint, wherever
# they lie.
FREE_TO_MOVE = (
    "stage.tokenizer",
    "stage.train.mesh",
    "stage.transformer",
    "stage.data.dir",
    "stage.data.tokens",
    "stage.data.threads",
)

WORTH_SPLITTING = 2**24  # parameters; fewer may as well lie whole on every device


class Preempted(SystemExit):
    """The run was asked to stop and has saved its state."""


def check_training(cfg: ConfigDict) -> Mesh:
    """The mesh of a stage's `train` section.

    Raises:
      ValueError: naming the field that makes no run, or does not fit the devices.
    """
    for name in ("batch", "log_every", "eval_every", "preview_every", "checkpoint_every", "keep"):
        if cfg[name] < 1:
            raise ValueError(f"train.{name} must be at least 1, found {cfg[name]}")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"train.ema must be in [0, 1), 0 for no moving average, found {cfg.ema}")
    mesh = make_mesh(**cfg.mesh)
    check_batch(cfg.batch, mesh, cfg.accumulate)
    return mesh


def check_same_run(saved: dict, now: dict, where: Path, defaults: dict | None = None) -> None:
    """Raises ValueError, naming each field, if a checkpoint is of another config, model or tokenizer.

    `defaults` of the model's fields stand for those that are newer than the run.
    """
    saved, now = _flat(saved), _flat(now)
    for name, value in _flat(defaults or {}).items():
        for field in {f"model.{name}", f"stage.model.{name}"} & now.keys():
            saved.setdefault(field, value)
    different = [
        f"{field.replace('stage.', 'config.')}: {saved.get(field)!r} there, {now.get(field)!r} now"
        for field in sorted(set(saved) | set(now))
        if (saved.get(field) or None) != (now.get(field) or None)  # absent is off: it may be newer
        and field.rsplit(".", 1)[-1] not in FREE_TO_CHANGE
        and not field.startswith(FREE_TO_MOVE)
    ]
    if different:
        raise ValueError(
            f"the run under {where} was started with another config; use another --workdir, or set back\n  "
            + "\n  ".join(different)
        )


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
    workdir: Path,
    data: tuple[Source, Source],
    given: dict[str, Given] | None = None,
    profile: Steps | None = None,
) -> None:
    """Trains a task to its last step, going on from the newest checkpoint under `workdir`.

    Args:
      task: what to train.
      stage: its config.
      steps: optimiser steps in all.
      workdir: of the run; the stage writes under workdir/task.name and its pictures to workdir.
      data: training and held-out source, both of images, or of tokens where config.data.tokens is given.
      given: parameters to start from where there is no checkpoint to go on from, by path.
      profile: steps to trace.

    Raises:
      ValueError: on a batch that the mesh does not divide, or a checkpoint of another config.
      CheckpointNotWritten: where the disk is full, and still is at the next checkpoint.
      CheckpointDamaged: where there are checkpoints, but none is whole.
      TrainingDiverged: where steps are not finite any more; the last sound checkpoint is kept.
      Preempted: after SIGTERM, with everything saved.
    """
    # ------------------------------------------------------------------ mesh, state, programs
    cfg, directory = stage.train, workdir / task.name
    mesh = check_training(cfg)
    key = jax.random.key(stage.seed)
    init_key, step_key = jax.random.split(key)
    make_state, abstract = create_state(task.init, task.optimizer, cfg.ema > 0, init_key, mesh)
    frozen = jax.device_put(jax.device_get(task.frozen), replicated(mesh))

    train_step, eval_step = train_program(task, cfg, steps, mesh, abstract), eval_program(task, mesh)
    finite = jax.jit(is_finite, out_shardings=replicated(mesh))
    previews = task.preview_programs(mesh, abstract.sampling_params, frozen)

    # ------------------------------------------------------------------ input
    source, held_out = data
    look = stage.data
    transform = transform_held_out = None
    if not look.tokens:
        transform = ToPixels(source.name, task.image_size, look.resize, look.flip, look.shift)
        transform_held_out = ToPixels(held_out.name, task.image_size, stage.data.resize, False)
    rows = local_rows(batch_sharding(mesh), cfg.batch)

    # ------------------------------------------------------------------ start or resume
    saved = checkpoint.Checkpoints(directory / checkpoint.FOLDER, cfg.keep)
    record = {"task": task.name, "model": task.model_fields(), "stage": stage.to_dict(), "steps": steps}
    record["tokenizer"] = task.fingerprint
    record["cache"] = dataclasses.asdict(source.description) if look.tokens else {}
    start = saved.latest() or 0
    if saved.latest() is not None:
        check_same_run(saved.config(start), record, directory, task.model_defaults())
        if start >= steps:
            print(f"{task.name}: already trained for {start} steps under {directory}", flush=True)
            saved.close()
            return
        state = saved.restore(start, abstract)
    else:
        check_space(directory, abstract)
        state = make_state(given)
    batches = train_batches(source, transform, cfg.batch, stage.seed, look.threads, look.workers, start, rows)
    log = Log(directory, task.name, start, steps, cfg.batch, task.flops_per_image())
    size = count_parameters(abstract.params)
    log.say(
        f"{task.name}: {size:,} parameters, {source.num_images} images, "
        f"batch {cfg.batch}, steps {start}..{steps}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    )

    share = whole_share(abstract.params)
    if mesh.shape["fsdp"] > 1 and share > 0.5 and size > WORTH_SPLITTING:
        log.say(
            f"{task.name}: {share:.0%} of the parameters are whole on every device, since train.mesh.fsdp="
            f"{mesh.shape['fsdp']} does not divide their axes; give an fsdp that divides the width, and data"
        )

    watch = Watch(
        log,
        cfg.log_every,
        cfg.get("max_skipped", 20),
        lambda step: batch_indices(len(source), cfg.batch, stage.seed, step - 1),
    )

    def evaluate() -> dict[str, float]:
        with log.pause(state.step):
            sums = {}
            for batch in eval_batches(held_out, transform_held_out, cfg.batch, look.threads, rows):
                found = jax.device_get(eval_step(state.sampling_params, frozen, global_batch(batch, mesh)))
                sums = jax.tree.map(np.add, sums, found) if sums else found
            return task.summarize(sums)

    def draw(step: int) -> None:
        with log.pause(state.step):
            examples = _examples(held_out, transform_held_out)
            for name, picture in task.preview(previews, state.sampling_params, frozen, examples).items():
                if log.active:
                    pictures.save(picture, directory / "previews" / f"{name}_{step:07d}.png")
                    pictures.save(picture, workdir / f"{name}.png")
            if log.active:
                draw_curves(directory, workdir / f"curves_{task.name}.png", task.name)

    def save(step: int, score: float | None, at_once: bool) -> None:
        with log.pause(state.step):
            watch.read()
            if not finite(state):
                raise TrainingDiverged(f"{task.name}: the state after step {step} is not finite")
            if watch.skipping and not at_once:  # checkpoints of before push each other out
                log.say(f"{task.name}: no checkpoint of step {step}, which was skipped")
            else:
                saved.save(step, state, record, score)

    # ------------------------------------------------------------------ the loop
    with Profile(profile, directory) as traced, _last_checkpoint_named(saved), _termination() as stop:
        for step in range(start + 1, steps + 1):
            with traced.step(step, before=state):
                state, metrics = train_step(state, frozen, global_batch(next(batches), mesh), step_key)
            traced.end(step, after=metrics)
            log.flush()  # of the step before, while the device works on this one
            watch.take(step, metrics)
            log.advance(step)
            last = step == steps
            if step == start + 1:
                jax.block_until_ready(metrics)
                log.restart_clock(step)  # compilation does not count as training
            if step % cfg.log_every == 0 or last or step == 1:
                saved.poll()
                log.training(step, metrics)
            stopping = stop.is_set() or saved.preempted(step)
            score = None
            if step % cfg.eval_every == 0 or last:
                found = evaluate()
                score = found[task.best_metric]
                log.evaluation(step, found)
            if step % cfg.preview_every == 0 or last:
                draw(step)
            if step % cfg.checkpoint_every == 0 or last or stopping:
                save(step, score, at_once=last or stopping)
            if stopping:
                break
    saved.wait()
    saved.close()
    log.close()
    if stopping:
        raise Preempted(f"{task.name}: stopped at step {step}, saved; run the same command again to go on")


def _examples(source: Source, transform: ToPixels | None, count: int = 32) -> np.ndarray | None:
    """uint8 [count, H, W, 3]: some images, the same every time; None of a source of tokens."""
    if transform is None:
        return None
    return np.stack([transform(source[i])["image"] for i in range(min(count, source.num_records))])


@contextlib.contextmanager
def _last_checkpoint_named(saved: checkpoint.Checkpoints):
    """Adds to the news that training diverged what there is to go back to."""
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
