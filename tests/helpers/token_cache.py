"""Token caches of the digits, made in this process, and copies of them with another description."""

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
# As flags of the command.
HOW = {"crops": 2, "resize": 1.125, "flip": True, "shift": 1, "seed": 3, "shard": 600}
COMMAND = "python -m var_jax.tools.encode_dataset --these --flags"


def sources(digits_dir: Path) -> tuple:
    return tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))


def describe(run: Path, **changes) -> CacheSpec:
    """Of two crops of the digits by the tokenizer of a run, or of what is changed about them."""
    _, params = load_tokenizer(run)
    digits = {"data": "digits", "train_split": "train", "eval_split": "test"}
    digits |= {"train_images": 1442, "eval_images": 355, "class_names": tuple("0123456789")}
    of = {"tokenizer": fingerprint(params), "scales": (1, 2, 4), "num_codes": 16, "dtype": "float32"}
    return CacheSpec(**{**digits, **of, **HOW, "transform": transforms.VERSION, **changes})


def make_cache(run: Path, digits_dir: Path, out: Path) -> Path:
    encode = BatchEncoder(*load_tokenizer(run), BATCH)
    write_cache(out, describe(run), sources(digits_dir), encode, 2, COMMAND)
    return out


def small(digits_dir: Path, tiny_tokenizer: tuple) -> tuple[CacheSpec, list[Source], BatchEncoder]:
    """Of 40 digits a split, by a tokenizer that was not trained: what `write_cache` takes."""
    whole = sources(digits_dir)
    parts = [dataclasses.replace(part, records=[part.records[i] for i in range(40)]) for part in whole]
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
        **{**HOW, "shard": 50},
    )
    return description, parts, BatchEncoder(tokenizer, params, 32)


def altered(cache: Path, out: Path, complete: bool = True, **changes) -> Path:
    """A copy of a cache whose description says something else."""
    shutil.copytree(cache, out)
    CacheManifest(dataclasses.replace(CacheManifest.read(cache).holds, **changes), COMMAND, complete).write(
        out
    )
    return out


def content(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the command in the description."""
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".json"}
    return files | {"holds": repr(CacheManifest.read(directory).holds).encode()}
