"""From a config to trained stages: opens the data, builds the task, runs the loop."""

import flax.linen as nn
import jax
from etils import epath
from ml_collections import ConfigDict

from var_jax.data.sources import Source, open_source
from var_jax.data.token_cache import open_token_cache
from var_jax.errors import ConfigError, config_errors
from var_jax.interop.dino_weights import load_dino
from var_jax.interop.load import load_tokenizer, read_network, with_path
from var_jax.interop.lpips_weights import load_perceptual
from var_jax.paths import as_path
from var_jax.sharding import make_mesh
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.checkpoint import (
    CHECKPOINT_DIR,
    CheckpointMissing,
    check_storage,
    has_checkpoint,
    load_config,
)
from var_jax.training.param_init import InitialValue, match_params
from var_jax.training.profiling import StepRange
from var_jax.training.task import Task
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.trainer import check_training, train
from var_jax.training.transformer_task import TRANSFORMERS, TransformerTask


def stages_of(config: ConfigDict) -> list[ConfigDict]:
    """The stages of a config, in order: itself (it has a `task`), or those that `stages` names.

    Raises:
      ConfigError: on a stage that the config does not have.
    """
    if "stages" not in config:
        return [config]
    names = config.stages
    if isinstance(names, str):  # --config.stages=tokenizer
        names = (names,)
    known = [name for name, value in config.items() if isinstance(value, ConfigDict)]
    if not names or set(names) - set(known):
        raise ConfigError(f"config.stages must name some of {known}, got {tuple(names)}")
    return [config[name] for name in names]


def num_steps(train_config: ConfigDict, num_images: int) -> int:
    """Optimiser steps of a run: `steps`, or else as many as the epochs take."""
    steps = train_config.steps or train_config.epochs * num_images // train_config.batch
    if steps < 1:
        raise ConfigError(
            f"train.steps={train_config.steps} and train.epochs={train_config.epochs} make no step"
        )
    return steps


def open_sources(stage: ConfigDict) -> tuple[Source, Source]:
    """Training and held-out data of a stage: images, or the tokens of a cache (config.data.tokens).

    Raises:
      DataSetMissing: where they are not there, or a cache is not complete; says how to prepare them.
      ConfigError: on tokens for a tokenizer, which is trained on images.
    """
    data = stage.data
    if not data.tokens:
        with config_errors(prefix="config.data: "):
            train, held_out = (
                open_source(data.name, split, data.dir) for split in (data.train_split, data.eval_split)
            )
        if len(train) < stage.train.batch:
            raise ConfigError(
                f"data set {train.name} has {len(train)} images, fewer than one batch of {stage.train.batch}"
            )
        return train, held_out
    if stage.task == "tokenizer":
        raise ConfigError(
            f"config.data.tokens={data.tokens!r}: the stage tokenizer is trained on images; leave it empty"
        )
    with config_errors(prefix="config.data.tokens: "):
        return open_token_cache(data.tokens)


def build_task(
    stage: ConfigDict, workdir: epath.Path, source: Source, pending_tokenizer: Tokenizer | None = None
) -> tuple[Task, int]:
    """The task of a stage and its number of steps.

    Args:
      stage: its config.
      workdir: of the run.
      source: training data.
      pending_tokenizer: of an earlier stage, not trained yet, to check a later stage against.

    Raises:
      ConfigError: on a task or a model that does not exist, or tokens of another tokenizer.
      CheckpointMissing: where a transformer has no tokenizer to stand on; says how to get one.
    """
    steps = num_steps(stage.train, source.num_images)
    if stage.task == "tokenizer":
        return TokenizerTask(stage, steps, load_perceptual_networks(stage)), steps
    if stage.task not in TRANSFORMERS:
        known = ", ".join(("tokenizer", *TRANSFORMERS))
        raise ConfigError(f"config.task must be one of {known}; got {stage.task!r}")
    make = TRANSFORMERS[stage.task]
    mesh = make_mesh(**stage.train.mesh)
    if pending_tokenizer is not None and not stage.tokenizer:
        if stage.data.tokens:
            raise ConfigError(
                f"config.data.tokens={stage.data.tokens!r} needs a trained tokenizer, but that stage "
                f"comes first here: once it is done, run {stage.task} alone, by --config.stages={stage.task}"
            )
        return make(stage, steps, pending_tokenizer, {}, source.num_classes, mesh), steps
    path = stage.tokenizer or workdir
    with config_errors(prefix="config.tokenizer: "):
        try:
            tokenizer, params = load_tokenizer(path, tuple(stage.scales) or None, dtype=stage.train.dtype)
        except FileNotFoundError as error:
            raise CheckpointMissing(
                f"no tokenizer at {path} (config.tokenizer): {error}\n"
                "  Give a published file (--config.tokenizer=vae_ch160v4096z32.pth) or the directory of a\n"
                "  run, or train one first:\n"
                f"  python train.py --config=configs/tokenizer.py --workdir={workdir}\n"
                "  To see everything work without any of that: python train.py --config=configs/digits.py"
            ) from error
    task = make(stage, steps, tokenizer, params, source.num_classes, mesh)
    if stage.data.tokens:
        with config_errors():
            source.description.check_data(stage.data)
            source.description.check_tokenizer(task.fingerprint, task.config.scales, task.config.num_codes)
        if notice := source.description.dtype_notice():
            print(f"{task.name}: {notice}", flush=True)
    return task, steps


def load_perceptual_networks(stage: ConfigDict) -> dict:
    """Parameters of the frozen networks that a tokenizer's losses need; a notice where a file is not given.

    Raises:
      ConfigError: where the discriminator stands on DINO and no file is given, or a file is missing or does
        not fit.
    """
    result = {}
    if stage.loss.get("perceptual"):
        if stage.perceptual_weights:
            with config_errors(prefix="config.perceptual_weights: "):
                result["vgg"] = load_perceptual(stage.perceptual_weights.split(","))
        else:
            print("tokenizer: no perceptual loss, since config.perceptual_weights names no file", flush=True)
    if stage.adversarial.weight and stage.adversarial.network == "dino":
        if not stage.adversarial.dino_weights:
            raise ConfigError("config.adversarial.network=dino needs a file: config.adversarial.dino_weights")
        with config_errors(prefix="config.adversarial.dino_weights: "):
            result["dino"] = load_dino(stage.adversarial.dino_weights)
    return result


def given_params(stage: ConfigDict, task: Task, workdir: epath.Path) -> dict[str, InitialValue]:
    """Parameters by path that a stage starts from (`init_from`); none where it goes on from a checkpoint.

    Raises:
      CheckpointMissing: where there is nothing at `init_from`.
      ConfigError: where it is another network; names what to change.
    """
    path = stage.get("init_from")
    if not path or has_checkpoint(workdir / task.name / CHECKPOINT_DIR):
        return {}
    shapes = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    with config_errors(prefix="config.init_from: "):
        try:
            config, params = read_network(path, task.name)
        except FileNotFoundError as error:
            raise CheckpointMissing(f"no {task.name} at config.init_from={path}: {error}") from error
        given, notes = with_path(as_path(path), match_params, params, config, shapes, task.config)
    notes += _other_tokenizer(path, task)
    print("\n  ".join([f"{task.name}: starts from {path}", *notes]), flush=True)
    return given


def _other_tokenizer(path: str, task: Task) -> list[str]:
    """A warning where a transformer learned the codes of another tokenizer, as far as its run tells."""
    if not isinstance(task, TransformerTask) or as_path(path).is_file():
        return []
    learned = load_config(as_path(path) / task.name / CHECKPOINT_DIR)[1].get("tokenizer", "")
    if learned in ("", task.fingerprint):  # "": it was converted from a file, without its tokenizer
        return []
    return [
        f"it was trained on another tokenizer ({learned}) than that of this run "
        f"({task.fingerprint or 'not trained yet'}): unless one is the other trained further, its codes mean "
        "nothing here, and a start from nothing may be better"
    ]


def run(config: ConfigDict, workdir: epath.PathLike, profile: StepRange | None = None) -> None:
    """Trains every stage of a config under `workdir`; what is done already is not done again.

    `profile` names steps of every stage to trace.

    Raises:
      UserError: where a stage cannot be trained, before the first one starts; and see `train`.
    """
    with config_errors():
        workdir = check_storage(workdir, "--workdir")
    ready, pending_tokenizer = [], None
    config = config.copy_and_resolve_references()  # paths become absolute in the run's own copy
    for stage in stages_of(config):  # whatever can be wrong with any stage, before the first one starts
        for field in ("tokenizer", "init_from"):
            if stage.get(field):
                with config_errors(prefix=f"config.{field}: "):
                    stage[field] = str(as_path(stage[field]))
        sources = open_sources(stage)
        check_training(stage.train)
        task, steps = build_task(stage, workdir, sources[0], pending_tokenizer)
        if profile:
            profile.check(task.name, steps)
        pending_tokenizer = task.model if stage.task == "tokenizer" else None
        ready.append((task, stage, steps, sources, given_params(stage, task, workdir)))
    for task, stage, steps, sources, given in ready:
        if isinstance(task, TransformerTask) and not task.frozen["tokenizer"]:  # trained by now
            task, _ = build_task(stage, workdir, sources[0])
        train(task, stage, steps, workdir, sources, given, profile)
