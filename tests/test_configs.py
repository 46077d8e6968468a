"""Every config has exactly the fields of the schema: a misspelled field fails."""

import importlib

import pytest
from ml_collections import ConfigDict

from configs import schema

BASES = {
    "tokenizer": schema.tokenizer_stage,
    "next_scale": schema.transformer_stage,
    "next_token": schema.next_token_stage,
    "align": schema.align_stage,
}
CONFIGS = {
    "digits": [],
    "shapes": ["", "small"],
    "tokenizer": ["published", "small", "single", "residual", "patches"],
}
CONFIGS |= {"var": ["d12", "d16", "d20", "d24", "d30", "d36"], "next_token": ["d12", "d30", "digits"]}
CONFIGS |= {"align": ["d16", "d30", "digits"]}


def fields(section: ConfigDict, prefix: str = "") -> set[str]:
    names = set()
    for name, value in section.items():
        names |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name}
    return names


@pytest.mark.parametrize(("name", "variant"), [(n, v) for n, vs in CONFIGS.items() for v in vs or [None]])
def test_a_config_has_the_fields_of_the_schema(name, variant):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config() if variant is None else module.get_config(variant)
    for stage in [config[name] for name in config.stages] if "stages" in config else [config]:
        assert fields(stage) == fields(BASES[stage.task]())
