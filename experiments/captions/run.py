"""Train a transformer on captioned shapes, and compare the attributes asked for with those that are drawn.

    python -m experiments.captions.run --tokenizer=runs/captions --out=runs/attributes

The data set is that of `configs/captions.py`.  Prompts ask for random attributes, half of them with a pair of
shape and color that no training image shows.  `AttributeJudge` reads the attributes of the samples, and, as a
measure of itself, of drawn images and of their reconstructions.  Runs that were stopped go on; figures of
finished runs are read from OUT/figures.json.  Writes `captions.md` (table), `figures.json` and `samples.png`.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

import var_jax
from benchmarks.tables import format_over_seeds, markdown_table
from configs import captions
from examples.captioned_shapes import PHRASINGS, Attributes, random_attributes
from experiments.captions.judge import ATTRIBUTES, AttributeJudge, drawn_examples
from experiments.setup_tokens import prepare_tokens
from var_jax import cli, stages
from var_jax.images import image_grid, save_png, to_uint8

FLAGS = flags.FLAGS
GUIDANCES = (0.0, 1.5, 3.0)
PAIRS = ("seen", "unseen")  # of shape and color, in the training images
BATCH = 50  # images
ROWS, COLUMNS = 6, 8  # of the picture: prompts with pairs of either kind, samples of each


def ask(count: int, unseen: bool) -> tuple[list[Attributes], list[str]]:
    """Draw attributes and their captions, always the same; those of pairs in `UNSEEN` if `unseen`."""
    rng = np.random.default_rng(2 + unseen)
    asked = [random_attributes(rng, unseen) for _ in range(count)]
    return asked, [attributes.caption(i % len(PHRASINGS)) for i, attributes in enumerate(asked)]


def limits(judge: AttributeJudge, tokenizer: var_jax.LoadedTokenizer, count: int) -> dict[str, dict]:
    """Compute the shares of drawn images and of their reconstructions that the judge reads right."""
    images, asked = drawn_examples(count, tokenizer.image_size, seed=0)
    reconstructions = tokenizer.decode(tokenizer.encode(np.float32(images) / 255))
    return {
        "drawn images": judge.shares(images, asked),
        "reconstructions": judge.shares(to_uint8(reconstructions), asked),
    }


def sample_figures(judge: AttributeJudge, workdir: Path, tokenizer, seed: int, count: int) -> dict[str, dict]:
    """Compute the shares of samples that show what was asked for, for seen and unseen pairs."""
    model = var_jax.load_var(workdir, tokenizer=tokenizer)
    figures = {}
    for pairs in PAIRS:
        asked, prompts = ask(count, pairs == "unseen")
        for guidance in GUIDANCES:
            images = to_uint8(model.sample(prompt=prompts, seed=seed, batch=BATCH, guidance=guidance))
            figures[f"{pairs} pairs, guidance {guidance:g}"] = judge.shares(images, asked)
    return figures


def draw_samples(workdir: Path, tokenizer: var_jax.LoadedTokenizer, path: Path) -> None:
    """Draw a row of samples for each of a few prompts, first of seen pairs, then of unseen ones."""
    prompts = [prompt for pairs in PAIRS for prompt in ask(ROWS, pairs == "unseen")[1]]
    model = var_jax.load_var(workdir, tokenizer=tokenizer)
    images = model.sample(prompt=list(np.repeat(prompts, COLUMNS)), batch=BATCH)
    save_png(image_grid(images, COLUMNS, row_labels=prompts), path)


def attributes_table(figures: dict[str, dict]) -> str:
    """Format the shares of images that show the attributes asked for, as a markdown table.

    Args:
      figures: `limits`: kind of images -> share by attribute; `seeds`: seed -> kind of samples -> the same.
    """
    keys = (*ATTRIBUTES, "all")
    rows = [[name, *(f"{shares[key]:.1%}" for key in keys)] for name, shares in figures["limits"].items()]
    by_seed = list(figures["seeds"].values())
    for name in by_seed[0]:
        rows.append([name, *(format_over_seeds([run[name][key] for run in by_seed], ".1%") for key in keys)])
    return markdown_table([f"images ({len(by_seed)} seeds)", *keys], rows)


def main(_):
    seeds, out = cli.numbers("seeds", int), cli.local_folder("out")
    config = captions.get_config()
    for stage in (config.tokenizer, config.next_scale):
        stage.data.dir = FLAGS.data_dir
    stage = config.next_scale
    stage.tokenizer = FLAGS.tokenizer
    prepare_tokens(stage, config.tokenizer, out, crops=FLAGS.crops)
    if FLAGS.steps:
        stage.train.steps = FLAGS.steps
    stage.train.update(dict(eval_every=stage.train.steps, preview_every=0))
    tokenizer = var_jax.load_tokenizer(stage.tokenizer)
    judge = AttributeJudge(tokenizer.image_size)
    path = out / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures.setdefault("limits", limits(judge, tokenizer, FLAGS.count))
    for seed in seeds:
        print(f"--- seed {seed}", flush=True)
        stage.seed = seed
        workdir = out / f"seed{seed}"
        stages.run(stage, workdir)
        if str(seed) not in figures.setdefault("seeds", {}):
            figures["seeds"][str(seed)] = sample_figures(judge, workdir, tokenizer, seed, FLAGS.count)
        path.write_text(json.dumps(figures, indent=1))
    (out / "captions.md").write_text(attributes_table(figures) + "\n")
    draw_samples(out / f"seed{seeds[0]}", tokenizer, out / "samples.png")
    print((out / "captions.md").read_text() + f"\nsamples: {out / 'samples.png'}")


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", "data", "Directory of data sets")
    flags.DEFINE_string("tokenizer", "", "Run or file of the tokenizer; default: train one under OUT")
    flags.DEFINE_string("out", None, "Directory of the runs and of the results", required=True)
    flags.DEFINE_list("seeds", ["1", "2", "3"], "Seeds of the transformers")
    flags.DEFINE_integer("steps", 0, "Training steps of each; 0: those of the config", lower_bound=0)
    flags.DEFINE_integer("crops", 2, "Crops of each training image in the token cache", lower_bound=1)
    flags.DEFINE_integer("count", 400, "Prompts of either kind, and drawn images", lower_bound=1)
    cli.run(main)
