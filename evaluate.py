"""Score samples (FID and its kin), a model or a grid of its sampling options; or evaluate a tokenizer.

    python evaluate.py samples --samples=runs/digits/samples.npz --data=digits
    python evaluate.py samples --samples=fid/samples.npz --reference=VIRTUAL_imagenet256_labeled.npz \\
        --inception=pt_inception-2015-12-05-6726825d.pth --out=fid
    python evaluate.py generate-and-score --workdir=runs/digits --data=digits --num_per_class=100 --out=scores
    python evaluate.py sweep --workdir=runs/digits --data=digits --guidance=0,0.5,1,2 --out=sweep
    python evaluate.py statistics --data=mine --size=256 --inception=FILE --out=references
    python evaluate.py reconstruction --workdir=runs/digits --data=digits
    python evaluate.py reconstruction --tokenizer=vae_ch160v4096z32.pth --data=imagenet2012 \\
        --split=validation --data_dir=DIR --inception=FILE \\
        --perceptual_weights=vgg16.pth,vgg_lpips.pth --out=eval

Without --inception, samples are scored in the features of a small classifier that is trained on --data.
Which number is which: docs/evaluation.md.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils
from tqdm import tqdm

import var_jax
from var_jax import cli
from var_jax.data.loader import eval_batches
from var_jax.data.sources import Source, open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError, config_errors
from var_jax.evaluation.extractors import (
    Extractor,
    FeatureSet,
    classifier_extractor,
    extract_features,
    fit_classifier,
    inception_extractor,
)
from var_jax.evaluation.feature_chunks import NUM_SHOWN, FeatureChunks
from var_jax.evaluation.inception import Inception, resize_tf1
from var_jax.evaluation.reconstruction import evaluate_reconstruction
from var_jax.evaluation.scores import (
    Reference,
    format_scores,
    nearest_references,
    plot_scores,
    read_images,
    read_labels,
    read_reference,
    reference_of_data,
    score,
    score_halves,
)
from var_jax.images import denormalize, denormalize_to_uint8, image_grid, save_png
from var_jax.interop.inception_weights import load_inception
from var_jax.interop.lpips_weights import load_perceptual
from var_jax.paths import as_path
from var_jax.sampling.auto_batch_size import largest_batch
from var_jax.sampling.options import SamplingOptions
from var_jax.scales import Scales

FLAGS = flags.FLAGS
cli.define_model_flags()
cli.define_sampling_flags()
cli.define_refiner_flags()
cli.define_host_flags()
flags.DEFINE_integer("num_per_class", 50, "generate-and-score, sweep: samples of each class", lower_bound=1)
flags.DEFINE_string("samples", None, "samples: file written by sample.py")
flags.DEFINE_string("reference", None, "Reference file of samples, instead of --data")
flags.DEFINE_string("inception", None, "Weights of Inception-v3 as of 2015-12-05")
flags.DEFINE_bool("adm_float16", False, "Precision and recall in float16, as ADM's evaluator")
flags.DEFINE_bool("at_infinity", False, "Extrapolate FID to infinitely many samples")
flags.DEFINE_string("data", "digits", "Name of a prepared data set")
flags.DEFINE_string("data_dir", "data", "Directory of the prepared data sets")
flags.DEFINE_string("split", None, "Split; by default `test` for reconstruction, else `train`")
flags.DEFINE_float("resize", 1.0, "Short side before the center crop, over the image size", lower_bound=1)
flags.DEFINE_integer("size", None, "statistics: side of the images", lower_bound=1)
flags.DEFINE_string("step", "latest", "reconstruction: checkpoint of the run, a step, `latest` or `best`")
flags.DEFINE_list("perceptual_weights", None, "reconstruction: weight files of VGG-16 and LPIPS, for LPIPS")
flags.DEFINE_integer("batch", 64, "Images per batch", lower_bound=1)

GRID = ("guidance", "top_k", "top_p", "temperature")  # options of which `sweep` takes lists
MAX_CHUNK = 1000  # samples that a kill loses, at most
REAL = "half of the reference images against the rest"


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Network and reference by which samples are scored, as the flags say.

    Attributes:
      name: of the network, with its checksum.
      extractor: the network.
      reference: the reference images.
    """

    name: str
    extractor: Extractor
    reference: Reference

    def scores(self, features: FeatureSet, labels: np.ndarray | None) -> dict[str, float]:
        """Score samples by their features; with labels, those of a classifier by its accuracy, too."""
        labels = None if FLAGS.inception else labels
        return score(features, self.reference, labels, FLAGS.adm_float16, FLAGS.at_infinity)

    @functools.cached_property
    def real(self) -> dict[str, float]:
        """Scores of one half of the reference images against the other."""
        return score_halves(self.reference)

    def write(self, out, scores: dict, images: np.ndarray, vectors: np.ndarray, **more) -> None:
        """Write scores.json, and nearest.png of some samples and their vectors."""
        out.mkdir(parents=True, exist_ok=True)
        if images.shape[1:] == self.reference.images.shape[1:]:
            save_png(nearest_references(images, vectors, self.reference), out / "nearest.png")
        content = scores | {"inception": self.name, "real_halves": self.real, **more}
        (out / "scores.json").write_text(json.dumps(content, indent=1))

    def table(self, rows: dict[str, dict[str, float]]) -> str:
        """Format scores as a table, with those of real images."""
        return f"in features of {self.name}:\n" + format_scores(rows | {REAL: self.real})


def make_scorer(side: int) -> Scorer:
    """Load the network and the reference that the flags name, for images of a side.

    Raises:
      ConfigError: if a file or data set is missing or does not fit.
    """
    if FLAGS.inception:
        with config_errors(prefix="--inception: "):
            variables = load_inception(FLAGS.inception)
            checksum = hashlib.sha256(Path(FLAGS.inception).read_bytes()).hexdigest()
        name = f"{Path(FLAGS.inception).name}, sha256 {checksum[:16]}"
        extractor = inception_extractor(variables, FLAGS.batch)
        if FLAGS.reference:
            return Scorer(name, extractor, read_reference(FLAGS.reference, extractor, FLAGS.batch))
    source = open_data(FLAGS.split or "train")
    if not FLAGS.inception:
        name = f"a classifier of {source.name}"
        if jax.process_index() == 0:
            print(f"training {name}: {source.num_records} images of {side} pixels", flush=True)
        classifier = fit_classifier(batches_of(source, side), source.num_records, side)
        extractor = classifier_extractor(classifier)
    return Scorer(name, extractor, reference_of_data(batches_of(source, side), source.num_records, extractor))


def open_data(split: str, condition: str = "label") -> Source:
    """Open a split of the data set that the flags name; ConfigError if it or its conditions are missing."""
    with config_errors(prefix="--data: "):
        return open_source(FLAGS.data, split, FLAGS.data_dir, condition)


def conditions_to_draw(model: var_jax.LoadedVAR) -> tuple[np.ndarray, np.ndarray]:
    """Return the conditions of the samples to score, and their classes int [N].

    These are all classes in turn or, of a model of captions or embeddings, those of the first of --data.

    Raises:
      ConfigError: if the data have no such conditions, or captions of other words.
    """
    config = model.module.config
    if config.condition == "label":
        labels = np.tile(np.arange(model.num_classes), FLAGS.num_per_class)
        return labels, labels
    source = open_data(FLAGS.split or "train", config.condition)
    for name, value in source.condition_fields().items():
        if value != (own := getattr(config, name)):
            raise ConfigError(f"--data={FLAGS.data}: its {name} is {value}; the model's is {own}")
    count = FLAGS.num_per_class * source.num_classes
    items = (source[i] for i in range(min(count, source.num_records)))
    conditions, labels = zip(*((item["condition"], item["label"]) for item in items), strict=True)
    order = np.arange(count) % len(labels)
    return np.stack(conditions)[order], np.array(labels)[order]


def batches_of(source: Source, side: int) -> Iterator[dict]:
    """Return all images of a data set in order, center-cropped to a side."""
    return eval_batches(source, ToPixels(source.name, side, FLAGS.resize, False), FLAGS.batch)


def score_samples() -> None:
    """Score a file of samples."""
    images = read_images(FLAGS.samples)
    labels = read_labels(FLAGS.samples, len(images))
    scorer = make_scorer(images.shape[1])
    features = extract_features(scorer.extractor, images, FLAGS.batch, "samples")
    if jax.process_index() > 0:
        return
    scores, out = scorer.scores(features, labels), as_path(FLAGS.out or Path(FLAGS.samples).parent)
    shown = np.linspace(0, len(images) - 1, min(len(images), NUM_SHOWN)).astype(int)
    scorer.write(out, scores, images[shown], features.vectors[shown])
    print(f"{scorer.table({Path(FLAGS.samples).name: scores})}\n{out}: scores.json, nearest.png")


def score_model() -> None:
    """Draw samples of a model and score them; of the samples, their features alone are kept."""
    model = cli.load()
    scorer, out = make_scorer(model.image_size), as_path(FLAGS.out or FLAGS.workdir or ".")
    drawn = conditions_to_draw(model)
    scores = draw_and_score(model, model.replicate(), drawn, cli.options(model), scorer, out)
    if jax.process_index() == 0:
        print(f"{scorer.table({'samples': scores})}\n{out}: scores.json, nearest.png")


def sweep() -> None:
    """Draw and score samples for every combination of the values that the flags of GRID list.

    Raises:
      UsageError: if no flag has a list.
    """
    grids = {name: cli.numbers(name, int if name == "top_k" else float) for name in GRID if FLAGS[name].value}
    if all(len(values) < 2 for values in grids.values()):
        raise app.UsageError(f"evaluate.py sweep: give a list of values to one of --{', --'.join(GRID)}")
    model = cli.load()
    grid = {}
    for values in itertools.product(*grids.values()):
        point = dict(zip(grids, values, strict=True))
        name = ", ".join(f"{option} {value:g}" for option, value in point.items())
        grid[name] = cli.options(model, fixed=point)
    scorer, out = make_scorer(model.image_size), as_path(FLAGS.out or FLAGS.workdir or ".")
    drawn, replicated, rows = conditions_to_draw(model), model.replicate(), {}
    for name, options in grid.items():
        if jax.process_index() == 0:
            print(f"--- {name}", flush=True)
        folder = out / name.replace(", ", "-").replace(" ", "_")
        rows[name] = draw_and_score(model, replicated, drawn, options, scorer, folder)
    if jax.process_index() == 0:
        table = scorer.table(rows)
        (out / "sweep.md").write_text(table + "\n")
        (out / "sweep.json").write_text(json.dumps(rows, indent=1))
        plot_scores(rows, out / "sweep.png")
        print(f"{table}\n{out}: sweep.md, sweep.json, sweep.png (FID and IS, precision and recall)")


def draw_and_score(
    model: var_jax.LoadedVAR,
    replicated: var_jax.LoadedVAR,
    drawn: tuple[np.ndarray, np.ndarray],
    options: SamplingOptions,
    scorer: Scorer,
    out,
) -> dict[str, float]:
    """Draw a sample of each condition and score them; a killed call goes on.

    Args:
      model: on one device.
      replicated: the same on all devices.
      drawn: conditions of the samples, and their classes; see `conditions_to_draw`.
      options: sampling options.
      scorer: network and reference.
      out: folder of the scores.

    Returns:
      The scores; {} on other hosts than the first.
    """
    conditions, labels = drawn
    per_scale = options.per_scale(Scales(model.scales), model.tokenizer.num_codes)
    chunk = FLAGS.batch if FLAGS["batch"].present else MAX_CHUNK
    refiner = model.refiner and model.refiner.module
    fits = largest_batch(model.tokenizer.module, model.module, per_scale, len(labels), refiner)
    chunk = min(chunk, fits)
    start, is_primary, saved = 0, jax.process_index() == 0, {}
    if is_primary:
        reference = FLAGS.reference or f"{FLAGS.data}/{FLAGS.split or 'train'}"
        job = cli.job(model, conditions, options) | {"network": scorer.name, "reference": reference}
        job = json.loads(json.dumps(job))
        if (out / "scores.json").exists():
            saved = json.loads((out / "scores.json").read_text())
        is_done = saved.get("job") == job
        if is_done:
            start = len(labels)
        else:
            chunks = FeatureChunks(out / "features.partial", job, len(labels), chunk)
            start, chunk = chunks.done(), chunks.chunk
    if jax.process_count() > 1:
        start, chunk = (int(n) for n in multihost_utils.broadcast_one_to_all(np.array([start, chunk])))
    batches = replicated.generate_batches(
        conditions, FLAGS.seed, chunk, options, start=start, postprocess=denormalize_to_uint8
    )
    progress = tqdm(total=len(labels), initial=start, unit="image", desc="samples", disable=not is_primary)
    with progress:
        for images, _ in batches:
            features = scorer.extractor(images)
            if is_primary:
                chunks.append(images, features)
            progress.update(len(images))
    if not is_primary:
        return {}
    if is_done:
        return {name: value for name, value in saved.items() if isinstance(value, int | float)}
    features, images, vectors = chunks.load()
    scores = scorer.scores(features, labels)
    scorer.write(out, scores, images, vectors, job=job)
    chunks.remove()
    return scores


def make_reference() -> None:
    """Write the reference of a data set.

    Raises:
      UsageError: if a flag is missing.
    """
    if FLAGS.inception is None or FLAGS.size is None:
        raise app.UsageError("evaluate.py statistics: give --inception=FILE and --size=SIDE")
    source = open_data(FLAGS.split or "train")
    with config_errors(prefix="--inception: "):
        extractor = inception_extractor(load_inception(FLAGS.inception), FLAGS.batch)
    reference = reference_of_data(batches_of(source, FLAGS.size), source.num_records, extractor)
    out = as_path(FLAGS.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{source.name.replace('/', '_')}_{FLAGS.size}.npz"
    reference.save(path)
    print(f"{path}: {len(reference.images)} images, and the statistics of all {source.num_records}")


def reconstruction() -> None:
    """Print and write the metrics of a tokenizer, and draw its worst and its best reconstructions."""
    path, scales = cli.tokenizer_source()
    with config_errors():
        out = as_path(FLAGS.out or FLAGS.workdir or ".")
        tokenizer = var_jax.load_tokenizer(path, scales=scales, step=FLAGS.step, dtype=FLAGS.dtype)
        vgg = load_perceptual(FLAGS.perceptual_weights) if FLAGS.perceptual_weights else None
        inception = load_inception(FLAGS.inception) if FLAGS.inception else None
    source = open_data(FLAGS.split or "test")

    def inception_pool(images: jax.Array) -> jax.Array:
        return Inception().apply(inception, resize_tf1(255 * denormalize(images))).pool

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


COMMANDS = {
    "reconstruction": reconstruction,
    "samples": score_samples,
    "generate-and-score": score_model,
    "sweep": sweep,
    "statistics": make_reference,
}


def main(argv: list[str]) -> None:
    run = COMMANDS[argv[1] if len(argv) > 1 else "reconstruction"]
    if run in (reconstruction, make_reference):
        return run()
    if run is score_samples and FLAGS.samples is None:
        raise app.UsageError("evaluate.py samples: give --samples=FILE, as sample.py writes it")
    if FLAGS.reference is not None and FLAGS.inception is None:
        raise app.UsageError(
            "--reference needs --inception=FILE; without it, samples are scored by a classifier of --data"
        )
    cli.initialize_distributed()
    with cli.abort_on_error():
        run()


if __name__ == "__main__":
    cli.run(main, commands=tuple(COMMANDS))
