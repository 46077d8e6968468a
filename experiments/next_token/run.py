"""Compare VAR with next-token systems on the same blocks and training loop, at equal training FLOPs.

    python -m experiments.next_token.run --config=configs/digits.py --out=runs/compare

Systems: next-token along a raster, a spiral and a Z-curve, with learned 1-D and rotary 2-D positions; along a
raster with axial masks; VAR with learned 1-D and rotary 2-D positions.  VAR uses the config's own tokenizer.
The others use the same networks trained with a single map of the finest side and as many codes, which has
fewer tokens.  Depth, width, optimizer, batch and learning rate are the config's, which were chosen for VAR.
Every system is trained for the FLOPs of `--steps` steps of VAR, so systems with fewer tokens see each image
more often.  Seeds are of the transformers; each tokenizer is trained once.  Every run uses the training loop
under OUT/SYSTEM/SEED, so an interrupted call resumes.

Writes `compare.md` (tables), `compare.json`, `compare.png` (held-out loss over training) and `samples.png`.
Held-out losses of systems with different tokenizers cannot be compared.  Small data sets are overfitted, so
the tables have both the lowest and the last loss; samples are from the end of training.
"""

import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import var_jax
from configs import next_token
from experiments.next_token import report
from experiments.setup_tokens import prepare_tokens
from var_jax import cli, stages
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError
from var_jax.evaluation.classifier import SampleJudge
from var_jax.images import denormalize_to_uint8, to_uint8
from var_jax.training.metrics import read_metrics
from var_jax.training.state import count_parameters
from var_jax.training.transformer_task import NextTokenTask, TransformerTask
from var_jax.transformer.flops import generation_flops
from var_jax.transformer.orders import ORDERS

FLAGS = flags.FLAGS
TOKENIZER_FOLDERS = {"next_scale": "maps", "next_token": "map"}  # stage -> directory of its tokenizer
NUM_EVALUATIONS = 8  # of each run, at equal intervals
SAMPLING_BATCH = 100  # images

# System -> fields of its model; a system without `order` is VAR.
SYSTEMS = {
    **{
        f"{order}, {positions}": {"order": order, "positions": positions}
        for order in ("raster", "spiral_in", "z_curve")
        for positions in ("learned_1d", "rotary_2d")
    },
    "raster, learned_1d, axial": {"order": "raster", "positions": "learned_1d", "mask": "axial"},
    **{f"VAR, {positions}": {"positions": positions} for positions in ("learned_1d", "rotary_2d")},
}
# Systems that can be trained: also next-token along every order.
TRAINABLE = SYSTEMS | {f"{o}, learned_1d": {"order": o, "positions": "learned_1d"} for o in ORDERS}


def system_folder(system: str) -> str:
    """Return the name of a system's directory."""
    return system.replace(", ", "-")


def select_systems(folders: list[str] | None, known: Iterable[str]) -> list[str]:
    """Return the systems whose directories --systems names; all known systems if it is empty.

    Raises:
      UsageError: on an unknown system.
    """
    systems = {system_folder(system): system for system in known}
    if unknown := sorted(set(folders or ()) - set(systems)):
        raise app.UsageError(f"--systems must be among {', '.join(systems)}; got {', '.join(unknown)}")
    return [systems[name] for name in folders or systems]


def prepare_bases(config: ConfigDict, out: Path) -> dict[str, ConfigDict]:
    """Return the base stages `next_scale` and `next_token`, of which all systems are variants.

    Their tokenizers are trained and their data is encoded under OUT/tokenizers, if not done before.

    Raises:
      ConfigError: on a config without the stages tokenizer and next_scale.
    """
    if "stages" not in config or not {"tokenizer", "next_scale"} <= set(config.stages):
        raise ConfigError("--config must have the stages tokenizer and next_scale, as configs/digits.py has")
    flat = next_token.flattened(config)
    bases = {"next_scale": config.next_scale, "next_token": flat.next_token}
    for task, tokenizer_stage in (("next_scale", config.tokenizer), ("next_token", flat.tokenizer)):
        prepare_tokens(bases[task], tokenizer_stage, out / "tokenizers" / TOKENIZER_FOLDERS[task])
    return bases


def build_stage_task(stage: ConfigDict) -> TransformerTask:
    """Build the task of a prepared stage."""
    return stages.build_task(stage, Path(stage.tokenizer), stages.open_sources(stage)[0])[0]


def system_config(bases: dict[str, ConfigDict], system: str, seed: int, budget: float) -> ConfigDict:
    """Make the config of one run.

    Args:
      bases: from `prepare_bases`.
      system: of `TRAINABLE`.
      seed: of the run.
      budget: training FLOPs per image of a batch.
    """
    fields = TRAINABLE[system]
    stage = bases["next_token" if "order" in fields else "next_scale"].copy_and_resolve_references()
    stage.model.update(fields)
    stage.seed = seed
    steps = max(round(budget / build_stage_task(stage).flops_per_image()), 1)
    stage.train.update(dict(steps=steps, eval_every=-(-steps // NUM_EVALUATIONS), preview_every=0))
    stage.train.update(dict(checkpoint_every=max(steps // 2, 1), log_every=max(steps // 20, 1)))
    return stage


def load_images(stage: ConfigDict, size: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the center crops uint8 [N, size, size, 3] and labels int [N] of a split."""
    source = open_source(stage.data.name, split, stage.data.dir)
    transform = ToPixels(source.name, size, stage.data.resize, False)
    records = [transform(source[i]) for i in range(source.num_records)]
    return np.stack([record["image"] for record in records]), np.array([int(r["label"]) for r in records])


def generate_samples(workdir: Path, stage: ConfigDict, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Generate images of labels [N] with a trained run; read the run's samples.npz if it has these labels.

    Returns:
      Images uint8 [N, H, W, 3], and seconds per image without compilation.
    """
    path = workdir / "samples.npz"
    batch = min(SAMPLING_BATCH, len(labels))
    if path.exists():
        with np.load(path) as saved:
            if np.array_equal(saved["arr_1"], labels):
                return saved["arr_0"], float(saved["seconds"])
    model = var_jax.load_var(workdir, tokenizer=var_jax.load_tokenizer(stage.tokenizer))
    generate = partial(
        model.generate_batches, seed=stage.seed, options=model.options, postprocess=denormalize_to_uint8
    )
    list(generate(labels[:batch], batch=batch))  # compile
    start = time.perf_counter()
    images = np.concatenate([images for images, _ in generate(labels, batch=batch)])
    num_generated = -(-len(labels) // batch) * batch  # the last batch is padded
    seconds = (time.perf_counter() - start) / num_generated
    partial_path = path.with_suffix(".partial")
    with open(partial_path, "wb") as file:
        np.savez_compressed(file, arr_0=images, arr_1=labels, seconds=seconds)
    partial_path.replace(path)
    return images, seconds


def evaluate_samples(workdir: Path, stage: ConfigDict, judge: SampleJudge, per_class: int) -> dict:
    """Compute all figures of a trained run.

    Args:
      workdir: directory of the run.
      stage: config of the run.
      judge: of the samples.
      per_class: number of samples of each class.
    """
    task = build_stage_task(stage)
    labels = np.repeat(np.arange(task.config.num_classes), per_class)
    images, seconds = generate_samples(workdir, stage, labels)
    log = read_metrics(workdir / stage.task / "metrics.jsonl")
    evaluations = [[line["step"], line["bits_per_pixel"]] for line in log if line["kind"] == "eval"]
    num_guided = task.options.per_scale(task.config.schedule, task.config.num_codes).num_guided_scales
    if num_guided and isinstance(task, NextTokenTask):  # its only scale is guided, so every token is
        num_guided = len(task.config.steps)
    return {
        "steps": stage.train.steps,
        "parameters": count_parameters(jax.eval_shape(task.init, jax.random.key(0))[0]),
        "training_flops": task.flops_per_image() * stage.train.batch * stage.train.steps,
        "evaluations": evaluations,
        "bits_per_pixel": min(bits for _, bits in evaluations),
        "last_bits_per_pixel": evaluations[-1][1],
        **judge.figures(images, labels),
        "sampling_steps": len(task.config.steps),
        "sampling_seconds": seconds,
        "sampling_flops": generation_flops(task.config, num_guided),
    }


def evaluate_reconstructions(stage: ConfigDict, judge: SampleJudge) -> dict:
    """Compute the figures of a stage's tokenizer on held-out images, the upper limit of systems on it."""
    tokenizer = var_jax.load_tokenizer(stage.tokenizer)
    reconstructions = tokenizer.decode(tokenizer.encode(judge.held_out.astype(np.float32) / 255))
    error = np.maximum(((reconstructions - judge.held_out / 255) ** 2).mean((1, 2, 3)), 1e-10)
    figures = judge.figures(to_uint8(reconstructions), judge.held_out_labels)
    return {
        "tokens": build_stage_task(stage).config.length,
        "psnr": float((-10 * np.log10(error)).mean()),
        **figures,
    }


def main(_):
    systems, seeds = select_systems(FLAGS.systems, SYSTEMS), cli.numbers("seeds", int)
    out = cli.local_folder("out")
    result = compare_systems(
        prepare_bases(FLAGS.config, out), systems, seeds, out, FLAGS.steps, FLAGS.per_class
    )
    (out / "compare.json").write_text(json.dumps(result, indent=1))
    (out / "compare.md").write_text(report.format_comparison(result) + "\n")
    report.plot_losses(result["systems"], out / "compare.png")
    first = {name: out / system_folder(name) / str(seeds[0]) for name in systems}
    report.plot_samples(first, out / "samples.png")
    print((out / "compare.md").read_text() + f"\nheld-out loss: {out / 'compare.png'}, {out / 'samples.png'}")


def compare_systems(
    bases: dict[str, ConfigDict], systems: list[str], seeds: list[int], out: Path, steps: int, per_class: int
) -> dict:
    """Train missing runs; return the figures of each tokenizer, and of each system and seed.

    Args:
      bases: from `prepare_bases`.
      systems: some of `TRAINABLE`.
      seeds: one run of each system per seed.
      out: directory of the runs.
      steps: training steps of VAR; the others train for the same FLOPs.
      per_class: number of samples of each class with which a run is evaluated.
    """
    base = bases["next_scale"]
    task = build_stage_task(base)
    budget = steps * task.flops_per_image()
    splits = (base.data.train_split, base.data.eval_split)
    judge = SampleJudge(*(load_images(base, task.image_size, split) for split in splits))
    result = {
        "held_out": judge.figures(judge.held_out, judge.held_out_labels),
        "tokenizers": {
            TOKENIZER_FOLDERS[name]: evaluate_reconstructions(stage, judge) for name, stage in bases.items()
        },
        "systems": {system: {} for system in systems},
    }
    runs = [(system, seed) for seed in seeds for system in systems]
    for i, (system, seed) in enumerate(runs):
        print(f"--- {system}, seed {seed} ({i + 1} of {len(runs)})", flush=True)
        stage, workdir = system_config(bases, system, seed, budget), out / system_folder(system) / str(seed)
        stages.run(stage, workdir)
        figures = evaluate_samples(workdir, stage, judge, per_class)
        result["systems"][system][str(seed)] = figures
        print(report.format_run(system, figures), flush=True)
    return result


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Config with the stages tokenizer and next_scale")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("systems", None, "Systems by their directories' names; default: all")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds with which each system is trained")
    flags.DEFINE_integer(
        "steps", 400, "Training steps of VAR; the others train for the same FLOPs", lower_bound=1
    )
    flags.DEFINE_integer(
        "per_class", 100, "Samples of each class with which a run is evaluated", lower_bound=2
    )
    flags.mark_flag_as_required("config")
    cli.run(main)
