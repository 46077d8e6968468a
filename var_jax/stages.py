"""Train the stages of a config: open the data, build each task, run the training loop."""

import flax.linen as nn
import jax
from etils import epath
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from var_jax.data.sources import Source, open_source
from var_jax.data.token_cache import PairedTokenSource, open_token_cache
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError, config_errors
from var_jax.evaluation.extractors import check_classifier_size
from var_jax.evaluation.inception import POOL_SIZE
from var_jax.evaluation.scores import read_statistics
from var_jax.interop.dino_weights import load_dino
from var_jax.interop.inception_weights import load_inception
from var_jax.interop.load import load_tokenizer, read_network, with_path
from var_jax.interop.lpips_weights import load_perceptual
from var_jax.paths import as_path
from var_jax.sharding import make_mesh
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.align_task import AlignTask
from var_jax.training.checkpoint import (
    CHECKPOINT_DIR,
    CheckpointMissing,
    check_storage,
    has_checkpoint,
    load_config,
    unfinished_notice,
)
from var_jax.training.config_fields import check_names
from var_jax.training.param_init import InitialValue, match_params
from var_jax.training.preview import example_conditions
from var_jax.training.profiling import StepRange
from var_jax.training.sample_scores import SampleScorer
from var_jax.training.self_correction import needs_features
from var_jax.training.task import Task
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.trainer import check_training, train
from var_jax.training.transformer_task import NextScaleTask, NextTokenTask, TransformerTask

# Tasks of transformers by `config.task`. An alignment results in a run of next_scale, which all tools read.
TRANSFORMERS = {"next_scale": NextScaleTask, "next_token": NextTokenTask, "align": AlignTask}
SAMPLES_COMMAND = "python -m var_jax.tools.sample_tokens --workdir=RUN"


def stages_of(config: ConfigDict) -> list[ConfigDict]:
    """Return the stage configs in training order: those named in `stages`, or else the config itself.

    Raises:
      ConfigError: if `stages` is empty or names a stage that the config does not have.
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
    """Return the number of optimizer steps: `steps` if set, else that of `epochs` passes over the data.

    Raises:
      ConfigError: if that is less than one step.
    """
    steps = train_config.steps or train_config.epochs * num_images // train_config.batch
    if steps < 1:
        raise ConfigError(
            f"train.steps={train_config.steps} and train.epochs={train_config.epochs} make no step: "
            f"set one of them so that there is at least one batch of {train_config.batch} images"
        )
    return steps


def open_sources(stage: ConfigDict) -> tuple[Source, Source]:
    """Open the training and held-out data of a stage: images, or a token cache (config.data.tokens).

    Raises:
      DataSetMissing: if the data set or cache is missing or incomplete; the message says how to prepare it.
      ConfigError: if there are fewer images than one batch, or a tokenizer stage is given tokens.
    """
    data, condition = stage.data, stage.model.get("condition", "label")  # a tokenizer has none
    if not data.tokens:
        with config_errors(prefix="config.data: "):
            train, held_out = (
                open_source(data.name, split, data.dir, condition)
                for split in (data.train_split, data.eval_split)
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
        train, held_out = open_token_cache(data.tokens, features=needs_features(stage), condition=condition)
    if stage.task == "align" and stage.align.method == "ddo":
        with config_errors(prefix="config.align.samples: "):
            samples, _ = open_token_cache(
                stage.align.samples,
                field="config.align.samples",
                command=SAMPLES_COMMAND,
                condition=condition,
            )
        train = PairedTokenSource(**vars(train), samples=samples)
    return train, held_out


def build_task(
    stage: ConfigDict, workdir: epath.Path, source: Source, pending_tokenizer: Tokenizer | None = None
) -> tuple[Task, int]:
    """Build the task of a stage and return it with its number of steps.

    Args:
      stage: config of the stage.
      workdir: directory of the run.
      source: training data.
      pending_tokenizer: untrained tokenizer of an earlier stage, used to check a transformer stage before
        that tokenizer is trained.

    Raises:
      ConfigError: if the task or model does not exist, or a token cache is of another tokenizer.
      CheckpointMissing: if a transformer stage has no tokenizer; the message says how to get one.
    """
    steps = num_steps(stage.train, source.num_images)
    if stage.task == "tokenizer":
        return TokenizerTask(stage, steps, load_perceptual_networks(stage)), steps
    if stage.task not in TRANSFORMERS:
        known = ", ".join(("tokenizer", *TRANSFORMERS))
        raise ConfigError(f"config.task must be one of {known}; got {stage.task!r}")
    task_class = TRANSFORMERS[stage.task]
    if task_class is AlignTask and not stage.init_from:
        raise ConfigError(
            "config.init_from is empty: an alignment fine-tunes a trained transformer; give the directory of "
            "a run, an exported model or a published file (--config.init_from=runs/digits)"
        )
    mesh = make_mesh(**stage.train.mesh)
    data = (source.num_classes, mesh, source.condition_fields(), example_conditions(source))
    if pending_tokenizer is not None and not stage.tokenizer:
        if stage.data.tokens:
            raise ConfigError(
                f"config.data.tokens={stage.data.tokens!r} needs a trained tokenizer, but that stage "
                f"comes first here: once it is done, run {stage.task} alone with --config.stages={stage.task}"
            )
        return task_class(stage, steps, pending_tokenizer, {}, *data), steps
    path = stage.tokenizer or workdir
    with config_errors(prefix="config.tokenizer: "):
        try:
            tokenizer, params = load_tokenizer(path, tuple(stage.scales) or None, dtype=stage.train.dtype)
        except FileNotFoundError as error:
            raise CheckpointMissing(
                f"no tokenizer at {path} (config.tokenizer): {error}\n"
                "  Give a published file (--config.tokenizer=vae_ch160v4096z32.pth) or the directory of a\n"
                "  run, or train a tokenizer first:\n"
                f"  python train.py --config=configs/tokenizer.py --workdir={workdir}\n"
                "  To try everything without any of these: python train.py --config=configs/digits.py"
            ) from error
    if notice := unfinished_notice(path, "tokenizer"):
        print(f"{stage.task}: {notice}", flush=True)
    task = task_class(stage, steps, tokenizer, params, *data)
    if isinstance(task, AlignTask):
        task.frozen["reference"] = reference_params(stage, task)
    if stage.data.tokens:
        caches = [source.description]
        if isinstance(source, PairedTokenSource):
            caches.append(source.samples.description)
        with config_errors():
            source.description.check_data(stage.data)
            for cache in caches:
                cache.check_tokenizer(task.fingerprint, task.config.scales, task.config.num_codes)
        if notice := source.description.dtype_notice():
            print(f"{task.name}: {notice}", flush=True)
    return task, steps


def load_perceptual_networks(stage: ConfigDict) -> dict:
    """Load the frozen networks of a tokenizer's losses: VGG-16 (`vgg`) and DINO (`dino`), as far as used.

    Without config.perceptual_weights, print that there is no perceptual loss.

    Raises:
      ConfigError: if the discriminator uses DINO and no file is given, or a file is missing or does not fit.
    """
    networks = {}
    if stage.loss.get("perceptual"):
        if stage.perceptual_weights:
            with config_errors(prefix="config.perceptual_weights: "):
                networks["vgg"] = load_perceptual(stage.perceptual_weights.split(","))
        else:
            print("tokenizer: no perceptual loss, since config.perceptual_weights names no file", flush=True)
    if stage.adversarial.weight and stage.adversarial.network == "dino":
        if not stage.adversarial.dino_weights:
            raise ConfigError("config.adversarial.network=dino needs a file: config.adversarial.dino_weights")
        with config_errors(prefix="config.adversarial.dino_weights: "):
            networks["dino"] = load_dino(stage.adversarial.dino_weights)
    return networks


def sample_scorer(stage: ConfigDict, source: Source, image_size: int) -> SampleScorer | None:
    """Return what scores a transformer's samples every config.train.fid_every steps; None without scores.

    Args:
      stage: config of the stage.
      source: training data.
      image_size: side of the samples.

    Raises:
      ConfigError: if a file is missing or does not fit, or there are no images, or too large ones.
    """
    cfg, data = stage.train, stage.data
    if not cfg.get("fid_every"):
        return None
    if data.tokens and not cfg.fid_reference:
        raise ConfigError(
            "config.train.fid_every with config.data.tokens needs reference images: "
            "config.train.fid_reference, a file of `evaluate.py statistics`"
        )
    if cfg.fid_reference and not cfg.fid_inception:
        raise ConfigError("config.train.fid_reference needs config.train.fid_inception")
    inception = statistics = transform = None
    if cfg.fid_inception:
        with config_errors(prefix="config.train.fid_inception: "):
            inception = load_inception(cfg.fid_inception)
    else:
        with config_errors(prefix="config.train.fid_every: "):
            check_classifier_size(source.num_records, image_size)
    if cfg.fid_reference:
        with config_errors(prefix="config.train.fid_reference: "):
            statistics = read_statistics(cfg.fid_reference, POOL_SIZE)
    else:
        with config_errors(prefix="config."):
            transform = ToPixels(source.name, image_size, data.resize, False)
    return SampleScorer(inception=inception, statistics=statistics, source=source, transform=transform)


def initial_params(stage: ConfigDict, task: Task, workdir: epath.Path) -> dict[str, InitialValue]:
    """Load the initial parameters of a stage from `init_from`, by path; none if it resumes from a checkpoint.

    Raises:
      CheckpointMissing: if there is no such network at `init_from`.
      ConfigError: if its architecture differs; the message names the fields to change.
    """
    path = stage.get("init_from")
    if not path or has_checkpoint(workdir / task.name / CHECKPOINT_DIR):
        return {}
    initial, notes = _read_initial(path, task)
    notes += _other_tokenizer(path, task)
    print("\n  ".join([f"{task.name}: starts from {path}", *notes]), flush=True)
    return initial


def reference_params(stage: ConfigDict, task: AlignTask) -> dict:
    """Load the frozen reference of an alignment from `init_from`: all parameters, float32 on the host.

    Raises:
      CheckpointMissing: if there is no such network at `init_from`.
      ConfigError: if its architecture differs, or it has other classes, scales or codes.
    """
    initial, notes = _read_initial(stage.init_from, task)
    if notes:
        raise ConfigError(
            f"config.init_from: {stage.init_from} must be a transformer of the classes and tokens of this "
            "run, since an alignment compares with it\n  " + "\n  ".join(notes)
        )
    return unflatten_dict({path: leaf.values for path, leaf in initial.items()}, sep="/")


def _read_initial(path: str, task: Task) -> tuple[dict[str, InitialValue], list[str]]:
    """Read a network and match it to that of a task: `match_params`, with errors that name `init_from`."""
    shapes = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    with config_errors(prefix="config.init_from: "):
        try:
            config, params = read_network(path, task.name)
        except FileNotFoundError as error:
            raise CheckpointMissing(f"no {task.name} at config.init_from={path}: {error}") from error
        return with_path(as_path(path), match_params, params, config, shapes, task.config)


def _other_tokenizer(path: str, task: Task) -> list[str]:
    """Return a warning if a transformer was trained on another tokenizer, as recorded by its run; else []."""
    if not isinstance(task, TransformerTask) or as_path(path).is_file():
        return []
    trained_on = load_config(as_path(path) / task.name / CHECKPOINT_DIR)[1].get("tokenizer", "")
    if trained_on in ("", task.fingerprint):  # "": converted from a file, which does not name its tokenizer
        return []
    return [
        f"it was trained on another tokenizer ({trained_on}) than that of this run "
        f"({task.fingerprint or 'not trained yet'}): unless one was fine-tuned from the other, their codes "
        "differ, and training from scratch may work better"
    ]


def run(config: ConfigDict, workdir: epath.PathLike, profile: StepRange | None = None) -> None:
    """Train every stage of a config under `workdir`, resuming from checkpoints and skipping finished stages.

    Args:
      config: of one stage or of several; not modified.
      workdir: directory of the run, local or a URL.
      profile: steps of every stage to trace.

    Raises:
      UserError: if any stage cannot be trained, before the first one starts; and see `train`.
    """
    with config_errors():
        workdir = check_storage(workdir, "--workdir")
    config = config.copy_and_resolve_references()  # below, paths are made absolute in this copy
    ready = []
    pending_tokenizer = None
    for stage in stages_of(config):  # check all stages before the first one trains
        check_names(stage)
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
        scorer = sample_scorer(stage, sources[0], task.image_size)
        ready.append((task, stage, steps, sources, initial_params(stage, task, workdir), scorer))
    for task, stage, steps, sources, initial, scorer in ready:
        if isinstance(task, TransformerTask) and not task.frozen["tokenizer"]:  # trained by now
            task, _ = build_task(stage, workdir, sources[0])
        train(task, stage, steps, workdir, sources, initial, profile, scorer)
