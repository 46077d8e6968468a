"""What experiments with transformers stand on: a trained tokenizer and its tokens, made once."""

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

ENCODED_AT_ONCE = 64  # images, by each device


def prepare(stage: ConfigDict, trains: ConfigDict | None, out: Path, crops: int = 1) -> None:
    """Gives a transformer's stage its tokenizer and its tokens; what is there is taken as it is.

    Args:
      stage: of a transformer; `tokenizer` and `data.tokens` are filled in where they are empty.
      trains: the stage that trains a tokenizer; None where there is none.
      out: where that tokenizer's run and the tokens will lie, in `tokenizer` and `tokens`.
      crops: of each training image.

    Raises:
      ConfigError: where there is neither a tokenizer nor a stage that trains one, or several processes
        would have to encode.
    """
    if not stage.tokenizer:
        if trains is None:
            raise ConfigError("config.tokenizer names none, and no stage of the config trains one")
        print("--- tokenizer", flush=True)
        stages.run(trains, out / "tokenizer")
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
        sources = tuple(open_source(data.name, split, data.dir) for split in splits)
    encode = BatchEncoder(tokenizer, params, ENCODED_AT_ONCE * jax.device_count())
    holds = make_cache_spec(tokenizer, params, sources, data, crops, stage.seed)
    write_cache(out / "tokens", holds, sources, encode, data.threads, shlex.join(["python", *sys.argv]))
    data.tokens = str((out / "tokens").absolute())
