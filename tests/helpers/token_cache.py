"""Make token caches of the digits, and copies of them with other descriptions."""

import dataclasses
import shutil
from pathlib import Path

from var_jax.data import transforms
from var_jax.data.sources import Source, open_source
from var_jax.data.token_cache import CacheManifest, CacheSpec
from var_jax.data.token_writer import BatchEncoder, write_cache
from var_jax.interop.load import load_tokenizer
from var_jax.tokenizer.model import fingerprint

BATCH = 64
# Fields of the caches, as flags of the command.
CACHE_FLAGS = {"crops": 2, "resize": 1.125, "flip": True, "shift": 1, "seed": 3, "shard": 600}
COMMAND = "python -m var_jax.tools.encode_dataset --these --flags"


def sources(digits_dir: Path) -> tuple:
    return tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))


def describe(run: Path, **changes) -> CacheSpec:
    """Return the spec of a cache of the digits by the tokenizer of a run, with changed fields."""
    _, params = load_tokenizer(run)
    digits = {"data": "digits", "train_split": "train", "eval_split": "test"}
    digits |= {"train_images": 1442, "eval_images": 355, "class_names": tuple("0123456789")}
    tokens = {"tokenizer": fingerprint(params), "scales": (1, 2, 4), "num_codes": 16, "dtype": "float32"}
    return CacheSpec(**{**digits, **tokens, **CACHE_FLAGS, "transform": transforms.VERSION, **changes})


def make_cache(run: Path, digits_dir: Path, out: Path) -> Path:
    encode = BatchEncoder(*load_tokenizer(run), BATCH)
    write_cache(out, describe(run), sources(digits_dir), encode, 2, COMMAND)
    return out


def small(digits_dir: Path, tiny_tokenizer: tuple) -> tuple[CacheSpec, list[Source], BatchEncoder]:
    """Return the arguments of `write_cache` for 40 digits per split and an untrained tokenizer."""
    splits = sources(digits_dir)
    parts = [dataclasses.replace(split, records=[split.records[i] for i in range(40)]) for split in splits]
    tokenizer, params = tiny_tokenizer
    description = CacheSpec(
        data="digits",
        train_split="train",
        eval_split="test",
        train_images=40,
        eval_images=40,
        class_names=parts[0].class_names,
        tokenizer=fingerprint(params),
        scales=(1, 2, 4),
        num_codes=16,
        dtype="float32",
        transform=transforms.VERSION,
        **{**CACHE_FLAGS, "shard": 50},
    )
    return description, parts, BatchEncoder(tokenizer, params, 32)


def altered(cache: Path, out: Path, complete: bool = True, **changes) -> Path:
    """Copy a cache with a changed description."""
    shutil.copytree(cache, out)
    spec = dataclasses.replace(CacheManifest.read(cache).holds, **changes)
    CacheManifest(spec, COMMAND, complete).write(out)
    return out


def content(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a cache, and its spec (the command may differ)."""
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".json"}
    return files | {"holds": repr(CacheManifest.read(directory).holds).encode()}
