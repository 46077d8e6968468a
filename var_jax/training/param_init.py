"""Initialization from pretrained parameters (`init_from`), also of other classes, scales or codes.

`match_params` selects the parameters that fit, on the host; `shard_params` puts them on the devices, and
`merge_params` into initialized parameters. Parameters are named by their paths, like `head/kernel`.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from var_jax.conditions import PADDING, UNKNOWN
from var_jax.scales import Scales
from var_jax.sharding import replicated
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig, TransformerConfig

Config = TokenizerConfig | TransformerConfig


@flax.struct.dataclass
class InitialValue:
    """Initial value of a parameter, or of some rows of an embedding.

    Attributes:
      values: float32, the parameter, or n rows of it.
      rows: int32 [n], indices of these rows; None for the whole parameter.
    """

    values: np.ndarray | jax.Array
    rows: np.ndarray | jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class MatchRules:
    """Rules by which a network can be initialized from another one.

    Attributes:
      must_match: fields of the architecture that must be equal; some of them change no shape.
      may_reinit: paths of parameters that are initialized if they do not fit.
      noted: fields of the architecture that may differ, with a notice.
    """

    must_match: tuple[str, ...]
    may_reinit: tuple[str, ...]
    noted: tuple[str, ...] = ()


_TRANSFORMER_MUST_MATCH = ("depth", "width", "num_heads", "shared_adaln", "normalized_attention", "positions")
_TRANSFORMER_MUST_MATCH += ("condition", "condition_width", "text_depth")
_TRANSFORMER_MAY_REINIT = (
    "class_embedding",
    "encoder/word_embedding",
    "encoder/position_embedding",
    "start_embedding",
    "position_embedding",
    "row_embedding",
    "column_embedding",
    "distance_bias",
    "code_embedding/kernel",
    "head/kernel",
    "head/bias",
)
MATCH_RULES = {
    TokenizerConfig: MatchRules(
        must_match=("patch", "ch", "ch_mult", "num_blocks", "norm_groups", "code_dim", "l2_normalized"),
        may_reinit=("quantizer/codebook", "quantizer/phi_kernel", "quantizer/phi_bias"),
    ),
    NextScaleConfig: MatchRules(
        must_match=_TRANSFORMER_MUST_MATCH,
        may_reinit=(*_TRANSFORMER_MAY_REINIT, "level_embedding"),
        noted=("mask",),
    ),
    NextTokenConfig: MatchRules(
        must_match=(*_TRANSFORMER_MUST_MATCH, "order", "order_seed", "mask", "mask_radius"),
        may_reinit=_TRANSFORMER_MAY_REINIT,
    ),
}


def match_params(
    params: dict, config: Config, target_shapes: dict, target_config: Config
) -> tuple[dict[str, InitialValue], list[str]]:
    """Select the parameters of a pretrained network that another network can be initialized from.

    Args:
      params: parameters of the pretrained network, host arrays.
      config: its architecture.
      target_shapes: parameters of the other network, as anything with a shape.
      target_config: its architecture.

    Returns:
      Initial values by path; and a line for each field of the architecture that differs, and, with both
      shapes, for each parameter that is not loaded completely.

    Raises:
      ValueError: if the networks differ in more than may be reinitialized; names the config fields to change
        or, if there are none, every parameter that does not fit.
    """
    rules = MATCH_RULES[type(target_config)]
    pretrained, target = flatten_dict(params, sep="/"), flatten_dict(target_shapes, sep="/")
    fields = [
        f"config.model.{name} must be {getattr(config, name)}, as in init_from; "
        f"got {getattr(target_config, name)}"
        for name in rules.must_match
        if getattr(config, name) != getattr(target_config, name)
    ]
    mismatches = {
        path: f"{path} is {_shape(pretrained.get(path))} in init_from, {_shape(target.get(path))} in this run"
        for path in sorted(pretrained.keys() | target.keys())
        if _shape(pretrained.get(path)) != _shape(target.get(path))
    }
    if fields or mismatches.keys() - set(rules.may_reinit):
        raise ValueError("it is another network\n  " + "\n  ".join(fields or mismatches.values()))

    init_values = {}
    notes = [
        f"config.model.{name} is {getattr(target_config, name)}, in init_from {getattr(config, name)}"
        for name in rules.noted
        if getattr(config, name) != getattr(target_config, name)
    ]
    for path, shape in target.items():
        if path not in mismatches and not _rows_differ(path, config, target_config):
            init_values[path] = InitialValue(pretrained[path])
            continue
        kind = "words" if path == "encoder/word_embedding" else "maps"
        note = mismatches.get(path, f"{path} is of other {kind}")
        if pairs := _common_rows(path, config, target_config):
            old, new = np.array(pairs, np.int32).T
            init_values[path] = InitialValue(pretrained[path][old], new)
            notes.append(f"{note}: {len(new)} of {shape.shape[0]} rows loaded, the others initialized")
        else:
            notes.append(f"{note}: initialized")
    notes += [f"{note}: not used" for path, note in mismatches.items() if path not in target]
    return init_values, notes


def shard_params(init_values: dict[str, InitialValue], abstract: dict) -> dict[str, InitialValue]:
    """Convert host arrays to global arrays with the shardings of the parameters.

    Args:
      init_values: initial values by path; every process has all of them, and puts shards on its own devices.
      abstract: parameters of the run as ShapeDtypeStructs with shardings.
    """
    flat = flatten_dict(abstract, sep="/")

    def put(array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    sharded = {}
    for path, leaf in init_values.items():
        sharding = flat[path].sharding
        if leaf.rows is not None:
            sharding = replicated(sharding.mesh)  # the mesh need not divide the number of these rows
        sharded[path] = jax.tree.map(lambda array: put(array, sharding), leaf)  # noqa: B023
    return sharded


def merge_params(params: dict, init_values: dict[str, InitialValue]) -> dict:
    """Replace parameters (with or without axis names), or rows of them, by initial values."""
    flat = flatten_dict(nn.meta.unbox(params), sep="/")
    for path, leaf in init_values.items():
        if leaf.rows is None:
            flat[path] = jnp.copy(leaf.values)  # training donates its parameters
        else:
            flat[path] = flat[path].at[leaf.rows].set(leaf.values)
    return nn.meta.replace_boxed(params, unflatten_dict(flat, sep="/"))


def _shape(leaf) -> list[int] | str:
    return "absent" if leaf is None else list(leaf.shape)


def _rows_differ(path: str, old: Config, new: Config) -> bool:
    """Return whether rows of an embedding belong to other maps or words, even if their number is equal."""
    if path == "encoder/word_embedding":
        return old.vocabulary != new.vocabulary
    if path in ("row_embedding", "column_embedding", "distance_bias"):
        return old.scales[-1] != new.scales[-1]  # they depend on the finest map only
    return path in ("level_embedding", "position_embedding") and old.scales != new.scales


def _common_rows(path: str, old: Config, new: Config) -> list[tuple[int, int]]:
    """Return pairs (old row, new row) of a transformer's embedding that have the same meaning."""
    if path == "class_embedding":
        return [(old.num_classes, new.num_classes)]  # "no class"
    if path == "encoder/word_embedding":
        words = {word: 2 + i for i, word in enumerate(old.vocabulary)}
        shared = [(words[word], 2 + i) for i, word in enumerate(new.vocabulary) if word in words]
        return [(PADDING, PADDING), (UNKNOWN, UNKNOWN), *shared]
    if path == "encoder/position_embedding":
        return [(i, i) for i in range(min(old.condition_length, new.condition_length))]
    if path == "level_embedding":
        return _equal_maps(old.schedule, new.schedule)
    if path == "position_embedding":
        return [
            (old.schedule.starts[j] + cell, new.schedule.starts[k] + cell)
            for j, k in _equal_maps(old.schedule, new.schedule)
            for cell in range(new.scales[k] ** 2)
        ]
    return []


def _equal_maps(old: Scales, new: Scales) -> list[tuple[int, int]]:
    """Return pairs (old, new) of indices of maps with equal sides, both in increasing order."""
    pairs, start = [], 0
    for k, side in enumerate(new.sides):
        if side in old.sides[start:]:
            start = old.sides.index(side, start) + 1
            pairs.append((start - 1, k))
    return pairs
