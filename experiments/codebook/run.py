"""Which remedy keeps a codebook alive?  Trains small tokenizers that differ in one switch, and compares.

    python -m experiments.codebook.run --out=runs/codebook
    python -m experiments.codebook.run --data=shapes --out=runs/codebook_shapes

The baseline is prone to collapse: the published losses, optimiser and uniform codes within C^-0.5 / 36, a
codebook that is large for the data, and nothing else.  Each remedy is added to it alone; the recipe is what
`configs/tokenizer.py` ships, with and without quantizer dropout.  Every run is a run of the training loop
(its logs and checkpoints lie under OUT/VARIANT/SEED), so that a call that was stopped goes on.  Writes
`codebook.md` (a table), `codebook.json` and `codebook.png` (use per scale over training).
"""

import json
from pathlib import Path

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from benchmarks.tables import markdown_table
from configs import digits, tokenizer
from var_jax import cli, stages
from var_jax.training.metrics import read_metrics

FLAGS = flags.FLAGS

# Switch by switch, as fields of a tokenizer's config.
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
# A part of the config that only these experiments change.
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
RECIPE_FIELDS = (
    "model.l2_normalized",
    "model.quantizer_dropout",
    "model.vq_gradient",
    "codebook.kmeans_steps",
)
RECIPE_FIELDS += ("codebook.ema_decay", "codebook.restart_every", "loss.entropy")


def variant_config(variant: str, data: str, data_dir: str, seed: int, steps: int) -> ConfigDict:
    """Config of one run: a network small enough for a CPU, with more codes than the baseline knows to use."""
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
    same = ("b1", "b2", "clip", "weight_decay", "weight_decay_end")
    config.train.update({name: published.train[name] for name in same})
    every = dict.fromkeys(("eval_every", "preview_every", "checkpoint_every"), steps)
    config.train.update(dict(steps=steps, log_every=20, **every))
    changes = BASELINE | VARIANTS.get(variant, {})
    if variant in RECIPE_VARIANTS:
        flat = published.to_dict()
        changes |= {name: flat[name.split(".")[0]][name.split(".")[1]] for name in RECIPE_FIELDS}
        changes["codebook.restart_every"] = 20  # runs are short
    if variant == "recipe_without_dropout":
        changes["model.quantizer_dropout"] = 0.0
    config.update_from_flattened_dict(changes)
    return config


def read_logs(out: Path, variants: list[str]) -> dict[str, list[list[dict]]]:
    """Logs of the runs that are done: variant -> one for each seed, each a list of lines."""
    result = {}
    for variant in variants:
        logs = [read_metrics(path) for path in sorted((out / variant).glob("*/tokenizer/metrics.jsonl"))]
        if logs := [log for log in logs if any(line["kind"] == "eval" for line in log)]:
            result[variant] = logs
    return result


def summarize(runs: dict[str, list[list[dict]]], codes: int, num_scales: int) -> dict[str, dict]:
    """Mean and standard deviation over the seeds of the last evaluation, for each variant."""
    result = {}
    for variant, logs in runs.items():
        last = [[line for line in log if line["kind"] == "eval"][-1] for log in logs]
        names = ["l2", "psnr", "perplexity", "distinct", *(f"perplexity_{k}" for k in range(num_scales))]
        values = {name: np.array([line[name] for line in last]) for name in names}
        values["used"] = values["distinct"] / codes
        spread = {name: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()}
        result[variant] = {name: [float(v.mean()), spread[name]] for name, v in values.items()}
        result[variant]["seeds"] = len(logs)
        result[variant]["most"] = [last[0][f"most_{k}"] for k in range(num_scales)]
    return result


def variants_table(result: dict[str, dict], sides: tuple[int, ...]) -> str:
    """Markdown, a variant a row."""
    most = next(iter(result.values()))["most"]
    heads = ["held-out PSNR, dB", "codes used"]
    heads += [f"{side}x{side} (most {n:.0f})" for side, n in zip(sides, most, strict=True)]
    rows = []
    names = [("psnr", ".2f"), ("used", ".0%"), *((f"perplexity_{k}", ".1f") for k in range(len(sides)))]
    for variant, values in result.items():
        parts = 1 if values["seeds"] == 1 else 2  # of one seed there is no deviation
        cells = [" ± ".join(format(x, form) for x in values[name][:parts]) for name, form in names]
        rows.append([f"{variant} ({values['seeds']})", *cells])
    return markdown_table(["(seeds)", *heads], rows)


def plot_perplexity(runs: dict[str, list[list[dict]]], sides: tuple[int, ...], path: Path) -> None:
    """Perplexity at each scale over the steps, mean over the seeds, a line a variant."""
    columns = (len(sides) + 1) // 2
    size = (4 * columns + 2, 6.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True)
    for k, axis in zip(range(len(sides)), axes.flat, strict=False):
        for variant, logs in runs.items():
            lines = [[line for line in log if line["kind"] == "train"] for log in logs]
            steps = [line["step"] for line in lines[0]]
            mean = np.mean([[line[f"perplexity_{k}"] for line in log] for log in lines], axis=0)
            width = 2.5 if variant in ("baseline", "recipe") else 1
            axis.plot(steps, mean, label=variant, linewidth=width)
        axis.set(title=f"map {k}: {sides[k]}x{sides[k]}", yscale="log", xlabel="step", ylabel="perplexity")
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper")
    for axis in axes.flat[len(sides) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)


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
    runs = read_logs(out, known)  # of earlier calls too
    result = summarize(runs, model.num_codes, len(model.scales))
    (out / "codebook.json").write_text(json.dumps(result, indent=1))
    (out / "codebook.md").write_text(variants_table(result, model.scales) + "\n")
    plot_perplexity(runs, model.scales, out / "codebook.png")
    print((out / "codebook.md").read_text() + f"\nperplexity over training: {out / 'codebook.png'}")


if __name__ == "__main__":
    flags.DEFINE_string("data", "digits", "Name of a prepared data set")
    flags.DEFINE_string("data_dir", "data", "Where data sets lie")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("variants", None, "Some of the variants")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Each variant is trained with each")
    flags.DEFINE_integer("steps", 400, "Of each run", lower_bound=20)
    cli.run(main)
