"""Exported models: a folder with `config.json` and `model.safetensors`, small enough to share.

`python -m var_jax.tools.export` writes one from a run.  The models that come with the package have this form.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from var_jax.interop.tensor_files import read_tensors, write_safetensors
from var_jax.paths import write_atomic
from var_jax.sampling.cast_params import in_compute_dtype
from var_jax.sampling.options import SamplingOptions
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig, TransformerConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT = 1  # of config.json
CONFIGS = {"tokenizer": TokenizerConfig, "next_scale": NextScaleConfig, "next_token": NextTokenConfig}
TRANSFORMERS = ("next_scale", "next_token")
MAX_CONFIG_BYTES = 1 << 24  # most of them are words of captions
MAX_BLOCKS = 1 << 10  # residual blocks of a tokenizer, blocks of a caption encoder
MAX_LENGTH = 1 << 14  # tokens of an image: tables of L x L are built from the config of a stranger's file


def is_exported(path: os.PathLike) -> bool:
    """Return True if a path is the folder of an exported model."""
    folder = Path(path)
    return (folder / CONFIG_FILE).exists() and (folder / WEIGHTS_FILE).exists()


def write_exported(
    folder: Path,
    networks: Mapping[str, tuple[TokenizerConfig | TransformerConfig, dict]],
    sampling: SamplingOptions | None,
    class_names: tuple[str, ...],
    source: Mapping[str, object],
    dtype: DTypeLike,
) -> None:
    """Write an exported model.

    Args:
      folder: of the model; created if there is none.
      networks: config and parameters of each network, in the layout of checkpoints; keys as in `CONFIGS`.
      sampling: options of the run; None without a transformer.
      class_names: names of the classes; () if they have none.
      source: further facts to keep, such as the commit and the command of the training.
      dtype: of what every use casts to the compute dtype anyway; norms, embeddings and codebook stay float32.
    """
    tensors, record = {}, {"format": FORMAT, "class_names": list(class_names), "source": dict(source)}
    for kind, (config, params) in networks.items():
        record[kind] = dataclasses.asdict(config)
        flat = flatten_dict(in_compute_dtype(jax.tree.map(np.asarray, params), dtype), sep="/")
        tensors |= {f"{kind}/{name}": value for name, value in flat.items()}
    if sampling is not None:
        record["sampling"] = dataclasses.asdict(sampling)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_safetensors(
        folder / WEIGHTS_FILE, shapes, iter(tensors.items()), {name: t.dtype for name, t in tensors.items()}
    )
    write_atomic(folder / CONFIG_FILE, json.dumps(record, indent=1).encode() + b"\n")


def read_record(folder: os.PathLike) -> dict:
    """Read `config.json` of an exported model.

    Raises:
      ValueError: if it is not one; the message names the file and what is wrong.
    """
    path = Path(folder) / CONFIG_FILE
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{path}: format must be {FORMAT}, got {found!r}; is it of a newer var_jax?")
    names = record.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: class_names must be a list of names")
    if not any(kind in record for kind in CONFIGS):
        raise ValueError(f"{path} describes no network: it has none of {', '.join(CONFIGS)}")
    return record


def read_config(folder: Path, kind: str, record: dict) -> TokenizerConfig | TransformerConfig:
    """Return the architecture of one network of an exported model.

    Raises:
      ValueError: if the record has no such network, or a field that is unknown or out of range.
    """
    path, fields = folder / CONFIG_FILE, record.get(kind)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} describes no {kind}, but {', '.join(k for k in CONFIGS if k in record)}")
    try:
        sides = [side for side in fields["scales"] if isinstance(side, int) and 0 < side <= MAX_LENGTH]
        if len(sides) != len(fields["scales"]) or sum(side * side for side in sides) > MAX_LENGTH:
            raise ValueError(f"scales must be sides of at most {MAX_LENGTH} tokens together")
        _check_sizes(fields, os.path.getsize(folder / WEIGHTS_FILE))
        return CONFIGS[kind](**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {kind} is not a valid architecture: {error}") from error


def _check_sizes(fields: dict, file_bytes: int) -> None:
    """Raise ValueError on sizes that the file cannot have, before anything is built from them."""
    levels = len(fields.get("ch_mult", ()))
    least = fields.get("depth", 1) * max(fields.get("width", 1), fields.get("ch", 1)) ** 2
    least = max(least, fields.get("condition_length", 0), fields.get("condition_width", 0))
    loops = max(levels, fields.get("num_phis", 0), levels * fields.get("num_blocks", 0))
    loops = max(loops, fields.get("text_depth", 0))
    if least > file_bytes or loops > MAX_BLOCKS:
        raise ValueError(f"a network of these sizes is not in a file of {file_bytes} bytes")


def read_sampling(folder: Path, record: dict) -> SamplingOptions:
    """Return the sampling options of an exported model; the published ones if it has none.

    Raises:
      ValueError: on an option that is unknown or out of range.
    """
    try:
        return SamplingOptions(**record.get("sampling", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: sampling is not valid: {error}") from error


def read_params(folder: Path, kind: str, shapes: dict) -> dict:
    """Read the parameters of one network of an exported model as float32 arrays on the host.

    Args:
      folder: of the model.
      kind: key of `CONFIGS`.
      shapes: tree of shapes that its config asks for.

    Raises:
      ValueError: naming tensors that are missing, unknown, of another shape, or not floats.
    """
    path, prefix = folder / WEIGHTS_FILE, f"{kind}/"
    tensors = read_tensors(path, kind)
    stored = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    expected = {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()}
    problems = [f"{name} is missing" for name in expected.keys() - stored]
    problems += [f"{name} is unknown" for name in stored.keys() - expected]
    for name in expected.keys() & stored:
        if stored[name].shape != expected[name]:
            problems.append(f"{name} has shape {stored[name].shape}, must be {expected[name]}")
        elif stored[name].dtype.name not in ("float32", "bfloat16", "float16"):
            problems.append(f"{name} has dtype {stored[name].dtype}, must be a float")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit its config: {'; '.join(sorted(problems)[:5])}{more}")
    return unflatten_dict({name: stored[name].astype(np.float32) for name in expected}, sep="/")
