"""Starting a run from parameters that were trained elsewhere, for other classes, scales or codes.

`match_params` compares two networks on the host; `shard_params` puts what fits onto the devices, and
`merge_params` into fresh parameters.  Parameters go by their paths, like `head/kernel`.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from var_jax.scales import Scales
from var_jax.sharding import replicated
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig, TransformerConfig

Config = TokenizerConfig | TransformerConfig


@flax.struct.dataclass
class InitialValue:
    """A parameter that a run starts from.

    Attributes:
      values: float32, the parameter; or, of an embedding, the rows of it that are known.
      rows: int32 [n], which rows those are; None for all.
    """

    values: np.ndarray | jax.Array
    rows: np.ndarray | jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Rules:
    """What makes two networks of a kind different ones.

    Attributes:
      must_match: fields of the architecture that must be equal; some do not show in any shape.
      may_reinit: parameters that are made anew where they do not fit.
    """

    must_match: tuple[str, ...]
    may_reinit: tuple[str, ...]


_SAME = ("depth", "width", "num_heads", "shared_adaln", "normalized_attention", "positions")
_ANEW = (
    "class_embedding",
    "start_embedding",
    "position_embedding",
    "row_embedding",
    "column_embedding",
    "distance_bias",
    "code_embedding/kernel",
    "head/kernel",
    "head/bias",
)
RULES = {
    TokenizerConfig: Rules(
        must_match=("patch", "ch", "ch_mult", "num_blocks", "norm_groups", "code_dim", "l2_normalized"),
        may_reinit=("quantizer/codebook", "quantizer/phi_kernel", "quantizer/phi_bias"),
    ),
    NextScaleConfig: Rules(_SAME, (*_ANEW, "level_embedding")),
    NextTokenConfig: Rules((*_SAME, "order", "order_seed", "mask", "mask_radius"), _ANEW),
}


def match_params(
    params: dict, config: Config, shapes: dict, wanted: Config
) -> tuple[dict[str, InitialValue], list[str]]:
    """What a network can take over from another one.

    Args:
      params: of the other network, host arrays.
      config: its architecture.
      shapes: our parameters, as anything with a shape.
      wanted: our architecture.

    Returns:
      Parameters by path, and a line, with both shapes, on each that is not taken whole.

    Raises:
      ValueError: where it is no network of this kind; names the config fields to change, and every tensor
        that does not fit.
    """
    rules, there, here = RULES[type(wanted)], flatten_dict(params, sep="/"), flatten_dict(shapes, sep="/")
    fields = [
        f"config.model.{name} must be {getattr(config, name)}, as there; got {getattr(wanted, name)}"
        for name in rules.must_match
        if getattr(config, name) != getattr(wanted, name)
    ]
    unfit = {
        path: f"{path} is {_shape(there.get(path))} there, {_shape(here.get(path))} here"
        for path in sorted(there.keys() | here.keys())
        if _shape(there.get(path)) != _shape(here.get(path))
    }
    if fields or unfit.keys() - set(rules.may_reinit):
        raise ValueError("it is another network\n  " + "\n  ".join([*fields, *unfit.values()]))

    given, notes = {}, []
    for path, shape in here.items():
        if path not in unfit and not _moved(path, config, wanted):
            given[path] = InitialValue(there[path])
            continue
        note = unfit.get(path, f"{path} is of other maps")
        if pairs := _kept_rows(path, config, wanted):
            old, new = np.array(pairs, np.int32).T
            given[path] = InitialValue(there[path][old], new)
            notes.append(f"{note}: {len(new)} of {shape.shape[0]} rows taken, the others made anew")
        else:
            notes.append(f"{note}: made anew")
    notes += [f"{note}: not used" for path, note in unfit.items() if path not in here]
    return given, notes


def shard_params(given: dict[str, InitialValue], abstract: dict) -> dict[str, InitialValue]:
    """Host arrays -> global arrays, sharded as the parameters are.

    Args:
      given: by path; every process has all of it, and hands its own devices their parts.
      abstract: our parameters as ShapeDtypeStructs with shardings.
    """
    flat = flatten_dict(abstract, sep="/")

    def put(array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    placed = {}
    for path, leaf in given.items():
        sharding = flat[path].sharding
        if leaf.rows is not None:
            sharding = replicated(sharding.mesh)  # a few rows, that need not divide as the whole does
        placed[path] = jax.tree.map(lambda array: put(array, sharding), leaf)  # noqa: B023
    return placed


def merge_params(params: dict, given: dict[str, InitialValue]) -> dict:
    """Parameters (with or without axis names) where those given take the place of the initial ones."""
    flat = flatten_dict(nn.meta.unbox(params), sep="/")
    for path, leaf in given.items():
        # A copy, since training will write over it.
        whole = leaf.rows is None
        flat[path] = jnp.copy(leaf.values) if whole else flat[path].at[leaf.rows].set(leaf.values)
    return nn.meta.replace_boxed(params, unflatten_dict(flat, sep="/"))


def _shape(leaf) -> list[int] | str:
    return "absent" if leaf is None else list(leaf.shape)


def _moved(path: str, old: Config, new: Config) -> bool:
    """Whether rows of an embedding mean other maps, though their number may be the same."""
    if path in ("row_embedding", "column_embedding", "distance_bias"):
        return old.scales[-1] != new.scales[-1]  # they are about the finest map alone
    return path in ("level_embedding", "position_embedding") and old.scales != new.scales


def _kept_rows(path: str, old: Config, new: Config) -> list[tuple[int, int]]:
    """Rows (there, here) of an embedding of the transformer that mean the same."""
    if path == "class_embedding":
        return [(old.num_classes, new.num_classes)]  # "no class"
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
    """Maps (there, here) of equal sides; of several with one side, the first with the first and so on."""
    pairs, first = [], 0
    for k, side in enumerate(new.sides):
        if side in old.sides[first:]:
            first = old.sides.index(side, first) + 1
            pairs.append((first - 1, k))
    return pairs
