"""Compare block-diagonal (Markov) with block-causal attention: cost, time and loss.

    python -m experiments.markov.run --config=configs/digits.py --tokenizer=runs/digits --out=runs/markov

Under `config.model.mask=block_diagonal` a map attends to itself alone, and sees the coarser maps through its
input f_hat only (HMAR, Kumbong et al. 2025; MVAR; the first part of HMAR alone).  Three parts, --parts:

  cost   query-key pairs, FLOPs and cache of an image for the published d16, computed from the schedule, and
         the memory of loss and gradient of one of its blocks, as XLA counts it for this machine.
  speed  seconds of a training step and of sampling on this machine, at 256 and 512px and a small width; the
         two masks take turns, and the median of the ratios is reported.
  loss   transformers of the config's stage next_scale on one tokenizer, from scratch and fine-tuned from the
         block-causal one of the same seed, judged by held-out loss and by their samples.

Each part writes OUT/PART.json, and the call writes the tables of all parts that are there to OUT/markov.md.
Runs that were stopped go on.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments.complexity.run import CODE_DIM, CODES, compile_sampler
from experiments.markov import report
from experiments.next_token.run import build_stage_task, evaluate_samples, load_images
from experiments.setup_tokens import prepare_tokens
from var_jax import cli, stages
from var_jax.errors import ConfigError
from var_jax.evaluation.classifier import SampleJudge
from var_jax.scales import SCALES_256, SCALES_512
from var_jax.transformer.config import MAP_MASKS, NextScaleConfig
from var_jax.transformer.flops import generation_flops, training_flops
from var_jax.transformer.next_scale import NextScale

FLAGS = flags.FLAGS
PARTS = ("cost", "speed", "loss")
SIZES = {"256px": SCALES_256, "512px": SCALES_512}
SMALL = dict(depth=2, width=64, num_heads=2, num_classes=1, num_codes=CODES, code_dim=CODE_DIM)  # of `speed`
ROUNDS = 7  # timed rounds of `speed`
FINE_TUNING = 0.5  # share of --steps
FINE_TUNING_RATE = 1 / 8  # of the base learning rate
NUM_EVALUATIONS = 8

# System -> its mask, and the system that it is fine-tuned from.
SYSTEMS = {
    "block_causal": ("block_causal", None),
    "block_diagonal": ("block_diagonal", None),
    "block_causal-tuned": ("block_causal", "block_causal"),
    "block_diagonal-tuned": ("block_diagonal", "block_causal"),
}


# --- Cost


def published_cost(scales: tuple[int, ...], mask: str) -> dict:
    """Compute the cost of an image of the published d16 for a schedule under a mask."""
    cfg = NextScaleConfig(scales=scales, mask=mask)
    cache = 2 * cfg.depth * cfg.length * cfg.width * 2 if cfg.uses_cache else 0
    return {
        "pairs": int(cfg.masks[0].sum()),
        "training_flops": training_flops(cfg),
        "sampling_flops": generation_flops(cfg, num_guided_scales=0),
        "cache_bytes": cache,
    }


def training_memory(scales: tuple[int, ...], mask: str) -> int:
    """Return the bytes of temporary arrays of loss and gradient of one block and image, on this machine."""
    cfg = NextScaleConfig(scales=scales, mask=mask, depth=1, width=1024)
    loss_and_grad, inputs = training_program(NextScale(cfg, scan_layers=False), 1)
    return jax.jit(loss_and_grad).lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def training_program(model: NextScale, batch: int) -> tuple[Callable, tuple]:
    """Return the function that computes loss and gradients, and the shapes of its arguments."""
    cfg = model.config
    shape = jax.ShapeDtypeStruct
    inputs = shape((batch, cfg.length - cfg.num_start_tokens, cfg.code_dim), jnp.float32)
    labels, tokens = shape((batch,), jnp.int32), shape((batch, cfg.length), jnp.int32)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), labels, inputs))["params"]

    def loss(params, *batch):
        return model.apply({"params": params}, *batch, method="losses")[0].mean()

    return jax.value_and_grad(loss), (params, labels, inputs, tokens)


# --- Speed


def measure_speed(scales: tuple[int, ...], batch: int) -> dict:
    """Time loss with gradients, and the sampling of one image, under both masks in turn.

    Args:
      scales: the schedule.
      batch: images of a training step.

    Returns:
      `training` and `sampling`: median seconds under each mask, and the median `ratio` of block-causal to
      block-diagonal over the rounds.
    """
    result = {}
    models = [NextScale(NextScaleConfig(scales=scales, mask=mask, **SMALL)) for mask in MAP_MASKS]
    for name, make in (("training", compile_step), ("sampling", lambda model, _: compile_sampler(model))):
        programs = [make(model, batch) for model in models]
        times = np.array([[seconds(program) for program in programs] for _ in range(ROUNDS + 1)])[1:]
        result[name] = dict(zip(MAP_MASKS, np.median(times, axis=0).tolist(), strict=True))
        result[name]["ratio"] = float(np.median(times[:, 0] / times[:, 1]))
    return result


def compile_step(model: NextScale, batch: int) -> Callable[[], tuple]:
    """Compile the program of loss and gradients, with random weights."""
    function, shapes = training_program(model, batch)
    arrays, compiled = jax.tree.map(random_array, shapes), jax.jit(function).lower(*shapes).compile()
    return lambda: compiled(*arrays)


def random_array(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Draw an array of a shape: normal floats of standard deviation 0.02, or zeros for ints."""
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return np.zeros(shape.shape, shape.dtype)
    return (0.02 * np.random.default_rng(0).standard_normal(shape.shape)).astype(shape.dtype)


def seconds(run: Callable) -> float:
    """Measure the time of a call."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


# --- Loss


def system_stage(base: ConfigDict, system: str, seed: int, steps: int, out: Path) -> ConfigDict:
    """Make the config of one run.

    Args:
      base: prepared stage next_scale.
      system: of `SYSTEMS`.
      seed: of the run.
      steps: of a run from scratch.
      out: directory of the runs.
    """
    stage = base.copy_and_resolve_references()
    stage.model.mask, source = SYSTEMS[system]
    stage.seed = seed
    if source:
        steps = max(round(FINE_TUNING * steps), 1)
        stage.init_from = str(run_folder(out, source, seed))
        stage.train.base_learning_rate *= FINE_TUNING_RATE
    every = -(-steps // NUM_EVALUATIONS)
    stage.train.update(dict(steps=steps, eval_every=every, preview_every=0, checkpoint_every=steps))
    stage.train.log_every = max(steps // 20, 1)
    return stage


def run_folder(out: Path, system: str, seed: int) -> Path:
    """Return the directory of a run."""
    return out / system / str(seed)


def train_systems(base: ConfigDict, seeds: list[int], steps: int, out: Path, per_class: int) -> dict:
    """Train missing runs; return the figures of each system and seed.

    Args:
      base: prepared stage next_scale.
      seeds: a run of each system for each.
      steps: of a run from scratch.
      out: directory of the runs.
      per_class: samples of each class with which a run is judged.
    """
    side = build_stage_task(base).image_size
    splits = (base.data.train_split, base.data.eval_split)
    judge = SampleJudge(*(load_images(base, side, split) for split in splits))
    result: dict[str, dict] = {system: {} for system in SYSTEMS}
    for seed in seeds:
        for system in SYSTEMS:
            print(f"--- {system}, seed {seed}", flush=True)
            stage, folder = system_stage(base, system, seed, steps, out), run_folder(out, system, seed)
            stages.run(stage, folder)
            result[system][str(seed)] = evaluate_samples(folder, stage, judge, per_class)
    return result


def prepared_stage(config: ConfigDict, tokenizer: str, out: Path) -> ConfigDict:
    """Return the stage next_scale of a config on a trained tokenizer, with encoded data.

    Raises:
      ConfigError: on a config without that stage.
    """
    named = {stage.task: stage for stage in stages.stages_of(config)}
    if "next_scale" not in named:
        raise ConfigError(f"--config must have a stage next_scale; this one has {', '.join(named)}")
    stage = named["next_scale"].copy_and_resolve_references()
    stage.tokenizer = tokenizer
    prepare_tokens(stage, None, out)
    return stage


def compute_part(part: str, out: Path) -> dict:
    """Compute the figures of a part."""
    if part == "cost":
        return {
            size: {
                mask: published_cost(scales, mask) | {"step_bytes": training_memory(scales, mask)}
                for mask in MAP_MASKS
            }
            for size, scales in SIZES.items()
        }
    if part == "speed":
        return {size: measure_speed(scales, FLAGS.batch) for size, scales in SIZES.items()}
    stage = prepared_stage(FLAGS.config, FLAGS.tokenizer, out)
    return train_systems(stage, cli.numbers("seeds", int), FLAGS.steps, out, FLAGS.per_class)


def main(_):
    if unknown := sorted(set(FLAGS.parts) - set(PARTS)):
        raise app.UsageError(f"--parts must be among {', '.join(PARTS)}; got {', '.join(unknown)}")
    if "loss" in FLAGS.parts and not FLAGS.tokenizer:
        raise app.UsageError("--parts=loss needs --tokenizer, the directory of a run")
    out = cli.local_folder("out")
    out.mkdir(parents=True, exist_ok=True)
    for part in FLAGS.parts:
        (out / f"{part}.json").write_text(json.dumps(compute_part(part, out), indent=1))
    results = {part: out / f"{part}.json" for part in PARTS}
    results = {part: json.loads(path.read_text()) for part, path in results.items() if path.exists()}
    (out / "markov.md").write_text(report.format_tables(results) + "\n")
    print((out / "markov.md").read_text())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/digits.py", "Config with a stage next_scale")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_string("tokenizer", None, "loss: run whose tokenizer all systems share")
    flags.DEFINE_list("parts", list(PARTS), "Which of cost, speed and loss to compute")
    flags.DEFINE_list("seeds", ["1", "2", "3"], "loss: seeds with which each system is trained")
    flags.DEFINE_integer("steps", 400, "loss: training steps from scratch", lower_bound=1)
    flags.DEFINE_integer("per_class", 100, "loss: samples of each class of a run", lower_bound=2)
    flags.DEFINE_integer("batch", 4, "speed: images of a training step", lower_bound=1)
    cli.run(main)
