"""Read what a run left in its directory: configs, starts, metrics, checkpoints and pictures of each stage."""

import dataclasses
import json
import re

from etils import epath

from var_jax.errors import ConfigError, config_errors
from var_jax.training.checkpoint import CHECKPOINT_DIR, load_config
from var_jax.training.checkpoint_integrity import steps_under
from var_jax.training.config_fields import rename_fields
from var_jax.training.metrics import read_metrics
from var_jax.training.trainer import STARTS_FILE

_PREVIEW = re.compile(r"(.+)_(\d{7,})\.png")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What is known of a stage; runs of older versions lack some of it.

    Attributes:
      name: its name.
      record: content of config.json, or of the newest checkpoint's config.
      starts: lines of starts.jsonl.
      lines: lines of metrics.jsonl.
      checkpoints: their steps.
      previews: files by name and step.
    """

    name: str
    record: dict
    starts: list[dict]
    lines: list[dict]
    checkpoints: list[int]
    previews: dict[str, dict[int, epath.Path]]

    def points(self, kind: str, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric."""
        return [
            (line["step"], line[name])
            for line in self.lines
            if line["kind"] == kind and isinstance(line.get(name), int | float)
        ]

    def metric_names(self, *kinds: str) -> list[str]:
        """Return the metrics of some kinds of lines, in the order in which they were logged."""
        names = {name: None for line in self.lines if line["kind"] in kinds for name in line}
        return [name for name in names if name not in ("step", "kind", "records")]


def read_run(workdir: epath.Path) -> list[StageRecord]:
    """Read all stages of a run, the tokenizer first.

    Raises:
      ConfigError: if there is no run, or a file of it is damaged; names it.
    """
    is_directory = workdir.exists() and workdir.is_dir()
    folders = [path for path in workdir.iterdir() if path.is_dir()] if is_directory else []
    stages = [read_stage(folder) for folder in folders if is_stage(folder)]
    if not stages:
        raise ConfigError(f"{workdir} has no run: no STAGE/metrics.jsonl, config.json or checkpoints in it")
    return sorted(stages, key=lambda stage: (stage.name != "tokenizer", stage.name))


def is_stage(folder: epath.Path) -> bool:
    """Return whether a directory is that of a stage."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "config.json", CHECKPOINT_DIR))


def read_stage(folder: epath.Path) -> StageRecord:
    """Read the directory of a stage; errors as for `read_run`."""
    checkpoints = steps_under(folder / CHECKPOINT_DIR)
    if (folder / "config.json").exists() or not checkpoints:
        record = read_json(folder / "config.json")
    else:
        record = load_config(folder / CHECKPOINT_DIR)[1]
    with config_errors():
        starts, lines = (read_metrics(folder / name) for name in (STARTS_FILE, "metrics.jsonl"))
    previews: dict[str, dict[int, epath.Path]] = {}
    paths = (folder / "previews").iterdir() if (folder / "previews").exists() else ()
    for path in paths:
        if match := _PREVIEW.fullmatch(path.name):
            previews.setdefault(match[1], {})[int(match[2])] = path
    return StageRecord(
        name=folder.name,
        record=rename_fields(record),
        starts=[start for start in starts if isinstance(start, dict)],
        lines=[x for x in lines if isinstance(x, dict) and isinstance(x.get("step"), int) and "kind" in x],
        checkpoints=checkpoints,
        previews=previews,
    )


def read_json(path: epath.Path) -> dict:
    """Read a JSON file with an object; {} if there is none.

    Raises:
      ConfigError: if it is damaged.
    """
    if not path.exists():
        return {}
    with config_errors(prefix=f"{path}: "):
        content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must have a JSON object, got {str(content)[:80]}")
    return content
