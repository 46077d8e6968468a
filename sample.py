"""Makes images with a trained VAR: samples.npz, a grid, coarse-to-fine strips, single PNGs on request.

    python sample.py --workdir=runs/digits --num_per_class=100
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d16.pth --labels=207,360 \\
        --guidance=4 --out=out
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d30.pth --classes=0-999 \\
        --num_per_class=50 --out=fid

Killed, the same command goes on where it was.
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
from tqdm import tqdm

import var_jax
from var_jax import command_line
from var_jax.sampling import pictures
from var_jax.sampling.batch_size import largest_batch
from var_jax.sampling.generate import as_pixels
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.store import OtherSamples, SamplesNotWritten, SampleStore

FLAGS = flags.FLAGS
command_line.define_model_flags()
command_line.define_sampling_flags()
command_line.define_host_flags()
flags.DEFINE_list("labels", None, "Classes to draw, an image each; `none` is no class")
flags.DEFINE_list("classes", None, "Classes to draw --num_per_class images of, e.g. 0-999; by default all")
flags.DEFINE_integer("num_per_class", 10, "Images of each class where no --labels are given", lower_bound=1)
flags.DEFINE_integer("batch", None, "Images made at once; by default what the memory holds", lower_bound=1)
flags.DEFINE_bool("pngs", False, "Also write every image as a PNG of its own")

MAX_GRID = 100  # images in the grid, and strips below each other
PNG_WRITERS = 8  # threads


def chosen_labels(model: var_jax.LoadedVAR) -> np.ndarray:
    """Labels to draw: those asked for, or equally many of each class, class by class."""
    if FLAGS.labels is not None:
        return command_line.labels(model, "labels")
    classes = np.arange(model.num_classes)
    if FLAGS.classes is not None:
        classes = command_line.labels(model, "classes")
    return np.repeat(classes, FLAGS.num_per_class)


def job(model: var_jax.LoadedVAR, labels: np.ndarray, options: SamplingOptions) -> dict:
    """All that decides the images: the same job may go on where it was stopped."""
    weights = (model.params["class_embedding"], model.params["head"]["kernel"])
    weights += (model.tokenizer.params["quantizer"]["codebook"],)
    checksum = lambda array: f"{zlib.crc32(np.ascontiguousarray(array)):08x}"  # noqa: E731
    return {
        "labels": f"{len(labels)} labels {checksum(labels)}",
        "weights": " ".join(checksum(np.asarray(array).view(np.uint8)) for array in weights),
        "seed": FLAGS.seed,
        **dataclasses.asdict(options),
    }


def write_pngs(images: np.ndarray, labels: np.ndarray, start: int, folder: Path) -> None:
    def write(i):
        picture = pictures.Image.fromarray(images[i])
        pictures.save(picture, folder / f"{start + i:06d}_class{labels[start + i]:04d}.png")

    with ThreadPoolExecutor(PNG_WRITERS) as pool:
        list(pool.map(write, range(len(images))))


def draw_pictures(
    tokenizer: var_jax.LoadedTokenizer, images: np.ndarray, tokens: np.ndarray, out: Path
) -> None:
    """Writes samples.png, one row a class where there are several images of each, and scales.png."""
    per_row = min(FLAGS.num_per_class, 10) if FLAGS.labels is None else min(len(images), 10)
    shown = np.arange(len(images))
    if FLAGS.labels is None:
        shown = shown.reshape(-1, FLAGS.num_per_class)[: MAX_GRID // per_row, :per_row].ravel()
    shown = shown[:MAX_GRID]
    pictures.save(pictures.grid(images[shown], columns=per_row), out / "samples.png")
    first = shown[::per_row] if FLAGS.labels is None else shown[:10]
    pictures.save(pictures.strips(tokenizer.decode_steps(tokens[first])), out / "scales.png")


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
      what: the job.
    """
    config = tokenizer.module.config
    controls = options.controls(model.module.config.schedule, config.num_codes)
    batch = FLAGS.batch or largest_batch(tokenizer.module, model.module, controls, len(labels))
    chunk = -(-batch // jax.device_count()) * jax.device_count()
    length = model.module.config.schedule.ends[controls.scales - 1]
    shape = (config.image_size, config.image_size, 3)
    writes = jax.process_index() == 0
    store = SampleStore(out, len(labels), shape, length, what) if writes else None
    start = 0
    if writes:
        chunk = store.same_chunk(chunk) if FLAGS.batch is None else chunk
        start = store.resume(chunk)
    if jax.process_count() > 1:
        start, chunk = (int(n) for n in multihost_utils.broadcast_one_to_all(np.array([start, chunk])))
    batches = model.generate_batches(labels, FLAGS.seed, chunk, options, start=start, finish=as_pixels)
    bar = tqdm(
        total=len(labels), initial=start, unit="image", desc="sampling", mininterval=1, disable=not writes
    )
    with bar:
        for images, tokens in batches:
            if writes:
                if FLAGS.pngs:
                    write_pngs(images, labels, bar.n, out / "images")
                store.append(images, tokens)
            bar.update(len(images))
    if writes:
        draw_pictures(tokenizer, store.images(), store.tokens(), out)
        store.finish(labels)
        said = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(options).items())
        print(f"{len(labels)} images ({said}): {out}/samples.npz, samples.png, scales.png")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    command_line.start()
    command_line.join_hosts()
    try:
        model = command_line.load()
        labels, options = chosen_labels(model), command_line.options(model)
        what, tokenizer = job(model, labels, options), model.tokenizer
        model = model.spread()  # lets go of the copy on one device
        sample(model, tokenizer, what, labels, options, Path(FLAGS.out or FLAGS.workdir or "."))
    except (OtherSamples, SamplesNotWritten) as error:
        sys.exit(f"sample.py: {error}")


if __name__ == "__main__":
    app.run(main)
