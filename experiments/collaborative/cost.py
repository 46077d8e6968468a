"""Cost of sampling with one transformer or two: FLOPs from the jaxprs of its passes, bytes from shapes.

A pass is one call of a transformer: the adaLN vectors, a map, or the refiner's reading of the draft.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from experiments.complexity.run import abstract_params
from var_jax.training.hardware import Chip
from var_jax.training.task import program_flops
from var_jax.transformer.model import Cache, Condition
from var_jax.transformer.next_scale import NextScale

LABEL = ShapeDtypeStruct((1,), jnp.int32)
# Method of a transformer -> the parameters whose matrices it reads.
READ = {"condition": ("adaln", "head_adaln"), "prefill": ("blocks",), "step": ("blocks", "head")}


class Pass(NamedTuple):
    """Cost of a pass.

    Attributes:
      flops: of one image.
      weights: bytes of the matrices that it reads, once for a batch.
      cache: bytes of keys and values that it reads, for each image.
    """

    flops: float
    weights: int
    cache: int


def sampling_passes(
    drafter: NextScale, refiner: NextScale | None, draft_scales: int, sequences: int
) -> list[Pass]:
    """List the passes that sample an image, without the decoder.

    Args:
      drafter: samples the first `draft_scales` maps, or all without a refiner.
      refiner: samples the others; None without.
      draft_scales: number of maps of the drafter.
      sequences: of an image: 2 with guidance, else 1.
    """
    num_maps = len(drafter.config.scales)
    if refiner is None:
        passes = _passes(drafter, range(num_maps))
    else:
        passes = _passes(drafter, range(draft_scales)) + _passes(refiner, range(draft_scales, num_maps))
    return [Pass(sequences * one.flops, one.weights, sequences * one.cache) for one in passes]


def _passes(model: NextScale, maps: range) -> list[Pass]:
    """List the passes of one transformer that samples some maps, and reads those before them at once."""
    passes = [_count(model, "condition")]
    if maps.start and model.config.uses_cache:
        passes.append(_count(model, "prefill", maps.start - 1))
    return passes + [_count(model, "step", k) for k in maps]


@functools.cache
def _count(model: NextScale, method: str, k: int = 0) -> Pass:
    """Count a pass of one sequence: `condition`, of the label; `prefill`, up to map k; or `step`, map k."""
    cfg, (params, condition, cache) = model.config, _shapes(model)
    start, end = cfg.steps[k]
    inputs = lambda first: ShapeDtypeStruct((1, end - first, cfg.code_dim), jnp.float32)
    args = {
        "condition": (LABEL,),
        "prefill": (inputs(cfg.num_start_tokens), condition),
        "step": (inputs(start) if k else None, condition, cache),
    }
    static = (k,) if method == "step" else ()
    size = sum(leaf.size for name in READ[method] for leaf in jax.tree.leaves(params[name]))
    return Pass(
        flops=program_flops(_call(model, method, *static), params, *args[method]),
        weights=size * jnp.dtype(model.dtype).itemsize,
        cache=0 if method == "condition" else _cache_bytes(model, end),
    )


@functools.cache
def _shapes(model: NextScale) -> tuple[dict, Condition, Cache | None]:
    """Return the shapes of the parameters, and of the condition and the cache of one sequence."""
    params = abstract_params(model)
    condition = jax.eval_shape(_call(model, "condition"), params, LABEL)
    return params, condition, jax.eval_shape(_call(model, "empty_cache", 1), params)


def _call(model: NextScale, method: str, *static) -> Callable:
    """Return a method of a model as a function of its parameters and of arrays."""
    return lambda params, *args: model.apply({"params": params}, *static, *args, method=method)


def _cache_bytes(model: NextScale, positions: int) -> int:
    """Return the bytes of the keys and values of the first positions of a sequence."""
    cfg = model.config
    return 2 * cfg.depth * positions * cfg.width * jnp.dtype(model.dtype).itemsize if cfg.uses_cache else 0


def cache_bytes(drafter: NextScale, refiner: NextScale | None, draft_scales: int, sequences: int) -> int:
    """Return the most bytes of keys and values of an image; two models hold them one after the other."""
    ends = drafter.config.schedule.ends
    if refiner is None:
        return sequences * _cache_bytes(drafter, ends[-1])
    drafted, refined = _cache_bytes(drafter, ends[draft_scales - 1]), _cache_bytes(refiner, ends[-1])
    return sequences * max(drafted, refined)


def weight_bytes(*models: NextScale) -> int:
    """Return the bytes of all parameters in the dtypes of the models."""
    return sum(
        leaf.size * jnp.dtype(model.dtype).itemsize
        for model in models
        for leaf in jax.tree.leaves(_shapes(model)[0])
    )


def bound_seconds(passes: list[Pass], batch: int, chip: Chip) -> float:
    """Return the least seconds per image: each pass computes at the peak, or reads at the bandwidth."""
    times = (
        max(batch * one.flops / chip.flops, (one.weights + batch * one.cache) / chip.bandwidth)
        for one in passes
    )
    return sum(times) / batch
