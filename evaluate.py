"""Score samples (FID and its kin), make references for it, or evaluate a tokenizer's reconstructions.

    python evaluate.py samples --samples=runs/digits/samples.npz --data=digits
    python evaluate.py samples --samples=fid/samples.npz --reference=VIRTUAL_imagenet256_labeled.npz \\
        --inception=pt_inception-2015-12-05-6726825d.pth --out=fid
    python evaluate.py statistics --data=mine --size=256 --inception=FILE --out=references
    python evaluate.py reconstruction --workdir=runs/digits --data=digits
    python evaluate.py reconstruction --tokenizer=vae_ch160v4096z32.pth --data=imagenet2012 \\
        --split=validation --data_dir=DIR --inception=FILE \\
        --perceptual_weights=vgg16.pth,vgg_lpips.pth --out=eval

Without --inception, samples are scored in the features of a small classifier that is trained on --data.
Which number is which: docs/evaluation.md.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

import var_jax
from var_jax import cli
from var_jax.data.loader import eval_batches
from var_jax.data.sources import Source, open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError, config_errors
from var_jax.evaluation.classifier import Classifier
from var_jax.evaluation.extractors import (
    Extractor,
    classifier_extractor,
    extract_features,
    inception_extractor,
)
from var_jax.evaluation.inception import Inception, resize_tf1
from var_jax.evaluation.reconstruction import evaluate_reconstruction
from var_jax.evaluation.scores import (
    Reference,
    format_scores,
    nearest_references,
    read_images,
    read_labels,
    read_reference,
    reference_of_data,
    score,
    score_halves,
)
from var_jax.images import denormalize, image_grid, save_png
from var_jax.interop.inception_weights import load_inception
from var_jax.interop.lpips_weights import load_perceptual
from var_jax.paths import as_path

FLAGS = flags.FLAGS
MAX_CLASSIFIER_PIXELS = 10**8  # of all images that a small classifier is trained on
COMMANDS = ("reconstruction", "samples", "statistics")
cli.define_tokenizer_flags()
cli.define_host_flags()
flags.DEFINE_string("step", "latest", "reconstruction: checkpoint of the run, a step, `latest` or `best`")
flags.DEFINE_string("data", "digits", "Name of a prepared data set")
flags.DEFINE_string("data_dir", "data", "Directory of the prepared data sets")
flags.DEFINE_string("split", None, "Split; by default `test`, and `train` as a reference")
flags.DEFINE_float("resize", 1.0, "Short side before the center crop, over the image size", lower_bound=1)
flags.DEFINE_integer("size", None, "statistics: side of the images", lower_bound=1)
flags.DEFINE_string("samples", None, "samples: file written by sample.py")
flags.DEFINE_string("reference", None, "samples: reference file, instead of --data")
flags.DEFINE_string("inception", None, "Weights of Inception-v3 as of 2015-12-05")
flags.DEFINE_bool("adm_float16", False, "samples: precision and recall in float16, as ADM's evaluator")
flags.DEFINE_bool("at_infinity", False, "samples: extrapolate FID to infinitely many samples")
flags.DEFINE_list("perceptual_weights", None, "reconstruction: weight files of VGG-16 and LPIPS, for LPIPS")
flags.DEFINE_integer("batch", 64, "Images per batch", lower_bound=1)
flags.DEFINE_string("out", None, "Output directory; by default --workdir, or else the current directory")


def main(argv: list[str]) -> None:
    command = argv[1] if len(argv) > 1 else "reconstruction"
    with config_errors():
        {"samples": score_samples, "statistics": make_reference, "reconstruction": reconstruction}[command]()


def score_samples() -> None:
    """Print and write the scores of a file of samples, and draw its nearest reference images."""
    if FLAGS.samples is None:
        raise app.UsageError("evaluate.py samples: give --samples=FILE, as sample.py writes it")
    if FLAGS.reference is not None and FLAGS.inception is None:
        raise app.UsageError(
            "--reference needs --inception=FILE; without it, samples are scored by a classifier of --data"
        )
    cli.initialize_distributed()
    images, labels = read_images(FLAGS.samples), read_labels(FLAGS.samples)
    extractor, reference = extractor_and_reference(images.shape[1])
    features = extract_features(extractor, images, FLAGS.batch, "samples")
    if jax.process_index() > 0:
        return
    labels = labels if FLAGS.inception is None else None
    scores = score(features, reference, labels, FLAGS.adm_float16, FLAGS.at_infinity)
    halves = score_halves(reference)
    network = as_path(FLAGS.inception).name if FLAGS.inception else f"classifier of {FLAGS.data}"
    out = as_path(FLAGS.out or Path(FLAGS.samples).parent)
    out.mkdir(parents=True, exist_ok=True)
    checksum = file_checksum(FLAGS.inception) if FLAGS.inception else network
    content = scores | {"inception": checksum, "real_halves": halves}
    (out / "scores.json").write_text(json.dumps(content, indent=1))
    print(f"in features of {network}:")
    print(
        format_scores({Path(FLAGS.samples).name: scores, "half of the references against the rest": halves})
    )
    if reference.images.shape[1:] == images.shape[1:]:
        path = save_png(nearest_references(images, features.vectors, reference), out / "nearest.png")
        print(f"{path}: samples, each before the reference images that are nearest; {out / 'scores.json'}")


def make_reference() -> None:
    """Write the reference of a data set."""
    if FLAGS.inception is None or FLAGS.size is None:
        raise app.UsageError("evaluate.py statistics: give --inception=FILE and --size=SIDE")
    source = open_source(FLAGS.data, FLAGS.split or "train", FLAGS.data_dir)
    reference = reference_of_data(
        batches_of(source, FLAGS.size),
        source.num_records,
        inception_extractor(load_inception(FLAGS.inception)),
    )
    out = as_path(FLAGS.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{source.name.replace('/', '_')}_{FLAGS.size}.npz"
    reference.save(path)
    print(f"{path}: {len(reference.images)} images, and the statistics of all {source.num_records}")


def extractor_and_reference(side: int) -> tuple[Extractor, Reference]:
    """Return the network that the flags name, and the reference in its features, for images of a side."""
    if FLAGS.reference:
        extractor = inception_extractor(load_inception(FLAGS.inception))
        return extractor, read_reference(FLAGS.reference, extractor, FLAGS.batch)
    source = open_source(FLAGS.data, FLAGS.split or "train", FLAGS.data_dir)
    if FLAGS.inception:
        extractor = inception_extractor(load_inception(FLAGS.inception))
    else:
        extractor = classifier_extractor(fit_classifier(source, side))
    return extractor, reference_of_data(batches_of(source, side), source.num_records, extractor)


def fit_classifier(source: Source, side: int) -> Classifier:
    """Train a classifier on the images of a data set.

    Raises:
      ConfigError: if they are too many or too large for one that sees pixels.
    """
    if source.num_records * side**2 > MAX_CLASSIFIER_PIXELS:
        raise ConfigError(
            f"{source.num_records} images of {side} pixels are too many for a classifier; give --inception"
        )
    batches = [
        {name: x[batch["valid"] > 0] for name, x in batch.items()} for batch in batches_of(source, side)
    ]
    return Classifier(*(np.concatenate([batch[name] for batch in batches]) for name in ("image", "label")))


def batches_of(source: Source, side: int) -> Iterator[dict]:
    """Return all images of a data set in order, center-cropped to a side."""
    return eval_batches(source, ToPixels(source.name, side, FLAGS.resize, False), FLAGS.batch)


def file_checksum(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reconstruction() -> None:
    """Print and write the metrics of a tokenizer, and draw its worst and its best reconstructions."""
    path, scales = cli.tokenizer_source()
    out = as_path(FLAGS.out or FLAGS.workdir or ".")
    tokenizer = var_jax.load_tokenizer(path, scales=scales, step=FLAGS.step, dtype=FLAGS.dtype)
    vgg = load_perceptual(FLAGS.perceptual_weights) if FLAGS.perceptual_weights else None
    inception = load_inception(FLAGS.inception) if FLAGS.inception else None

    def inception_pool(images: jax.Array) -> jax.Array:
        return Inception().apply(inception, resize_tf1(255 * denormalize(images))).pool

    source = open_source(FLAGS.data, FLAGS.split or "test", FLAGS.data_dir)
    metrics, worst, best = evaluate_reconstruction(
        tokenizer.module,
        tokenizer.params,
        batches_of(source, tokenizer.image_size),
        source.num_records,
        vgg,
        inception_pool if inception else None,
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
    cli.run(main, commands=COMMANDS)
