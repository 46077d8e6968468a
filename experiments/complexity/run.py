"""Measure the cost of generating an n x n token map: O(n^6) token by token against O(n^4) scale by scale.

    python -m experiments.complexity.run --out=runs/complexity
    python -m experiments.complexity.run --sides=16,32,64,128 --most_seconds=10 --out=runs/complexity_128

The claim (Tian et al. 2024, section 3 and its appendix on time complexity) is about attention without a KV
cache: step i recomputes all i positions so far, at a cost of i^2.  Next-token has n^2 steps of up to n^2
positions, so O(n^6); next-scale has O(log n) steps, and the last one dominates with O(n^4).  With a cache
both need O(n^4) for attention and O(n^2) for everything else; the difference is n^2 against O(log n) steps.

Measures four systems, each scheme with and without a cache, of the same width and depth, at batch 1, without
guidance, in raster order:

  on paper  `transformer/flops.py`: matrix products only, and only positions that exist so far.
  counted   XLA's count for the compiled program of a step, times the number of its runs; includes elementwise
            work.  Blocks are unrolled for the count, since XLA counts a loop body once.
  seconds   of the sampler (`sampling/sampler.py`) for the tokens of one image, without a decoder: the median
            of up to 20 runs after the first, or of those that start within 5 s.  A size that would take more
            than --most_seconds, at the rate of the size before, is not measured.

The programs that are counted are the same that are timed.  Next-token runs one program in a loop, so its
length is fixed, and it computes padding that the mask hides: without a cache every step runs over all n^2
positions (three times the attention on paper), with one it attends to the whole cache (twice).  Next-scale
has no padding.

Writes `complexity.md` (tables), `complexity.json` and `complexity.png`.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.complexity.report import fit_exponents, format_tables, plot_costs
from experiments.complexity.uncached import UncachedNextScale, UncachedNextToken
from var_jax import cli
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import Networks, generate, image_keys
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig, TransformerConfig
from var_jax.transformer.flops import generation_flops
from var_jax.transformer.model import ARTransformer
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken

FLAGS = flags.FLAGS
CODES, CODE_DIM = 8, 4  # small, so that attention dominates
REPEATS, REPEAT_SECONDS = 20, 5.0  # per point: at most so many runs, and so many seconds
UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # for programs that are counted and never run


class System(NamedTuple):
    """A way to generate.

    Attributes:
      model: class of the transformer.
      cached: True if it has a KV cache.
      theory: exponent of n in its FLOPs.
    """

    model: type[ARTransformer]
    cached: bool
    theory: int


SYSTEMS = {
    "next-token, no cache": System(UncachedNextToken, False, 6),
    "next-token, KV cache": System(NextToken, True, 4),
    "next-scale, no cache": System(UncachedNextScale, False, 4),
    "next-scale, KV cache": System(NextScale, True, 4),
}


def doubling_scales(side: int) -> tuple[int, ...]:
    """Return sides 1 to n that grow by a constant factor, at most 2: 1, 2, 4, ..., n for a power of 2."""
    last = math.ceil(math.log2(side))
    return tuple(round(side ** (k / last)) for k in range(last + 1))


def make_network(name: str, side: int, width: int, depth: int) -> ARTransformer:
    """Build the network of a system for n x n token maps."""
    model = SYSTEMS[name].model
    fields = dict(depth=depth, width=width, num_classes=1, num_codes=CODES, code_dim=CODE_DIM)
    if issubclass(model, NextToken):
        return model(NextTokenConfig(scales=(side,), **fields))
    return model(NextScaleConfig(scales=doubling_scales(side), **fields))


class IdentityDecoder(nn.Module):
    """A tokenizer without a decoder, whose image is f_hat.

    Attributes:
      config: of the quantizer.
    """

    config: TokenizerConfig

    def decode_features(self, f_hat: jax.Array) -> jax.Array:
        return f_hat


def abstract_params(model: ARTransformer) -> dict:
    """Return the shapes of the network's float32 parameters."""
    cfg = model.config
    inputs = jnp.zeros(1, jnp.int32), jnp.zeros((1, cfg.length - cfg.num_start_tokens, cfg.code_dim))
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]


def count_sampling_flops(model: ARTransformer) -> float:
    """Count the FLOPs of generating one image's tokens with XLA, without the sampling from logits."""
    cfg, params = model.config, abstract_params(model)

    def bind(method: str, *static) -> Callable:
        def call(params, *args):
            with jax.disable_jit():  # unrolls the scan, so that every block is counted
                return model.apply({"params": params}, *static, *args, method=method)

        return call

    def count(call: Callable, *args) -> float:
        compiled = jax.jit(call).lower(params, *args).compile(compiler_options=UNOPTIMIZED)
        return compiled.cost_analysis()["flops"]

    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    condition = jax.eval_shape(bind("condition"), params, labels)
    cache = jax.eval_shape(bind("empty_cache", 1), params)
    total = count(bind("condition"), labels)
    inputs = lambda n: jax.ShapeDtypeStruct((1, n, cfg.code_dim), jnp.float32)
    if not model.config.predicts_maps:
        i = jax.ShapeDtypeStruct((), jnp.int32)
        return total + cfg.length * count(bind("step"), i, inputs(1), condition, cache)
    for k, (start, end) in enumerate(cfg.steps):
        args = inputs(end - start) if k else None, condition, cache
        total += count(bind("step", k), *args)
        cache = jax.eval_shape(bind("step", k), params, *args)[1]
    return total


def compile_sampler(model: ARTransformer) -> Callable[[], jax.Array]:
    """Compile the program that samples the tokens int32 [1, L] of one image with random weights."""
    cfg, rng = model.config, np.random.default_rng(0)
    random = lambda x: jnp.asarray(rng.standard_normal(x.shape) * cfg.width**-0.5, jnp.float32)
    params, codebook = jax.tree.map(random, abstract_params(model)), rng.standard_normal((CODES, CODE_DIM))
    tokenizer = IdentityDecoder(
        TokenizerConfig(scales=cfg.scales, num_codes=CODES, code_dim=CODE_DIM, num_phis=0)
    )
    tokenizer_params = {"quantizer": {"codebook": jnp.asarray(codebook, jnp.float32)}}
    per_scale = SamplingOptions(guidance=0.0, top_k=0, top_p=0.0).per_scale(cfg.schedule, CODES)
    keys, label = image_keys(0, jnp.arange(1)), jnp.zeros(1, jnp.int32)
    args = (Networks(tokenizer, model, tokenizer_params, params), label, keys, per_scale)
    compiled = generate.lower(*args).compile()
    return lambda: compiled(*args)[1]


def median_seconds(run: Callable[[], jax.Array]) -> float:
    """Measure the median time of runs after the first, or the time of the first if that takes long."""
    times = []
    while len(times) <= REPEATS and sum(times) < REPEAT_SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:] or times))


def measure_systems(
    sides: list[int], width: int, depth: int, max_seconds: float, progress: Callable = print
) -> Iterator[dict]:
    """Measure all points, for each system from the smallest map to the largest.

    Args:
      sides: n of the n x n token maps, increasing.
      width: of the transformers.
      depth: of the transformers.
      max_seconds: an image that would take longer is not generated.
      progress: called with a line of text per point.

    Yields:
      `system`, `side`, `positions` L, `steps`, `paper` and `counted` FLOPs of an image, its `seconds`, and
      `expected_seconds` at the rate of the size before; None if unknown or not measured.
    """
    for name, system in SYSTEMS.items():
        rate = None
        for side in sides:
            model = make_network(name, side, width, depth)
            result = {"system": name, "side": side, **cost_on_paper(model.config, system.cached)}
            result["counted"] = count_sampling_flops(model)
            expected = rate and result["counted"] / rate
            is_skipped = expected is not None and expected > max_seconds
            result |= {
                "seconds": None if is_skipped else median_seconds(compile_sampler(model)),
                "expected_seconds": expected,
            }
            took = f"not measured, expected {expected:.0f} s" if is_skipped else f"{result['seconds']:.4g} s"
            if not is_skipped:
                rate = result["counted"] / result["seconds"]
            paper, counted = result["paper"] / 1e9, result["counted"] / 1e9
            progress(f"{name}, n = {side}: {paper:.4g} GFLOPs on paper, {counted:.4g} counted; {took}")
            yield result


def cost_on_paper(cfg: TransformerConfig, cached: bool) -> dict:
    """Compute positions, steps, and FLOPs of an image by `transformer/flops.py`."""
    flops = generation_flops(cfg, num_guided_scales=0, cached=cached)
    return {"positions": cfg.length, "steps": len(cfg.steps), "paper": flops}


def main(_):
    sides = sorted(set(cli.numbers("sides", int)))
    if len(sides) < 2 or sides[0] < 2:
        raise app.UsageError(f"--sides={','.join(FLAGS.sides)}: must be two sizes or more, from 2 on")
    try:
        make_network("next-scale, KV cache", sides[0], FLAGS.width, FLAGS.depth)
    except ValueError as error:  # a width that its heads do not divide
        raise app.UsageError(f"--width={FLAGS.width}: {error}") from error
    out = cli.local_folder("out")
    out.mkdir(parents=True, exist_ok=True)
    progress = lambda line: print(line, flush=True)
    points = list(measure_systems(sides, FLAGS.width, FLAGS.depth, FLAGS.most_seconds, progress))
    theory = {name: system.theory for name, system in SYSTEMS.items()}
    result = {
        "width": FLAGS.width,
        "depth": FLAGS.depth,
        "codes": CODES,
        "code_dim": CODE_DIM,
        "most_seconds": FLAGS.most_seconds,
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "jax": jax.__version__,
        "fitted_to": FLAGS.last,
        "exponents": fit_exponents(points, theory, FLAGS.last),
        "points": points,
    }
    (out / "complexity.json").write_text(json.dumps(result, indent=1))
    (out / "complexity.md").write_text(format_tables(result) + "\n")
    plot_costs(result, out / "complexity.png")
    progress(f"\n{format_tables(result)}\n\nplot: {out / 'complexity.png'}")


if __name__ == "__main__":
    flags.DEFINE_list("sides", ["4", "8", "16", "32", "48", "64"], "n of the n x n token maps")
    flags.DEFINE_integer("width", 32, "D of the transformers", lower_bound=1)
    flags.DEFINE_integer("depth", 1, "Number of blocks of the transformers", lower_bound=1)
    flags.DEFINE_float(
        "most_seconds", 240, "Maximum seconds of an image; larger sizes are not timed", lower_bound=0
    )
    flags.DEFINE_integer(
        "last", 3, "Number of the largest sizes to which exponents are fitted", lower_bound=2
    )
    flags.DEFINE_string("out", None, "Directory of the results", required=True)
    cli.run(main)
