"""Makes images with a trained VAR: samples.npz, a grid, coarse-to-fine strips, single PNGs on request.

    python sample.py --workdir=runs/digits --num_per_class=100
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d16.pth --labels=207,360 \\
        --guidance=4 --out=out
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d30.pth --classes=0-999 \\
        --num_per_class=50 --out=fid

Killed, the same command goes on where it was.  Once samples.npz is complete, it draws the pictures again, and
with --pngs the single PNGs.
"""

import dataclasses
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils
from PIL import Image
from tqdm import tqdm

import var_jax
from var_jax import cli
from var_jax.images import denormalize_to_uint8, image_grid, image_strips, save_png
from var_jax.paths import is_remote, local_path
from var_jax.sampling.auto_batch_size import largest_batch
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sample_writer import SampleStore, explained
from var_jax.tokenizer.model import fingerprint

FLAGS = flags.FLAGS
cli.define_model_flags()
cli.define_sampling_flags()
cli.define_host_flags()
flags.DEFINE_list("labels", None, "Classes to draw, an image each; `none` is no class")
flags.DEFINE_list("classes", None, "Classes to draw --num_per_class images of, e.g. 0-999; by default all")
flags.DEFINE_integer("num_per_class", 10, "Images of each class where no --labels are given", lower_bound=1)
flags.DEFINE_integer("batch", None, "Images made at once; by default what the memory holds", lower_bound=1)
flags.DEFINE_bool("pngs", False, "Also write every image as a PNG of its own")

MAX_GRID = 100  # images in the grid
MAX_STRIPS = 10  # below each other
PNG_WRITERS = 8  # threads


def out_folder() -> Path:
    """The folder to write to, checked before anything is loaded.

    Raises:
      UsageError: on a URL, and on flags that exclude each other.
    """
    if FLAGS.labels is not None:
        for name in ("classes", "num_per_class"):
            if FLAGS[name].present:
                raise app.UsageError(f"give either --labels, an image each, or --{name}; got both")
    if FLAGS.out is None and FLAGS.workdir and is_remote(FLAGS.workdir):
        raise app.UsageError(
            f"--workdir={FLAGS.workdir} is remote, but samples are appended to local files while they are "
            "made: give --out=DIR, a folder on this machine, too"
        )
    try:
        return Path(local_path(FLAGS.out or FLAGS.workdir or ".", "--out"))
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def chosen_labels(model: var_jax.LoadedVAR) -> np.ndarray:
    """Labels to draw: those asked for, or equally many of each class, all classes again and again.

    So every consecutive part of samples.npz has all classes: the ADM evaluator takes the Inception Score over
    such parts.
    """
    if FLAGS.labels is not None:
        return cli.labels(model, "labels")
    classes = np.arange(model.num_classes)
    if FLAGS.classes is not None:
        classes = cli.labels(model, "classes")
    return np.tile(classes, FLAGS.num_per_class)


def job(model: var_jax.LoadedVAR, labels: np.ndarray, options: SamplingOptions) -> dict:
    """All that decides the images: the same job may go on where it was stopped.

    Args:
      model: on one device; every parameter of it and of its tokenizer counts.
      labels: int [N].
    """
    return {
        "labels": f"{len(labels)} labels {zlib.crc32(labels.tobytes()):08x}",
        "tokenizer": _identity(model.tokenizer),
        "transformer": _identity(model),
        "seed": FLAGS.seed,
        **dataclasses.asdict(options),
    }


def _identity(network: var_jax.LoadedTokenizer | var_jax.LoadedVAR) -> str:
    """Weights, architecture and compute dtype of a network in a line."""
    config = zlib.crc32(repr(network.module.config).encode())
    return f"weights {fingerprint(network.params)}, config {config:08x}, {np.dtype(network.module.dtype)}"


def shown_images(count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Choose the images to show: a class a row; or as many --labels as there are.

    Args:
      count: images in all.

    Returns:
      Numbers of the images in the grid and in the strips, int [n], and the columns of the grid.
    """
    if FLAGS.labels is not None:
        shown = np.arange(min(count, MAX_GRID))
        return shown, shown[:MAX_STRIPS], min(count, 10)
    columns = min(FLAGS.num_per_class, 10)
    by_class = np.arange(count).reshape(FLAGS.num_per_class, -1).T
    return by_class[: MAX_GRID // columns, :columns].ravel(), by_class[:MAX_STRIPS, 0], columns


def draw_pictures(tokenizer: var_jax.LoadedTokenizer, store: SampleStore, out: Path) -> list[str]:
    """Draw samples.png and scales.png from samples that are complete, and warn of what cannot be drawn.

    Args:
      tokenizer: on this host's first device alone.
      store: finished.
      out: folder to write to.

    Returns:
      Names of the pictures that were drawn.
    """
    in_grid, in_strips, columns = shown_images(len(store.images()))
    draw = {
        "samples.png": lambda: image_grid(store.images()[in_grid], columns),
        "scales.png": lambda: image_strips(tokenizer.decode_steps(store.tokens()[in_strips])),
    }
    drawn = []
    for name, picture in draw.items():
        try:
            save_png(picture(), out / name)
        except (OSError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, OSError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            print(
                f"sample.py: warning: {out / name} could not be drawn: {reason}\n"
                "  samples.npz is complete; the same command draws it",
                file=sys.stderr,
            )
        else:
            drawn.append(name)
    return drawn


def write_pngs(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write every image [N, H, W, 3] as a PNG named after its number and label.

    Raises:
      SamplesNotWritten: if the disk is full.
    """

    def write(i: int) -> None:
        save_png(Image.fromarray(images[i]), folder / f"{i:06d}_class{labels[i]:04d}.png")

    with explained(folder), ThreadPoolExecutor(PNG_WRITERS) as pool:
        for first in range(0, len(images), 1000):  # so that a full disk is noticed before the last one
            list(pool.map(write, range(first, min(first + 1000, len(images)))))


def sample(
    model: var_jax.LoadedVAR,
    tokenizer: var_jax.LoadedTokenizer,
    what: dict,
    labels: np.ndarray,
    options: SamplingOptions,
    out: Path,
) -> None:
    """Makes the images of a job and writes them.

    Args:
      model: on all devices.
      tokenizer: on this host's first device alone, for the pictures.
      what: the job, on process 0.
    """
    config = tokenizer.module.config
    controls = options.controls(model.module.config.schedule, config.num_codes)
    batch = FLAGS.batch or largest_batch(tokenizer.module, model.module, controls, len(labels))
    chunk = -(-batch // jax.device_count()) * jax.device_count()
    length = model.module.config.schedule.ends[controls.scales - 1]
    shape = (config.image_size, config.image_size, 3)
    several, writes = jax.process_count() > 1, jax.process_index() == 0
    if several:
        chunk = int(multihost_utils.process_allgather(np.array(chunk)).min())  # what every host holds
    start = 0
    if writes:
        store = SampleStore(out, len(labels), shape, length, what)
        chunk = store.same_chunk(chunk, asked=FLAGS.batch is not None)
        start = store.resume(chunk)
    if several:
        start, chunk = (int(n) for n in multihost_utils.broadcast_one_to_all(np.array([start, chunk])))
    batches = model.generate_batches(
        labels, FLAGS.seed, chunk, options, start=start, postprocess=denormalize_to_uint8
    )
    bar = tqdm(
        total=len(labels), initial=start, unit="image", desc="sampling", mininterval=1, disable=not writes
    )
    with bar:
        for images, tokens in batches:
            if writes:
                store.append(images, tokens)
            bar.update(len(images))
    if writes:
        files = [store.finish(labels).name, "tokens.npy", *draw_pictures(tokenizer, store, out)]
        if FLAGS.pngs:
            write_pngs(store.images(), labels, out / "images")
            files.append("images/")
        said = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(options).items())
        print(f"{len(labels)} images ({said}): {out}: {', '.join(files)}")
    if several:  # the others wait: JAX's own barrier at the end gives up after five minutes
        multihost_utils.sync_global_devices("samples.npz")


def main(_):
    out = out_folder()
    cli.join_hosts()
    with cli.failing_at_once():
        model = cli.load()
        labels, options = chosen_labels(model), cli.options(model)
        what = job(model, labels, options) if jax.process_index() == 0 else {}
        tokenizer, model = model.tokenizer, model.replicate()  # lets go of the copy on one device
        sample(model, tokenizer, what, labels, options, out)


if __name__ == "__main__":
    cli.run(main)
