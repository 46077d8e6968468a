"""Train transformers with and without self-correction on one tokenizer of the digits, and compare them.

    python -m experiments.self_correction.run --out=runs/self_correction --tokenizer=runs/digits

Variants differ in `config.correction` alone: no replaced tokens, replacements drawn uniformly from all codes,
and replacements drawn from the transformer's own predictions.  Every run uses the training loop under
OUT/VARIANT/SEED, so an interrupted call resumes; figures of finished runs are read from OUT/figures.json.
Writes `self_correction.md` (tables), `figures.json` and `samples.png` (samples of the first seed).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

import var_jax
from configs import digits
from experiments.self_correction import report
from var_jax import cli, stages
from var_jax.data.loader import eval_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.evaluation.extractors import classifier_extractor, extract_features, fit_classifier
from var_jax.evaluation.scores import reference_of_data, score
from var_jax.images import denormalize_to_uint8, normalize
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.tools.judge_digits import evaluate_samples
from var_jax.training.self_correction import draw_replaced, requantize

FLAGS = flags.FLAGS
STRENGTH = 0.3  # as in the paper
BATCH = 100  # images

# Variant -> section `correction` of its config.
VARIANTS = {
    "none": {"strength": 0.0},
    "uniform": {"strength": STRENGTH},
    "model": {"strength": STRENGTH, "source": "model"},
}


def variant_config(variant: str, tokenizer: str, data_dir: str, seed: int, steps: int) -> ConfigDict:
    """Make the config of one run: that of `configs/digits.py` with another `correction`, seed and length."""
    stage = digits.get_config().next_scale
    stage.correction.update(VARIANTS[variant])
    stage.seed, stage.tokenizer, stage.data.dir = seed, tokenizer, data_dir
    every = dict(eval_every=steps, checkpoint_every=max(steps // 4, 1), preview_every=0)
    stage.train.update(dict(steps=steps, **every))
    return stage


def train_tokenizer(data_dir: str, out: Path) -> str:
    """Train the tokenizer of `configs/digits.py` under OUT/tokenizer, if not done; return its run."""
    stage = digits.get_config().tokenizer
    stage.data.dir = data_dir
    stages.run(stage, out / "tokenizer")
    return str((out / "tokenizer").absolute())


def draw_replacements(quantizer: Quantizer, batch: int, strength: float) -> tuple[jax.Array, jax.Array]:
    """Draw which tokens [B, L] are replaced, and by which codes, always the same."""
    mask_key, code_key = jax.random.split(jax.random.key(0))
    is_replaced = draw_replaced(mask_key, batch, quantizer.scales, strength)
    return is_replaced, jax.random.randint(code_key, is_replaced.shape, 0, len(quantizer.codes))


def repair_errors(quantizer: Quantizer, features: jax.Array) -> dict[str, list[float]]:
    """Compute the mean squared error of f_hat to features after each map, with and without replacements."""
    clean = quantizer.tokenize(features)
    is_replaced, replacements = draw_replacements(quantizer, len(features), STRENGTH)
    _, requantized = requantize(quantizer, features, is_replaced, replacements)
    sums = {
        "nothing replaced": quantizer.partial_sums(clean),
        "replaced, later maps requantized": requantized,
        "replaced, later maps as they were": quantizer.partial_sums(
            jnp.where(is_replaced, replacements, clean)
        ),
    }
    return {
        name: [float(jnp.mean((f_hat - features) ** 2)) for f_hat in partial]
        for name, partial in sums.items()
    }


class Evaluator:
    """Metrics of trained runs, on one tokenizer.

    Args:
      tokenizer: run or file of the tokenizer.
      data_dir: directory of data sets.

    Attributes:
      tokenizer: the tokenizer.
      quantizer: its quantizer.
      features: of the held-out images.
    """

    def __init__(self, tokenizer: str, data_dir: str):
        self.tokenizer = var_jax.load_tokenizer(tokenizer)
        transform = ToPixels("digits", self.tokenizer.image_size, 1.0, False)
        train, held_out = (open_source("digits", split, data_dir) for split in ("train", "test"))
        batches = lambda: eval_batches(train, transform, BATCH)
        classifier = fit_classifier(batches(), train.num_records, self.tokenizer.image_size)
        self._extractor = classifier_extractor(classifier)
        self._reference = reference_of_data(batches(), train.num_records, self._extractor)
        records = [transform(held_out[i]) for i in range(held_out.num_records)]
        self._labels = np.array([int(record["label"]) for record in records])
        module, params = self.tokenizer.module, self.tokenizer.params
        images = normalize(jnp.stack([record["image"] for record in records]))
        self.features = module.apply({"params": params}, images, method="features")
        self.quantizer = Quantizer.create(params["quantizer"], module.config)

    def figures(self, workdir: Path, seed: int, per_class: int) -> dict[str, float]:
        """Compute losses on held-out images and metrics of samples; write the samples to `samples.npz`."""
        model = var_jax.load_var(workdir, tokenizer=self.tokenizer)
        labels = np.repeat(np.arange(model.num_classes), per_class)
        batches = model.generate_batches(labels, seed, BATCH, model.options, postprocess=denormalize_to_uint8)
        images = np.concatenate([images for images, _ in batches])
        np.savez(workdir / "samples.npz", arr_0=images, arr_1=labels)
        scores = score(extract_features(self._extractor, images, BATCH, "samples"), self._reference, labels)
        judged = evaluate_samples(images, labels)
        losses = {
            name: self.held_out_loss(model, strength)
            for name, strength in (("loss", 0.0), ("loss_replaced", STRENGTH))
        }
        names = {name: scores[name] for name in ("fid", "precision", "recall")}
        return losses | names | {name: judged[name] for name in ("called_right", "spread", "nearest")}

    def held_out_loss(self, model: var_jax.LoadedVAR, strength: float) -> float:
        """Compute the mean loss per token on held-out images, with some tokens replaced by any code.

        All models see the same replacements.
        """
        drawn = draw_replacements(self.quantizer, len(self.features), strength)
        targets, sums = requantize(self.quantizer, self.features, *drawn)
        inputs = self.quantizer.transformer_inputs(sums)
        losses, _ = model.module.apply(
            {"params": model.params}, self._labels, inputs, targets, method="losses"
        )
        return float(losses.mean())


def main(_):
    variants = FLAGS.variants or list(VARIANTS)
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise app.UsageError(f"--variants must be among {', '.join(VARIANTS)}; got {', '.join(unknown)}")
    seeds, out = cli.numbers("seeds", int), cli.local_folder("out")
    tokenizer = FLAGS.tokenizer or train_tokenizer(FLAGS.data_dir, out)
    evaluator, path = Evaluator(tokenizer, FLAGS.data_dir), out / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    for seed in seeds:
        for variant in variants:
            print(f"--- {variant}, seed {seed}", flush=True)
            workdir = out / variant / str(seed)
            stages.run(variant_config(variant, tokenizer, FLAGS.data_dir, seed, FLAGS.steps), workdir)
            if str(seed) not in figures.setdefault(variant, {}):
                figures[variant][str(seed)] = evaluator.figures(workdir, seed, FLAGS.per_class)
                path.write_text(json.dumps(figures, indent=1))
    repair = repair_errors(evaluator.quantizer, evaluator.features)
    tables = (report.variants_table(figures), report.repair_table(repair))
    (out / "self_correction.md").write_text("\n\n".join(tables) + "\n")
    report.draw_samples({name: out / name / str(seeds[0]) for name in variants}, out / "samples.png")
    print((out / "self_correction.md").read_text() + f"\nsamples: {out / 'samples.png'}")


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", "data", "Directory of data sets")
    flags.DEFINE_string("tokenizer", "", "Run or file of the tokenizer; default: train one under OUT")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("variants", None, "Variants to train; default: all")
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds with which each variant is trained")
    flags.DEFINE_integer("steps", 1150, "Training steps of each run", lower_bound=1)
    flags.DEFINE_integer("per_class", 100, "Samples of each class", lower_bound=1)
    cli.run(main)
