"""Align transformers, and compare their samples without guidance with guided ones of before.

    python -m experiments.alignment.run --config=configs/digits.py --out=runs/alignment

For each seed, trains the stages tokenizer and next_scale of the config under OUT/before/SEED, and aligns the
transformer by `configs/align.py:small_data` under OUT/aligned/SEED.  Every run uses the training loop, so an
interrupted call resumes.  Samples of before are scored for each strength of `--guidance`, samples of the
aligned transformer without guidance, all with the config's other sampling options, in features of a
classifier of the training images.

Writes `alignment.md` (tables), `alignment.json`, `alignment.png` (scores over guidance) and `samples.png`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

import var_jax
from configs import align
from experiments.alignment import report
from var_jax import cli, stages
from var_jax.data.loader import eval_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError
from var_jax.evaluation.extractors import (
    Extractor,
    classifier_extractor,
    extract_features,
    fit_classifier,
)
from var_jax.evaluation.scores import Reference, reference_of_data, score, score_halves
from var_jax.images import denormalize_to_uint8
from var_jax.training.metrics import read_metrics
from var_jax.transformer.flops import generation_flops

FLAGS = flags.FLAGS
BATCH = 100  # images sampled and scored at once


def train_pair(config: ConfigDict, seed: int, steps: int, out: Path) -> dict[str, Path]:
    """Train the stages of a config and align the result for a number of steps, if not done before.

    Returns:
      Directories of the runs `before` and `aligned`.
    """
    config = config.copy_and_resolve_references()
    for stage in stages.stages_of(config):
        stage.seed = seed
    runs = {name: out / name / str(seed) for name in ("before", "aligned")}
    stages.run(config, runs["before"])
    stage = align.small_data(config.next_scale)
    stage.init_from = stage.tokenizer = str(runs["before"].absolute())
    stage.train.steps = steps
    stages.run(stage, runs["aligned"])
    return runs


def prepare_scoring(stage: ConfigDict, size: int) -> tuple[Extractor, Reference]:
    """Return the features of a classifier of a stage's training images, and these images as the reference."""
    source = open_source(stage.data.name, stage.data.train_split, stage.data.dir)
    transform = ToPixels(source.name, size, stage.data.resize, False)
    classifier = fit_classifier(eval_batches(source, transform, BATCH), source.num_records, size)
    extractor = classifier_extractor(classifier)
    batches = eval_batches(source, transform, BATCH)
    return extractor, reference_of_data(batches, source.num_records, extractor)


def generate_samples(model: var_jax.LoadedVAR, guidance: float, seed: int, per_class: int) -> np.ndarray:
    """Generate images uint8 [N, H, W, 3], the classes in turn, with the run's options except guidance."""
    labels = np.tile(np.arange(model.num_classes), per_class)
    options = dataclasses.replace(model.options, guidance=guidance)
    batches = model.generate_batches(
        labels, seed, min(BATCH, len(labels)), options, postprocess=denormalize_to_uint8
    )
    return np.concatenate([images for images, _ in batches])


def sampling_cost(model: var_jax.LoadedVAR, guidance: float) -> int:
    """Return the FLOPs of an image without the decoder."""
    options = dataclasses.replace(model.options, guidance=guidance)
    per_scale = options.per_scale(model.module.config.schedule, model.tokenizer.num_codes)
    return generation_flops(model.module.config, per_scale.num_guided_scales)


def compare_seed(
    config: ConfigDict, seed: int, steps: int, strengths: list[float], out: Path, per_class: int
) -> tuple[dict, dict[str, np.ndarray]]:
    """Train and align with one seed, and score the samples.

    Args:
      config: with the stages tokenizer and next_scale.
      seed: of the runs and of the samples.
      steps: of the alignment.
      strengths: of guidance before alignment.
      out: directory of the runs.
      per_class: number of samples of each class.

    Returns:
      Scores by system, with cost; and its images.

    Raises:
      ConfigError: on a config without these stages.
    """
    if "stages" not in config or not {"tokenizer", "next_scale"} <= set(config.stages):
        raise ConfigError("--config must have the stages tokenizer and next_scale, as configs/digits.py has")
    runs = train_pair(config, seed, steps, out)
    tokenizer = var_jax.load_tokenizer(runs["before"])
    models = {name: var_jax.load_var(run, tokenizer=tokenizer) for name, run in runs.items()}
    extractor, reference = prepare_scoring(config.next_scale, tokenizer.image_size)
    points = [("before", strength) for strength in strengths] + [("aligned", 0.0)]
    rows, images = {report.REAL: score_halves(reference)}, {}
    for name, strength in points:
        system = report.system_name(name, strength)
        images[system] = generate_samples(models[name], strength, seed, per_class)
        labels = np.tile(np.arange(models[name].num_classes), per_class)
        features = extract_features(extractor, images[system], BATCH, system)
        rows[system] = score(features, reference, labels)
        rows[system]["sampling_flops"] = sampling_cost(models[name], strength)
    for name, run in runs.items():
        lines = read_metrics(run / "next_scale" / "metrics.jsonl")
        (loss,) = [line["loss"] for line in lines if line["kind"] == "eval"][-1:]
        rows[report.system_name(name, 0.0)]["held_out_loss"] = loss
    return rows, images


def main(_):
    strengths, seeds = cli.numbers("guidance", float), cli.numbers("seeds", int)
    if 0.0 not in strengths:
        raise app.UsageError("--guidance must contain 0, the transformer of before without guidance")
    out, result, images = cli.local_folder("out"), {}, {}
    for seed in seeds:
        print(f"--- seed {seed}", flush=True)
        result[str(seed)], images[seed] = compare_seed(
            FLAGS.config, seed, FLAGS.steps, strengths, out, FLAGS.per_class
        )
    table = report.format_table(result)
    (out / "alignment.json").write_text(json.dumps(result, indent=1))
    (out / "alignment.md").write_text(table + "\n")
    report.plot_scores(result, strengths, out / "alignment.png")
    report.plot_samples(images[seeds[0]], report.best_guidance(result, strengths), out / "samples.png")
    print(f"{table}\n{out}: alignment.md, alignment.json, alignment.png, samples.png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Config with the stages tokenizer and next_scale")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training and sampling")
    flags.DEFINE_list("guidance", ["0", "0.5", "1", "2", "3"], "Strengths of guidance before alignment")
    flags.DEFINE_integer("steps", 90, "Steps of the alignment", lower_bound=1)
    flags.DEFINE_integer("per_class", 100, "Samples of each class", lower_bound=2)
    flags.mark_flag_as_required("config")
    cli.run(main)
