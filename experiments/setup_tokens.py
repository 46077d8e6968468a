"""Preparation of transformer experiments: train the tokenizer and encode the data, once."""

import shlex
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from var_jax import stages
from var_jax.data.sources import open_source
from var_jax.data.token_writer import BatchEncoder, make_cache_spec, write_cache
from var_jax.errors import ConfigError, config_errors
from var_jax.interop.load import load_tokenizer
from var_jax.training.self_correction import needs_features

IMAGES_PER_DEVICE = 64  # encoded at once


def prepare_tokens(stage: ConfigDict, tokenizer_stage: ConfigDict | None, out: Path, crops: int = 1) -> None:
    """Train the tokenizer of a transformer's stage and encode its data, unless the stage names them.

    Args:
      stage: of a transformer; empty `tokenizer` and `data.tokens` are set.
      tokenizer_stage: stage that trains a tokenizer, or None.
      out: directory in which the tokenizer's run is written as `tokenizer`, and the tokens as `tokens`.
      crops: number of crops of each training image.

    Raises:
      ConfigError: if the stage has no tokenizer and `tokenizer_stage` is None, or if several processes would
        have to encode.
    """
    if not stage.tokenizer:
        if tokenizer_stage is None:
            raise ConfigError("config.tokenizer is empty, and no stage of the config trains a tokenizer")
        print("--- tokenizer", flush=True)
        stages.run(tokenizer_stage, out / "tokenizer")
        stage.tokenizer = str((out / "tokenizer").absolute())
    data = stage.data
    if data.tokens:
        return
    if jax.process_count() > 1:
        raise ConfigError(
            "config.data.tokens is empty: on several hosts, encode first with "
            "python -m var_jax.tools.encode_dataset"
        )
    print(f"--- tokens, {crops} crops of each image", flush=True)
    splits = (data.train_split, data.eval_split)
    with config_errors():
        tokenizer, params = load_tokenizer(stage.tokenizer, tuple(stage.scales) or None)
        condition = stage.model.get("condition", "label")
        sources = tuple(open_source(data.name, split, data.dir, condition) for split in splits)
    encode = BatchEncoder(tokenizer, params, IMAGES_PER_DEVICE * jax.device_count())
    options = dict(crops=crops, seed=stage.seed, features=needs_features(stage))
    description = make_cache_spec(tokenizer, params, sources, data, **options)
    write_cache(out / "tokens", description, sources, encode, data.threads, shlex.join(["python", *sys.argv]))
    data.tokens = str((out / "tokens").absolute())
