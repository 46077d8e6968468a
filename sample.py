"""Makes images with a trained VAR: a grid, coarse-to-fine strips, samples.npz, single PNGs on request.

    python sample.py --workdir=runs/digits --num_per_class=100
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d16.pth --labels=207,360 \\
        --guidance=4 --out=out
"""

import sys
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

import var_jax
from var_jax.interop.pth import SUFFIXES
from var_jax.sampling import pictures

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Directory of a run")
flags.DEFINE_string("tokenizer", None, "Published tokenizer file or a run; by default that of --workdir")
flags.DEFINE_string("checkpoint", None, "Published VAR file; or a step of the run, `latest` or `best`")
flags.DEFINE_list("scales", None, "Sides of the token maps of a published file that is not of 256px")
flags.DEFINE_list("labels", None, "Classes to draw, an image each; by default --num_per_class of each class")
flags.DEFINE_integer("num_per_class", 10, "Images of each class where no --labels are given", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Image i depends on (seed, i) alone")
flags.DEFINE_float("guidance", None, "Guidance at the last scale, rising from 0 at the first")
flags.DEFINE_integer("top_k", None, "Draw among so many of the likeliest codes; 0 for all")
flags.DEFINE_float("top_p", None, "Draw among the likeliest codes that hold this probability; 0 for all")
flags.DEFINE_bool("smooth", None, "Mix codes instead of drawing one (for looking at)")
flags.DEFINE_integer("batch", 100, "Images made at once", lower_bound=1)
flags.DEFINE_string("out", None, "Where to write; by default --workdir, else here")
flags.DEFINE_bool("pngs", False, "Also write every image as a PNG of its own")

MAX_GRID = 100  # images in the grid, and strips below each other


def load() -> var_jax.LoadedVAR:
    """The networks that the flags name.

    Raises:
      UsageError: where they name none.
    """
    checkpoint = FLAGS.checkpoint or "latest"
    is_file = checkpoint.endswith(SUFFIXES)
    if not (FLAGS.tokenizer or FLAGS.workdir) or not (is_file or FLAGS.workdir):
        raise app.UsageError("give --workdir of a run, or --tokenizer and --checkpoint of published files")
    scales = None if FLAGS.scales is None else tuple(int(side) for side in FLAGS.scales)
    tokenizer = var_jax.load_tokenizer(FLAGS.tokenizer or FLAGS.workdir, scales=scales)
    if is_file:
        return var_jax.load_var(checkpoint, tokenizer=tokenizer)
    return var_jax.load_var(FLAGS.workdir, tokenizer=tokenizer, step=checkpoint)


def chosen_labels(model: var_jax.LoadedVAR) -> np.ndarray:
    """Labels to draw: those asked for, or equally many of each class, class by class."""
    if FLAGS.labels is None:
        return np.repeat(np.arange(model.num_classes), FLAGS.num_per_class)
    try:
        return model.check_labels(np.array([int(label) for label in FLAGS.labels]))
    except ValueError as error:
        raise app.UsageError(f"--labels={','.join(FLAGS.labels)}: {error}") from error


def write(model: var_jax.LoadedVAR, labels: np.ndarray, images: np.ndarray, tokens: np.ndarray, out: Path):
    """Writes samples.npz, samples.png, scales.png and single PNGs."""
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", arr_0=images, arr_1=labels.astype(np.int64))
    # One row a class where there are several images of each, else the images in their order.
    per_row = min(FLAGS.num_per_class, 10) if FLAGS.labels is None else min(len(labels), 10)
    shown = np.arange(len(labels))
    if FLAGS.labels is None:
        shown = shown.reshape(-1, FLAGS.num_per_class)[: MAX_GRID // per_row, :per_row].ravel()
    shown = shown[:MAX_GRID]
    pictures.save(pictures.grid(images[shown], columns=per_row), out / "samples.png")
    first = shown[::per_row] if FLAGS.labels is None else shown[:10]
    steps = [model.tokenizer.decode(tokens[first], upto=k + 1) for k in range(len(model.tokenizer.scales))]
    pictures.save(pictures.strips(np.stack(steps, axis=1)), out / "scales.png")
    if FLAGS.pngs:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            picture = pictures.Image.fromarray(image)
            pictures.save(picture, out / "images" / f"{i:06d}_class{label:04d}.png")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every item that is left unread
    try:
        model = load()
    except FileNotFoundError as error:
        sys.exit(f"sample.py: {error}")
    labels = chosen_labels(model)
    options = {name: getattr(model.options, name) for name in ("guidance", "top_k", "top_p", "smooth")}
    options |= {name: FLAGS[name].value for name in options if FLAGS[name].value is not None}
    parts = []
    with tqdm(total=len(labels), unit="image", desc="sampling", mininterval=1) as bar:
        for images, tokens in model.generate_batches(labels, FLAGS.seed, FLAGS.batch, **options):
            parts.append((pictures.to_uint8(images), tokens))
            bar.update(len(images))
    images, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
    out = Path(FLAGS.out or FLAGS.workdir or ".")
    write(model, labels, images, tokens, out)
    said = ", ".join(f"{name} {value}" for name, value in options.items())
    print(f"{len(images)} images ({said}): {out}/samples.npz, samples.png, scales.png")


if __name__ == "__main__":
    app.run(main)
