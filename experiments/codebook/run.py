"""Train small tokenizers that differ in one remedy against codebook collapse, and compare them.

    python -m experiments.codebook.run --out=runs/codebook
    python -m experiments.codebook.run --data=shapes --out=runs/codebook_shapes

The baseline is prone to collapse: published losses and optimizer, codes initialized uniformly within
C^-0.5 / 36, and a codebook that is large for the data.  Each remedy is added to it alone; the recipe is that
of `configs/tokenizer.py`, with and without quantizer dropout.  Every run uses the training loop under
OUT/VARIANT/SEED, so an interrupted call resumes.  Writes `codebook.md` (a table), `codebook.json` and
`codebook.png` (perplexity of each map over training).
"""

import json
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from configs import digits, tokenizer
from experiments.codebook import report
from var_jax import cli, stages
from var_jax.training.metrics import read_metrics

FLAGS = flags.FLAGS

# Variant -> fields of a tokenizer's config that differ from the baseline.
VARIANTS = {
    "baseline": {},
    "l2_normalized": {"model.l2_normalized": True},
    "kmeans": {"codebook.kmeans_steps": 10},
    "restart": {"codebook.restart_every": 20},
    "ema": {"codebook.ema_decay": 0.99},
    "quantizer_dropout": {"model.quantizer_dropout": 0.1},
    "rotation": {"model.vq_gradient": "rotation"},
    "entropy": {"loss.entropy": 0.1},
}
# Fields that the variants change, without any remedy.
BASELINE = {
    "model.l2_normalized": False,
    "model.quantizer_dropout": 0.0,
    "model.vq_gradient": "straight_through",
    "codebook.kmeans_steps": 0,
    "codebook.ema_decay": 0.0,
    "codebook.restart_every": 0,
    "loss.entropy": 0.0,
    "loss.perceptual": 0.0,
    "adversarial.weight": 0.0,
}
RECIPE_VARIANTS = ("recipe", "recipe_without_dropout")
RECIPE_FIELDS = ("model.l2_normalized", "model.quantizer_dropout", "model.vq_gradient", "loss.entropy")
RECIPE_FIELDS += ("codebook.kmeans_steps", "codebook.ema_decay", "codebook.restart_every")


def variant_config(variant: str, data: str, data_dir: str, seed: int, steps: int) -> ConfigDict:
    """Make the config of one run: a network for a CPU, with more codes than the baseline uses."""
    config, published = digits.get_config().tokenizer, tokenizer.get_config()
    config.seed = seed
    config.data.update(dict(name=data, dir=data_dir, shift=0))
    if data == "digits":
        config.model.update(dict(scales=(1, 2, 3, 4)))
        config.train.update(dict(batch=64, base_learning_rate=2e-3))
    else:  # 32 pixels
        config.model.update(dict(scales=(1, 2, 3, 4, 6, 8), ch=16, ch_mult=(1, 2, 2)))
        config.train.update(dict(batch=32, base_learning_rate=4e-3))
    config.model.update(dict(num_codes=512, code_dim=32))
    config.loss.update(dict(l2=1.0, l1=0.2, codebook=1.0))
    config.codebook.update(dict(hits_decay=0.95, restart_until_fraction=0.8, window=4000))
    same = ("b1", "b2", "grad_clip_norm", "weight_decay", "weight_decay_end")
    config.train.update({name: published.train[name] for name in same})
    every = dict.fromkeys(("eval_every", "preview_every", "checkpoint_every"), steps)
    config.train.update(dict(steps=steps, log_every=20, **every))
    changes = BASELINE | VARIANTS.get(variant, {})
    if variant in RECIPE_VARIANTS:
        flat = published.to_dict()
        changes |= {name: flat[name.split(".")[0]][name.split(".")[1]] for name in RECIPE_FIELDS}
        changes["codebook.restart_every"] = 20  # more often than published, since runs are short
    if variant == "recipe_without_dropout":
        changes["model.quantizer_dropout"] = 0.0
    config.update_from_flattened_dict(changes)
    return config


def read_logs(out: Path, variants: list[str]) -> dict[str, list[list[dict]]]:
    """Read the logs of finished runs: variant -> one log per seed, each a list of lines."""
    runs = {}
    for variant in variants:
        logs = [read_metrics(path) for path in sorted((out / variant).glob("*/tokenizer/metrics.jsonl"))]
        if logs := [log for log in logs if any(line["kind"] == "eval" for line in log)]:
            runs[variant] = logs
    return runs


def main(_):
    known = [*VARIANTS, *RECIPE_VARIANTS]
    variants = FLAGS.variants or known
    if unknown := sorted(set(variants) - set(known)):
        raise app.UsageError(f"--variants must be among {', '.join(known)}; got {', '.join(unknown)}")
    seeds, out = cli.numbers("seeds", int), cli.local_folder("out")
    for seed in seeds:
        for variant in variants:
            print(f"--- {variant}, seed {seed}", flush=True)
            config = variant_config(variant, FLAGS.data, FLAGS.data_dir, seed, FLAGS.steps)
            stages.run(config, out / variant / str(seed))
    model = variant_config(variants[0], FLAGS.data, FLAGS.data_dir, seeds[0], FLAGS.steps).model
    runs = read_logs(out, known)  # also of earlier calls
    result = report.summarize(runs, model.num_codes, len(model.scales))
    (out / "codebook.json").write_text(json.dumps(result, indent=1))
    (out / "codebook.md").write_text(report.variants_table(result, model.scales) + "\n")
    report.plot_perplexity(runs, model.scales, out / "codebook.png")
    print((out / "codebook.md").read_text() + f"\nperplexity over training: {out / 'codebook.png'}")


if __name__ == "__main__":
    flags.DEFINE_string("data", "digits", "Name of a prepared data set")
    flags.DEFINE_string("data_dir", "data", "Directory of data sets")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("variants", None, "Variants to train; default: all")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds with which each variant is trained")
    flags.DEFINE_integer("steps", 400, "Training steps of each run", lower_bound=20)
    cli.run(main)
