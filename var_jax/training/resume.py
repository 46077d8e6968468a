"""Resuming a run: check that its config is compatible, and find unfinished work at its last checkpoint."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from var_jax.errors import ConfigError
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.hosts import from_primary
from var_jax.training.metrics import read_metrics

# Fields of any section that may differ between the run that wrote a checkpoint and the resumed one.
RESUMABLE_FIELDS = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "preview_every",
    "fid_every",
    "fid_samples",
    "fid_inception",
    "fid_reference",
    "best_by",
    "max_to_keep",
    "max_skipped",
    "writers",
)
MAX_SHOWN = 200  # characters of a value in a message
WEIGHTS = ("stage.perceptual_weights", "stage.adversarial.dino_weights")
# Paths (the content is compared instead: token caches by their spec, networks by fingerprint), settings that
# change no numbers of the training, and the names of classes.
IGNORED_FIELDS = (
    *WEIGHTS,
    "class_names",
    "stage.tokenizer",
    "stage.init_from",  # not read if there is a checkpoint
    "stage.train.mesh",
    "stage.train.remat",
    "stage.train.dtype",  # the dtype that it resolves to is compared
    "stage.transformer.attention",
    "stage.transformer.remat",
    "stage.transformer.scan_layers",
    "stage.sampling",
    "stage.data.dir",
    "stage.data.tokens",
    "stage.data.threads",
    "stage.data.workers",
)


def check_resume_compatible(saved: dict, now: dict, directory: Path, defaults: dict | None = None) -> str:
    """Check that a checkpoint has the same config, model, tokenizer and frozen networks as this run.

    Args:
      saved: record of the checkpoint.
      now: record of this run.
      directory: directory of the stage, for the message.
      defaults: default values of the model's fields, for fields that the saved record lacks.

    Returns:
      A notice if this version decodes images differently, or `dtype=auto` resolves to another dtype on this
      platform; else "".

    Raises:
      ConfigError: if any other field differs; names each.
    """
    unrecorded = {"dtype", "weights"} - saved.keys()  # by an older version
    saved = _flatten(saved)
    now = _flatten({name: value for name, value in now.items() if name not in unrecorded})
    for name, value in _flatten(defaults or {}).items():
        for field in {f"model.{name}", f"stage.model.{name}"} & now.keys():
            saved.setdefault(field, value)
    older = {"stage.transformer.encoder_precision": "high", "stage.correction.source": "uniform"}
    for name in older.keys() & now.keys():  # an older record may lack these
        saved.setdefault(name, older[name])
    notice = ""
    if saved.pop("transform", 0) != now.pop("transform", 0):
        notice = (
            "this version decodes or crops some images (transparent, rotated, 16-bit or not square) "
            "differently from the version that started the run"
        )
    same_setting = saved.get("stage.train.dtype") == now.get("stage.train.dtype")
    if "dtype" in now and saved["dtype"] != now["dtype"] and same_setting:
        notice += "\n  " * bool(notice) + (
            f"the run began with matrix products in {saved['dtype']}; train.dtype=auto is {now['dtype']} "
            f"on this platform (--config.train.dtype={saved['dtype']} keeps it)"
        )
        now["dtype"] = saved["dtype"]
    for record in (saved, now):  # for an older record, compare the config instead
        if "dtype" in unrecorded:
            record["config.train.dtype"] = record.get("stage.train.dtype")
        if "weights" in unrecorded:
            for field in WEIGHTS:
                record[f"{field.replace('stage.', 'config.')} is given"] = bool(record.get(field))
    different = [
        f"{field.replace('stage.', 'config.')}: "
        f"{_short(saved.get(field))} there, {_short(now.get(field))} now"
        for field in sorted(set(saved) | set(now))
        if (saved.get(field) or None) != (now.get(field) or None)  # a missing field counts as off
        and field.rsplit(".", 1)[-1] not in RESUMABLE_FIELDS
        and not field.startswith(IGNORED_FIELDS)
    ]
    if different:
        raise ConfigError(
            f"the run under {directory} was started with another config; use another --workdir, or change "
            "back\n  " + "\n  ".join(different)
        )
    return notice


def _flatten(record: dict) -> dict:
    """Flatten a record to dotted names; tuples become lists, as JSON has them."""
    flat = flatten_dict(record, sep=".")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def _short(value) -> str:
    """Return the `repr` of a value, cut if it is long, as that of a vocabulary."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_due(every: int, step: int, steps: int) -> bool:
    """Return whether work is due: every `every` steps and after the last, or never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == steps)


@dataclasses.dataclass(frozen=True)
class UnfinishedWork:
    """Work that was due at the last checkpoint of a stopped run, and not finished.

    Attributes:
      evaluation: whether to evaluate on the held-out data.
      samples: whether to score samples.
      score: score that was logged but not saved with the checkpoint; NaN without one.
      pictures: whether to draw previews.
    """

    evaluation: bool = False
    samples: bool = False
    score: float = np.nan
    pictures: bool = False

    @property
    def any(self) -> bool:
        """Return whether there is any work."""
        return self.evaluation or self.samples or self.pictures or bool(np.isfinite(self.score))


def score_kind(best_metric: str) -> str:
    """Return the kind of the log lines that have the metric by which the best checkpoint is selected."""
    return "samples" if best_metric == "fid" else "eval"


def unfinished_work(
    checkpoints: Checkpoints,
    directory: epath.Path,
    step: int,
    steps: int,
    cfg: ConfigDict,
    fid_every: int,
    best_metric: str,
    has_previews: bool,
) -> UnfinishedWork:
    """Find the unfinished work at the checkpoint to resume from; the same result on all processes.

    Args:
      checkpoints: checkpoints of the stage.
      directory: directory of the stage.
      step: step of the checkpoint.
      steps: total number of steps.
      cfg: section `train` of the stage.
      fid_every: steps between scores of samples; 0 for none.
      best_metric: metric that scores a checkpoint.
      has_previews: whether the task draws previews.
    """
    unfinished = np.array([0, 0, np.nan, 0], np.float32)
    if step and jax.process_index() == 0:
        lines = [line for line in read_metrics(directory / "metrics.jsonl") if line["step"] == step]
        logged = {line["kind"]: line for line in lines}
        for i, (kind, every) in enumerate((("eval", cfg.eval_every), ("samples", fid_every))):
            unfinished[i] = is_due(every, step, steps) and kind not in logged
        if checkpoints.score(step) is None:
            unfinished[2] = logged.get(score_kind(best_metric), {}).get(best_metric, np.nan)
        if has_previews and is_due(cfg.preview_every, step, steps):
            unfinished[3] = not list((directory / "previews").glob(f"*_{step:07d}.png"))
    evaluation, samples, score, pictures = from_primary(unfinished)
    return UnfinishedWork(bool(evaluation), bool(samples), float(score), bool(pictures))
