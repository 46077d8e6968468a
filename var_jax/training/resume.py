"""Resuming a run: fields that may change, and work that a stopped run owes its last checkpoint."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from var_jax.errors import ConfigError
from var_jax.training.checkpoint import Checkpoints
from var_jax.training.hosts import from_primary
from var_jax.training.metrics import read_metrics

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
RESUMABLE_FIELDS = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "preview_every",
    "max_to_keep",
    "max_skipped",
)
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


def is_due(every: int, step: int, steps: int) -> bool:
    """True after every `every` steps and after the last one; never where `every` is 0."""
    return every > 0 and (step % every == 0 or step == steps)


@dataclasses.dataclass(frozen=True)
class OwedWork:
    """Work that was due at the checkpoint where a run was stopped.

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


def owed_work(
    saved: Checkpoints,
    directory: epath.Path,
    step: int,
    steps: int,
    cfg: ConfigDict,
    metric: str,
    draws: bool,
) -> OwedWork:
    """Find the work that is owed to the checkpoint to resume from, the same on all processes."""
    owed = np.array([0, np.nan, 0], np.float32)
    if step and jax.process_index() == 0:
        lines = [
            x for x in read_metrics(directory / "metrics.jsonl") if (x["step"], x["kind"]) == (step, "eval")
        ]
        if is_due(cfg.eval_every, step, steps) and saved.score(step) is None:
            owed[:2] = (0, lines[-1][metric]) if lines else (1, np.nan)
        if draws and is_due(cfg.preview_every, step, steps):
            owed[2] = not list((directory / "previews").glob(f"*_{step:07d}.png"))
    evaluation, score, pictures = from_primary(owed)
    return OwedWork(bool(evaluation), float(score), bool(pictures))
