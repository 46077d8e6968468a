"""Renamed config fields: old names of the last release, for saved runs and for the command line."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from var_jax.errors import ConfigError

_TRAIN = {
    "keep": "max_to_keep",
    "clip": "grad_clip_norm",
    "accumulate": "grad_accum_steps",
    "ema": "ema_decay",
    "warmup": "warmup_fraction",
    "warmup_start": "lr_start_fraction",
    "end": "lr_end_fraction",
    "schedule": "lr_schedule",
    "learning_rate": "base_learning_rate",
}
# Section -> old name -> new name.
RENAMED = {
    "train": _TRAIN,
    "model": {"label_drop": "class_dropout_prob", "reach": "mask_radius", "gradient": "vq_gradient"},
    "codebook": {
        "ema": "ema_decay",
        "dead_below": "dead_threshold",
        "restart_until": "restart_until_fraction",
    },
    "adversarial": {"start": "start_fraction", "warmup": "warmup_fraction"},
}


def rename_fields(record: dict) -> dict:
    """Rename the old fields of a saved config, at any depth; of two names, the present one wins."""

    def rename(section: dict, names: dict[str, str]) -> dict:
        renamed = {}
        for name, value in section.items():
            if names.get(name) in section:
                continue
            if isinstance(value, dict):
                value = rename(value, RENAMED.get(name, {}))
            renamed[names.get(name, name)] = value
        return renamed

    return rename(record, {})


def check_names(stage: Mapping[str, Any], path: str = "config") -> None:
    """Raise ConfigError if a config sets a field by its old name, which nothing reads any more."""
    for name, value in stage.items():
        if isinstance(value, Mapping | ConfigDict):
            for old in RENAMED.get(name, {}).keys() & value.keys():
                raise ConfigError(f"{path}.{name}.{old} is now called {path}.{name}.{RENAMED[name][old]}")
            check_names(value, f"{path}.{name}")


def rename_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Rename old config fields in flags like `--config.train.learning_rate=1e-4`.

    Returns:
      The arguments, and a notice for each that was renamed.
    """
    renamed, notices = [], []
    for argument in arguments:
        path, equals, value = argument.partition("=")
        parts = path.split(".")
        if parts[0] in ("--config", "-config") and len(parts) > 2:
            new = RENAMED.get(parts[-2], {}).get(parts[-1])
            if new is not None:
                present = ".".join([*parts[:-1], new])
                notices.append(
                    f"{path} is now called {present}; the old name will be removed in the next release"
                )
                path = present
        renamed.append(path + equals + value)
    return renamed, notices
