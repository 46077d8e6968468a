"""The case for next-scale prediction, run: VAR against next-token systems on the same blocks and loop.

    python -m experiments.next_token.run --config=configs/digits.py --out=runs/compare

Systems: next-token along a raster, a spiral and a Z-curve, with learned 1-D and rotary 2-D positions; along a
raster with axial masks; VAR with learned and rotary 2-D positions.  VAR stands on the config's own tokenizer,
the others on the same networks trained with one map of its finest side, and as many codes: fewer tokens, that
lose more.  Depth, width, optimiser, batch and learning rate are the config's, which were chosen for VAR;
every system is trained for as many steps as cost the FLOPs of `--steps` steps of VAR, so that one with fewer
tokens sees each image more often.  Seeds are of the transformers; each tokenizer is trained once.  Every run
is a run of the training loop, under OUT/SYSTEM/SEED, so that a call that was stopped goes on.

Writes `compare.md` (tables), `compare.json`, `compare.png` (held-out loss over training) and `samples.png`.
Held-out loss is of the tokens of two tokenizers: compare it within one.  Small data is learned by heart
sooner or later: the loss given is the least on the way, beside the last; samples are of the end.
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
from var_jax.transformer.positions import ORDERS

FLAGS = flags.FLAGS
TOKENIZER_FOLDERS = {"next_scale": "maps", "next_token": "map"}  # directory of the tokenizer of each task
NUM_EVALUATIONS = 8  # of each run, at equal distances
SAMPLING_BATCH = 100  # images made at once to time sampling

# System -> fields of its model; VAR where there is no order.  These are compared here,
SYSTEMS = {
    **{
        f"{order}, {positions}": {"order": order, "positions": positions}
        for order in ("raster", "spiral_in", "z_curve")
        for positions in ("learned_1d", "rotary_2d")
    },
    "raster, learned_1d, axial": {"order": "raster", "positions": "learned_1d", "mask": "axial"},
    **{f"VAR, {positions}": {"positions": positions} for positions in ("learned_1d", "rotary_2d")},
}
# and these can be trained: along every order, too.
TRAINABLE = SYSTEMS | {f"{o}, learned_1d": {"order": o, "positions": "learned_1d"} for o in ORDERS}


def system_folder(system: str) -> str:
    """Name of a system's directory."""
    return system.replace(", ", "-")


def select_systems(folders: list[str] | None, known: Iterable[str]) -> list[str]:
    """The systems that --systems names by their directories; all that are known where it names none.

    Raises:
      UsageError: on one that is not known.
    """
    systems = {system_folder(system): system for system in known}
    if unknown := sorted(set(folders or ()) - set(systems)):
        raise app.UsageError(f"--systems must be among {', '.join(systems)}; got {', '.join(unknown)}")
    return [systems[name] for name in folders or systems]


def prepare_bases(config: ConfigDict, out: Path) -> dict[str, ConfigDict]:
    """The stages that all systems are variants of, next_scale and next_token, each by its name.

    Their tokenizers are trained and their data is encoded, under OUT/tokenizers; what is there is taken.

    Raises:
      ConfigError: on a config without the stages tokenizer and next_scale.
    """
    if "stages" not in config or not {"tokenizer", "next_scale"} <= set(config.stages):
        raise ConfigError("--config must have the stages tokenizer and next_scale, as configs/digits.py has")
    flat = next_token.flattened(config)
    bases = {"next_scale": config.next_scale, "next_token": flat.next_token}
    for task, trains in (("next_scale", config.tokenizer), ("next_token", flat.tokenizer)):
        prepare_tokens(bases[task], trains, out / "tokenizers" / TOKENIZER_FOLDERS[task])
    return bases


def make_task(stage: ConfigDict) -> TransformerTask:
    """The task of a prepared stage."""
    return stages.build_task(stage, Path(stage.tokenizer), stages.open_sources(stage)[0])[0]


def system_config(bases: dict[str, ConfigDict], system: str, seed: int, budget: float) -> ConfigDict:
    """Config of one run: a system, trained for so many FLOPs an image of a batch."""
    fields = TRAINABLE[system]
    stage = bases["next_token" if "order" in fields else "next_scale"].copy_and_resolve_references()
    stage.model.update(fields)
    stage.seed = seed
    steps = max(round(budget / make_task(stage).flops_per_image()), 1)
    stage.train.update(dict(steps=steps, eval_every=-(-steps // NUM_EVALUATIONS), preview_every=0))
    stage.train.update(dict(checkpoint_every=max(steps // 2, 1), log_every=max(steps // 20, 1)))
    return stage


def load_images(stage: ConfigDict, size: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, size, size, 3] and labels int [N] of a split, cut out at the centre."""
    source = open_source(stage.data.name, split, stage.data.dir)
    transform = ToPixels(source.name, size, stage.data.resize, False)
    records = [transform(source[i]) for i in range(source.num_records)]
    return np.stack([record["image"] for record in records]), np.array([int(r["label"]) for r in records])


def generate_samples(workdir: Path, stage: ConfigDict, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Images uint8 [N, H, W, 3] of labels [N] by a trained run, and seconds an image, without compilation.

    They are left in the run's samples.npz, and taken from there where it holds as many.
    """
    path, batch = workdir / "samples.npz", min(SAMPLING_BATCH, len(labels))
    if path.exists():
        with np.load(path) as saved:
            if np.array_equal(saved["arr_1"], labels):
                return saved["arr_0"], float(saved["seconds"])
    model = var_jax.load_var(workdir, tokenizer=var_jax.load_tokenizer(stage.tokenizer))
    make = partial(
        model.generate_batches, seed=stage.seed, options=model.options, postprocess=denormalize_to_uint8
    )
    list(make(labels[:batch], batch=batch))  # compiles
    start = time.perf_counter()
    images = np.concatenate([images for images, _ in make(labels, batch=batch)])
    made = -(-len(labels) // batch) * batch  # the last batch is filled up
    seconds = (time.perf_counter() - start) / made
    partial_path = path.with_suffix(".partial")
    with open(partial_path, "wb") as file:
        np.savez_compressed(file, arr_0=images, arr_1=labels, seconds=seconds)
    partial_path.replace(path)
    return images, seconds


def evaluate_samples(workdir: Path, stage: ConfigDict, jury: SampleJudge, per_class: int) -> dict:
    """All figures of a trained run.

    Args:
      per_class: samples of each class.
    """
    task = make_task(stage)
    labels = np.repeat(np.arange(task.config.num_classes), per_class)
    images, seconds = generate_samples(workdir, stage, labels)
    log = read_metrics(workdir / stage.task / "metrics.jsonl")
    evaluations = [[line["step"], line["bits_per_pixel"]] for line in log if line["kind"] == "eval"]
    guided = task.options.controls(task.config.schedule, task.config.num_codes).guided
    if guided and isinstance(task, NextTokenTask):  # its only scale is, so every token is
        guided = len(task.config.steps)
    return {
        "steps": stage.train.steps,
        "parameters": count_parameters(jax.eval_shape(task.init, jax.random.key(0))[0]),
        "training_flops": task.flops_per_image() * stage.train.batch * stage.train.steps,
        "evaluations": evaluations,
        "bits_per_pixel": min(bits for _, bits in evaluations),
        "last_bits_per_pixel": evaluations[-1][1],
        **jury.figures(images, labels),
        "sampling_steps": len(task.config.steps),
        "sampling_seconds": seconds,
        "sampling_flops": generation_flops(task.config, guided),
    }


def evaluate_reconstructions(stage: ConfigDict, jury: SampleJudge) -> dict:
    """What becomes of held-out images in the tokenizer of a stage: the most that a system on it can reach."""
    tokenizer = var_jax.load_tokenizer(stage.tokenizer)
    again = tokenizer.decode(tokenizer.encode(jury.held_out.astype(np.float32) / 255))
    error = np.maximum(((again - jury.held_out / 255) ** 2).mean((1, 2, 3)), 1e-10)
    figures = jury.figures(to_uint8(again), jury.held_out_labels)
    return {
        "tokens": make_task(stage).config.length,
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
    """Trains what is not trained yet, and judges it: figures of each tokenizer, and each system and seed.

    Args:
      bases: as `bases_of` gives them.
      systems: some of `TRAINABLE`.
      seeds: each system's runs.
      out: directory of the runs.
      steps: of VAR; the others take as many as cost the same.
      per_class: samples of each class, to judge a run by.
    """
    base = bases["next_scale"]
    task = make_task(base)
    budget = steps * task.flops_per_image()
    splits = (base.data.train_split, base.data.eval_split)
    jury = SampleJudge(*(load_images(base, task.image_size, split) for split in splits))
    result = {
        "held_out": jury.figures(jury.held_out, jury.held_out_labels),
        "tokenizers": {
            TOKENIZER_FOLDERS[name]: evaluate_reconstructions(stage, jury) for name, stage in bases.items()
        },
        "systems": {system: {} for system in systems},
    }
    runs = [(system, seed) for seed in seeds for system in systems]
    for i, (system, seed) in enumerate(runs):
        print(f"--- {system}, seed {seed} ({i + 1} of {len(runs)})", flush=True)
        stage, workdir = system_config(bases, system, seed, budget), out / system_folder(system) / str(seed)
        stages.run(stage, workdir)
        judged = evaluate_samples(workdir, stage, jury, per_class)
        result["systems"][system][str(seed)] = judged
        print(report.format_run(system, judged), flush=True)
    return result


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="With the stages tokenizer and next_scale")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("systems", None, "Some of the systems, by their directories' names")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Each system is trained with each")
    flags.DEFINE_integer("steps", 400, "Of VAR; the others take as many as cost the same", lower_bound=1)
    flags.DEFINE_integer("per_class", 100, "Samples of each class, to judge a run by", lower_bound=2)
    flags.mark_flag_as_required("config")
    cli.run(main)
