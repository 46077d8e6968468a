"""Evaluate the reconstructions of a tokenizer on held-out images.

    python evaluate.py --workdir=runs/digits --data=digits --data_dir=data
    python evaluate.py --tokenizer=vae_ch160v4096z32.pth --data=imagenet2012 --split=validation \\
        --data_dir=DIR --perceptual_weights=vgg16.pth,vgg_lpips.pth --out=eval

Prints the metrics, writes them as JSON, and saves a picture of the worst and the best reconstructions.
"""

import json

import numpy as np
from absl import flags

import var_jax
from var_jax import cli
from var_jax.data.loader import eval_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import config_errors
from var_jax.evaluation.reconstruction import evaluate_reconstruction
from var_jax.images import image_grid, save_png
from var_jax.interop.lpips_weights import load_perceptual
from var_jax.paths import as_path

FLAGS = flags.FLAGS
flags.DEFINE_enum("what", "reconstruction", ["reconstruction"], "Evaluation to run; may be left out")
cli.define_tokenizer_flags()
flags.DEFINE_string("step", "latest", "Checkpoint of the run: a step, `latest` or `best`")
flags.DEFINE_string("data", "digits", "Name of a prepared data set")
flags.DEFINE_string("data_dir", "data", "Directory of the prepared data sets")
flags.DEFINE_string("split", "test", "Held-out split")
flags.DEFINE_float("resize", 1.0, "Short side before the center crop, over the image size", lower_bound=1)
flags.DEFINE_list("perceptual_weights", None, "Weight files of VGG-16 and LPIPS; without them no LPIPS")
flags.DEFINE_integer("batch", 64, "Images per batch", lower_bound=1)
flags.DEFINE_string("out", None, "Output directory; by default --workdir, or else the current directory")


def main(_):
    path, scales = cli.tokenizer_source()
    with config_errors():
        out = as_path(FLAGS.out or FLAGS.workdir or ".")
        tokenizer = var_jax.load_tokenizer(path, scales=scales, step=FLAGS.step, dtype=FLAGS.dtype)
        vgg = load_perceptual(FLAGS.perceptual_weights) if FLAGS.perceptual_weights else None
        source = open_source(FLAGS.data, FLAGS.split, FLAGS.data_dir)
    transform = ToPixels(source.name, tokenizer.image_size, FLAGS.resize, False)
    batches = eval_batches(source, transform, FLAGS.batch)
    metrics, worst, best = evaluate_reconstruction(
        tokenizer.module, tokenizer.params, batches, source.num_records, vgg
    )
    rows = [np.concatenate([extremes.images, extremes.recon]) for extremes in (worst, best)]
    grid = image_grid(np.concatenate(rows), columns=len(worst.images))
    path = save_png(grid, out / "reconstruction_extremes.png")
    (out / "reconstruction.json").write_text(json.dumps(metrics, indent=1))
    print(f"{source.num_records} images of {source.name}")
    for name in ("psnr", "ssim", "lpips", "rfid", "l2", "bits_per_pixel", "bits_per_pixel_coded"):
        if name in metrics:
            print(f"  {name:22} {metrics[name]:.4f}")
    print("  scale  side  perplexity  distinct codes  most possible")
    for k, side in enumerate(tokenizer.scales):
        perplexity, distinct, most = (metrics[f"{name}_{k}"] for name in ("perplexity", "distinct", "most"))
        print(f"  {k:5} {side:5} {perplexity:11.1f} {distinct:15.0f} {most:14.0f}")
    print(
        f"{path}: worst images, their reconstructions, best images, theirs; all metrics: reconstruction.json"
    )


if __name__ == "__main__":
    cli.run(main)
