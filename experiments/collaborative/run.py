"""Sample the first maps with a large transformer and the others with a small one: cost, time and quality.

    python -m experiments.collaborative.run --config=configs/digits.py --tokenizer=runs/digits --out=runs/code

Collaborative decoding (CoDe, Chen et al. 2025).  Three parts, --parts:

  cost     FLOPs, weights and cache of an image of the published sizes, d30 with d16, counted, and the time
           that a data sheet allows.
  quality  a drafter, the config's transformer, and a refiner of half its depth and width, on one tokenizer.
           Pairs are untuned, fine-tuned on all maps, or specialized: each model on the maps that it samples
           (config.loss).  They are judged by held-out loss and by their samples.
  speed    seconds of sampling with these pairs on this machine; needs the runs of `quality`.

Each part writes OUT/PART.json, and the call writes the tables of all parts that are there to
OUT/collaborative.md, and samples of the first seed to OUT/samples.png.  Runs that were stopped go on.
"""

import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import var_jax
from experiments.collaborative import report
from experiments.collaborative.cost import bound_seconds, cache_bytes, sampling_passes, weight_bytes
from experiments.markov.run import (
    FINE_TUNING,
    FINE_TUNING_RATE,
    ROUNDS,
    prepared_stage,
    seconds,
)
from experiments.next_token.report import plot_samples
from experiments.next_token.run import build_stage_task, load_images
from var_jax import cli, stages
from var_jax.evaluation.classifier import SampleJudge
from var_jax.images import denormalize_to_uint8
from var_jax.sampling.sampler import generate, image_keys
from var_jax.training.hardware import CHIPS
from var_jax.training.metrics import read_metrics
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.next_scale import NextScale

FLAGS = flags.FLAGS
PARTS = ("cost", "quality", "speed")
PUBLISHED = {"drafter": 30, "refiner": 16}  # depths of `cost`
PUBLISHED_DRAFTS = (9, 8, 7, 6)
CHIP = "H100"
BATCHES = (1, 64)  # images, of `cost` and `speed`
SAMPLING_BATCH = 100
KINDS = ("untuned", "tuned", "specialized")  # of pairs
ALL_MAPS = "all"  # fine-tuning that is not specialized


# --- Cost


def published_cost() -> dict:
    """Compute the cost of an image of the published sizes at 256px, with guidance at all maps."""
    models = {
        role: NextScale(NextScaleConfig(depth=depth), jnp.bfloat16) for role, depth in PUBLISHED.items()
    }
    drafter, refiner = models["drafter"], models["refiner"]
    systems = {f"d{model.config.depth}": (model, None, 0) for model in models.values()}
    systems |= {report.pair_name(n): (drafter, refiner, n) for n in PUBLISHED_DRAFTS}
    result = {}
    for name, system in systems.items():
        passes = sampling_passes(*system, sequences=2)
        result[name] = {
            "flops": sum(one.flops for one in passes),
            "weights": weight_bytes(*(model for model in system[:2] if model)),
            "cache": cache_bytes(*system, sequences=2),
            **{f"seconds_{b}": bound_seconds(passes, b, CHIPS[CHIP]) for b in BATCHES},
        }
    return result


# --- Quality


def run_folder(out: Path, role: str, tuning: str, seed: int) -> Path:
    """Return the directory of a run.

    Args:
      out: directory of the runs.
      role: `drafter` or `refiner`.
      tuning: "" for the run from scratch, `all` for fine-tuning on all maps, or the number of drafted maps.
      seed: of the run.
    """
    return out / f"{role}{tuning and '-'}{tuning}" / str(seed)


def run_config(base: ConfigDict, role: str, tuning: str, seed: int, steps: int, out: Path) -> ConfigDict:
    """Make the config of one run.

    Args:
      base: prepared stage next_scale.
      role: see `run_folder`.
      tuning: see `run_folder`.
      seed: of the run.
      steps: of a run from scratch.
      out: directory of the runs.
    """
    stage = base.copy_and_resolve_references()
    stage.seed = seed
    if role == "refiner":
        for field in ("depth", "width", "num_heads"):
            stage.model[field] //= 2
    if tuning:
        steps = max(round(FINE_TUNING * steps), 1)
        stage.init_from = str(run_folder(out, role, "", seed))
        stage.train.base_learning_rate *= FINE_TUNING_RATE
        if tuning != ALL_MAPS:
            stage.loss["upto" if role == "drafter" else "from_scale"] = int(tuning)
    stage.train.update(dict(steps=steps, eval_every=steps, preview_every=0, checkpoint_every=steps))
    stage.train.log_every = max(steps // 10, 1)
    return stage


def list_systems(num_maps: int, drafts: list[int], kinds: list[str]) -> dict[str, tuple[str, int]]:
    """List the systems: each name with the fine-tuning of its runs (see `run_folder`) and the drafted maps.

    The drafter alone drafts all maps, and the refiner alone none.

    Args:
      num_maps: K.
      drafts: numbers of drafted maps of the pairs.
      kinds: of pairs, among `KINDS`.
    """
    result = {"drafter": ("", num_maps), "refiner": ("", 0)}
    if "tuned" in kinds:
        result |= {"drafter, tuned": (ALL_MAPS, num_maps), "refiner, tuned": (ALL_MAPS, 0)}
    for n in drafts:
        tunings = {"untuned": "", "tuned": ALL_MAPS, "specialized": str(n)}
        result |= {f"{report.pair_name(n)}, {kind}": (tunings[kind], n) for kind in kinds}
    return result


def load_system(
    out: Path, tuning: str, draft_scales: int, seed: int, tokenizer: var_jax.LoadedTokenizer
) -> var_jax.LoadedVAR:
    """Load the model or the pair of a system from its runs; see `list_systems`."""
    load = lambda role: var_jax.load_var(run_folder(out, role, tuning, seed), tokenizer=tokenizer)
    if draft_scales == 0:
        return load("refiner")
    drafter = load("drafter")
    if draft_scales == len(tokenizer.scales):
        return drafter
    return drafter.with_refiner(load("refiner"), draft_scales)


def bits_per_pixel(
    out: Path, tuning: str, draft_scales: int, seed: int, tokenizer: var_jax.LoadedTokenizer
) -> float:
    """Compute the held-out loss of a system at the end of its runs: each model's, of the maps it samples."""
    nats, num_maps = 0.0, len(tokenizer.scales)
    for role, maps in (("drafter", range(draft_scales)), ("refiner", range(draft_scales, num_maps))):
        if maps:
            log = read_metrics(run_folder(out, role, tuning, seed) / "next_scale" / "metrics.jsonl")
            last = [line for line in log if line["kind"] == "eval"][-1]
            nats += sum(tokenizer.scales[k] ** 2 * last[f"loss_{k}"] for k in maps)
    return float(nats / np.log(2) / tokenizer.image_size**2)


def draw_samples(
    model: var_jax.LoadedVAR, seed: int, per_class: int, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images uint8 [N, H, W, 3] of labels [N], write them to FOLDER/samples.npz, and return both."""
    labels = np.repeat(np.arange(model.num_classes), per_class)
    batches = model.generate_batches(
        labels, seed, min(SAMPLING_BATCH, len(labels)), model.options, postprocess=denormalize_to_uint8
    )
    images = np.concatenate([images for images, _ in batches])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "samples.npz", arr_0=images, arr_1=labels)
    return images, labels


def evaluate_systems(
    base: ConfigDict,
    systems: dict[str, tuple[str, int]],
    seeds: list[int],
    steps: int,
    out: Path,
    per_class: int,
) -> dict:
    """Train missing runs; compute the missing figures of each system and seed, kept in OUT/quality.json.

    Args:
      base: prepared stage next_scale.
      systems: from `list_systems`.
      seeds: of runs and samples.
      steps: of a run from scratch.
      out: directory of the runs.
      per_class: samples of each class.
    """
    tokenizer = var_jax.load_tokenizer(base.tokenizer)
    judge = SampleJudge(
        *(
            load_images(base, tokenizer.image_size, split)
            for split in (base.data.train_split, base.data.eval_split)
        )
    )
    path = out / "quality.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    tunings = dict.fromkeys(tuning for tuning, _ in systems.values())
    for seed in seeds:
        for tuning, role in itertools.product(tunings, PUBLISHED):
            folder = run_folder(out, role, tuning, seed)
            print(f"--- {folder.relative_to(out)}", flush=True)
            stages.run(run_config(base, role, tuning, seed, steps, out), folder)
        for name, (tuning, n) in systems.items():
            if str(seed) in result.setdefault(name, {}):
                continue
            model = load_system(out, tuning, n, seed, tokenizer)
            samples = draw_samples(model, seed, per_class, sample_folder(out, name, seed))
            result[name][str(seed)] = {
                **system_cost(model),
                "bits_per_pixel": bits_per_pixel(out, tuning, n, seed, tokenizer),
                **judge.figures(*samples),
            }
            path.write_text(json.dumps(result, indent=1))
    return result


def sample_folder(out: Path, name: str, seed: int) -> Path:
    """Return the directory of a system's samples."""
    return out / "samples" / name.replace(", ", "-").replace(" ", "_") / str(seed)


def system_cost(model: var_jax.LoadedVAR) -> dict:
    """Count FLOPs and cache of an image, without the decoder, with the model's options."""
    per_scale = model.options.per_scale(model.module.config.schedule, model.tokenizer.num_codes)
    refiner = model.refiner and model.refiner.module.clone(scan_layers=True)
    system = (model.module.clone(scan_layers=True), refiner, model.draft_scales)
    sequences = 2 if per_scale.num_guided_scales else 1
    passes = sampling_passes(*system, sequences)
    return {"flops": sum(one.flops for one in passes), "cache": cache_bytes(*system, sequences)}


# --- Speed


def measure_speed(models: dict[str, var_jax.LoadedVAR]) -> dict:
    """Time the sampling of each model at each batch size in turn: median seconds per image."""
    result: dict[str, dict] = {name: {} for name in models}
    for batch in BATCHES:
        programs = [compile_sampling(model, batch) for model in models.values()]
        times = np.array([[seconds(program) for program in programs] for _ in range(ROUNDS + 1)])[1:]
        for name, median in zip(models, np.median(times, axis=0), strict=True):
            result[name][f"seconds_{batch}"] = float(median / batch)
    return result


def compile_sampling(model: var_jax.LoadedVAR, batch: int):
    """Compile the program that draws a batch of images with the model's options."""
    per_scale = model.options.per_scale(model.module.config.schedule, model.tokenizer.num_codes)
    labels = jnp.arange(batch, dtype=jnp.int32) % model.num_classes
    inputs = (model.networks, labels, image_keys(0, jnp.arange(batch)), per_scale)
    compiled = generate.lower(*inputs).compile()
    return lambda: compiled(*inputs)


def load_systems(
    base: ConfigDict, systems: dict[str, tuple[str, int]], out: Path, seed: int
) -> dict[str, var_jax.LoadedVAR]:
    """Load systems of `list_systems` from their runs."""
    tokenizer = var_jax.load_tokenizer(base.tokenizer)
    return {name: load_system(out, tuning, n, seed, tokenizer) for name, (tuning, n) in systems.items()}


def compute_part(part: str, out: Path) -> dict:
    """Compute the figures of a part."""
    if part == "cost":
        return published_cost()
    base, seeds = prepared_stage(FLAGS.config, FLAGS.tokenizer, out), cli.numbers("seeds", int)
    num_maps, drafts = len(build_stage_task(base).config.scales), cli.numbers("drafts", int)
    if not drafts or min(drafts) < 1 or max(drafts) >= num_maps:
        raise app.UsageError(f"--drafts must be numbers of maps, 1 .. {num_maps - 1}; got {drafts}")
    if part == "speed":  # fine-tuned systems take as long
        systems = list_systems(num_maps, drafts, ["untuned"])
        return measure_speed(load_systems(base, systems, out, seeds[0]))
    systems = list_systems(num_maps, drafts, FLAGS.kinds)
    result = evaluate_systems(base, systems, seeds, FLAGS.steps, out, FLAGS.per_class)
    plot_samples({name: sample_folder(out, name, seeds[0]) for name in result}, out / "samples.png")
    return result


def main(_):
    for flag, known in (("parts", PARTS), ("kinds", KINDS)):
        if unknown := sorted(set(FLAGS[flag].value) - set(known)):
            raise app.UsageError(f"--{flag} must be among {', '.join(known)}; got {', '.join(unknown)}")
    if set(FLAGS.parts) - {"cost"} and not FLAGS.tokenizer:
        raise app.UsageError("--parts=quality and --parts=speed need --tokenizer, the directory of a run")
    out = cli.local_folder("out")
    out.mkdir(parents=True, exist_ok=True)
    for part in sorted(FLAGS.parts, key=PARTS.index):  # `speed` takes the runs of `quality`
        (out / f"{part}.json").write_text(json.dumps(compute_part(part, out), indent=1))
    results = {part: out / f"{part}.json" for part in PARTS}
    results = {part: json.loads(path.read_text()) for part, path in results.items() if path.exists()}
    (out / "collaborative.md").write_text(report.format_tables(results) + "\n")
    print((out / "collaborative.md").read_text())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/digits.py", "Config with a stage next_scale")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_string("tokenizer", None, "quality, speed: run whose tokenizer all models share")
    flags.DEFINE_list("parts", list(PARTS), "Which of cost, quality and speed to compute")
    flags.DEFINE_list("kinds", list(KINDS), "quality: kinds of pairs")
    flags.DEFINE_list("drafts", ["4", "3", "2", "1"], "quality, speed: numbers of drafted maps")
    flags.DEFINE_list("seeds", ["1", "2", "3"], "quality: seeds with which each run is trained")
    flags.DEFINE_integer("steps", 400, "quality: training steps from scratch", lower_bound=1)
    flags.DEFINE_integer("per_class", 100, "quality: samples of each class", lower_bound=2)
    cli.run(main)
