"""Generate images with a trained VAR: samples.npz, a grid, coarse-to-fine strips, single PNGs on request.

    python sample.py --workdir=runs/digits --num_per_class=100
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d16.pth --labels=207,360 \\
        --guidance=4 --out=out
    python sample.py --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d30.pth --classes=0-999 \\
        --num_per_class=50 --out=fid
    python sample.py --workdir=runs/captions --prompts="a red star on blue|a green ring on white" --out=out

The same command resumes a run that was killed.  Once samples.npz is complete, it writes only the grid and the
strips again, and with --pngs the single PNGs.
"""

import dataclasses
import sys
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
from var_jax.data.image_conditions import read_embeddings
from var_jax.errors import config_errors
from var_jax.images import denormalize_to_uint8, image_grid, image_strips, save_png
from var_jax.interop.model_names import pretrained_names
from var_jax.paths import is_remote, local_path
from var_jax.sampling.auto_batch_size import largest_batch
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sample_writer import SampleStore, explain_write_errors
from var_jax.scales import Scales

FLAGS = flags.FLAGS
cli.define_model_flags()
cli.define_sampling_flags()
cli.define_refiner_flags()
cli.define_host_flags()
flags.DEFINE_list("labels", None, "Labels, one per image; `none` is no class")
flags.DEFINE_list("classes", None, "Classes with --num_per_class images each, e.g. 0-999; by default all")
flags.DEFINE_integer(
    "num_per_class", 10, "Images of each class, prompt or embedding, without --labels", lower_bound=1
)
flags.DEFINE_string(
    "prompts", None, "Texts to draw, separated by |, or a .txt file with one a line; of a model with captions"
)
flags.DEFINE_string(
    "embeddings", None, "Folder of arrays [T, D], NAME.npy, to draw; of a model trained on embeddings"
)
flags.DEFINE_integer("batch", None, "Images generated at once; by default as many as fit", lower_bound=1)
flags.DEFINE_bool("pngs", False, "Also write each image as a PNG")

MAX_GRID = 100  # images in the grid
MAX_STRIPS = 10  # rows
PNG_WRITERS = 8  # threads


def out_folder() -> Path:
    """Return the output folder; check it and the flags before anything is loaded.

    Raises:
      UsageError: on a URL, and on flags that exclude each other.
    """
    if FLAGS.labels is not None:
        for name in ("classes", "num_per_class"):
            if FLAGS[name].present:
                raise app.UsageError(f"give either --labels, one per image, or --{name}; got both")
    kinds = ("prompts", "embeddings", "labels", "classes")
    if len(given := [f"--{kind}" for kind in kinds if FLAGS[kind].value is not None]) > 1:
        raise app.UsageError(f"give one of {', '.join(given)}, not two of them")
    if FLAGS.out is None and FLAGS.workdir and is_remote(FLAGS.workdir):
        raise app.UsageError(
            f"--workdir={FLAGS.workdir} is remote, but samples are written to local files: give --out=DIR, a "
            "folder on this machine, too"
        )
    if FLAGS.out is None and FLAGS.workdir in pretrained_names() and not Path(FLAGS.workdir).exists():
        raise app.UsageError(f"--workdir={FLAGS.workdir} is a model of the package: give --out=DIR, too")
    try:
        return Path(local_path(FLAGS.out or FLAGS.workdir or ".", "--out"))
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def read_prompts(text: str) -> list[str]:
    """Return the prompts of a flag: separated by |, or the lines of a .txt file that are not empty.

    Raises:
      UsageError: if there is none, or the file cannot be read.
    """
    prompts = text.split("|")
    if text.endswith(".txt"):
        try:
            prompts = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise app.UsageError(f"--prompts={text}: {error}") from error
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise app.UsageError(f"--prompts={text}: there is no prompt")
    return prompts


def chosen_labels(model: var_jax.LoadedVAR) -> np.ndarray:
    """Return the labels int [N] of the flags: --labels, or --num_per_class repetitions of all classes.

    The classes alternate, so that every consecutive part of samples.npz has all of them: the ADM evaluator
    computes the Inception Score over such parts.
    """
    cli.check_classes(model)
    if FLAGS.labels is not None:
        return cli.labels(model, "labels")
    classes = np.arange(model.num_classes)
    if FLAGS.classes is not None:
        classes = cli.labels(model, "classes")
    return np.tile(classes, FLAGS.num_per_class)


def images_to_show(count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Choose the images of the grid and the strips: a class or prompt per row, or with --labels the first.

    Args:
      count: number of all images.

    Returns:
      Numbers of the images in the grid and in the strips, int [n], and the columns of the grid.
    """
    if FLAGS.labels is not None:
        in_grid = np.arange(min(count, MAX_GRID))
        return in_grid, in_grid[:MAX_STRIPS], min(count, 10)
    columns = min(FLAGS.num_per_class, 10)
    by_class = np.arange(count).reshape(FLAGS.num_per_class, -1).T
    return by_class[: MAX_GRID // columns, :columns].ravel(), by_class[:MAX_STRIPS, 0], columns


def draw_pictures(tokenizer: var_jax.LoadedTokenizer, store: SampleStore, out: Path) -> list[str]:
    """Write samples.png and scales.png from complete samples; warn about a picture that fails.

    Args:
      tokenizer: on this host's first device alone.
      store: finished storage of the samples.
      out: output folder.

    Returns:
      File names of the pictures that were written.
    """
    in_grid, in_strips, columns = images_to_show(len(store.images()))
    draw = {
        "samples.png": lambda: image_grid(store.images()[in_grid], columns),
        "scales.png": lambda: image_strips(tokenizer.decode_steps(store.tokens()[in_strips])),
    }
    written = []
    for name, picture in draw.items():
        try:
            save_png(picture(), out / name)
        except (OSError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, OSError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            print(
                f"sample.py: warning: {out / name} could not be written: {reason}\n"
                "  samples.npz is complete; run the same command again to write it",
                file=sys.stderr,
            )
        else:
            written.append(name)
    return written


def write_pngs(images: np.ndarray, labels: np.ndarray, kind: str, folder: Path) -> None:
    """Write each image as a PNG named after its number and label.

    Args:
      images: uint8 [N, H, W, 3].
      labels: int [N].
      kind: what the labels number: `class`, `prompt` or `embedding`.
      folder: output folder.

    Raises:
      SamplesNotWritten: if the disk is full.
    """

    def write(i: int) -> None:
        save_png(Image.fromarray(images[i]), folder / f"{i:06d}_{kind}{labels[i]:04d}.png")

    with explain_write_errors(folder), ThreadPoolExecutor(PNG_WRITERS) as pool:
        for first in range(0, len(images), 1000):  # so that a full disk is noticed before the last one
            list(pool.map(write, range(first, min(first + 1000, len(images)))))


def generate_and_write(
    model: var_jax.LoadedVAR,
    tokenizer: var_jax.LoadedTokenizer,
    spec: dict,
    conditions: np.ndarray,
    labels: np.ndarray,
    prompts: list[str],
    options: SamplingOptions,
    out: Path,
) -> None:
    """Generate the images of a job and write them.

    Args:
      model: on all devices.
      tokenizer: on this host's first device alone, for the pictures.
      spec: the job (`cli.job`), on process 0.
      conditions: of each image, as `generate_batches` takes them.
      labels: int [N], classes or numbers of prompts.
      prompts: all prompts, or names of embeddings; [] with classes.
      options: sampling options.
      out: output folder.
    """
    scales = Scales(model.scales)
    per_scale = options.per_scale(scales, tokenizer.num_codes)
    refiner = model.refiner and model.refiner.module
    batch = FLAGS.batch or largest_batch(tokenizer.module, model.module, per_scale, len(labels), refiner)
    chunk = -(-batch // jax.device_count()) * jax.device_count()
    length = scales.ends[per_scale.num_maps - 1]
    shape = (model.image_size, model.image_size, 3)
    is_multihost = jax.process_count() > 1
    is_primary = jax.process_index() == 0
    if is_multihost:
        chunk = int(multihost_utils.process_allgather(np.array(chunk)).min())  # fits the memory of every host
    start = 0
    if is_primary:
        store = SampleStore(out, len(labels), shape, length, spec)
        chunk = store.resolve_chunk(chunk, is_explicit=FLAGS.batch is not None)
        start = store.resume(chunk)
    if is_multihost:
        start, chunk = (int(n) for n in multihost_utils.broadcast_one_to_all(np.array([start, chunk])))
    batches = model.generate_batches(
        conditions, FLAGS.seed, chunk, options, start=start, postprocess=denormalize_to_uint8
    )
    if is_primary:
        print("compiling, then sampling; the next call finds the program on disk", flush=True)
    progress = tqdm(
        total=len(labels), initial=start, unit="image", desc="sampling", mininterval=1, disable=not is_primary
    )
    with progress:
        for images, tokens in batches:
            if is_primary:
                store.append(images, tokens)
            progress.update(len(images))
    if is_primary:
        files = [store.finish(labels, prompts).name, "tokens.npy", *draw_pictures(tokenizer, store, out)]
        if FLAGS.pngs:
            kind = "prompt" if FLAGS.prompts else "embedding" if FLAGS.embeddings else "class"
            write_pngs(store.images(), labels, kind, out / "images")
            files.append("images/")
        summary = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(options).items())
        print(f"{len(labels)} images ({summary}): {out}: {', '.join(files)}")
    if is_multihost:  # wait for process 0 here, since JAX's own barrier at exit times out after five minutes
        multihost_utils.sync_global_devices("samples.npz")


def main(_):
    out = out_folder()
    cli.initialize_distributed()
    with cli.abort_on_error():
        model = cli.load()
        prompts, options = [], cli.options(model)
        if FLAGS.prompts is not None:
            prompts = read_prompts(FLAGS.prompts)
            with config_errors(prefix="--prompts: "):
                conditions = model.conditions(prompt=prompts)
        elif FLAGS.embeddings is not None:
            with config_errors(prefix="--embeddings: "):
                prompts, embeddings = read_embeddings(Path(FLAGS.embeddings))
                conditions = model.conditions(embeddings=embeddings)
        if prompts:
            labels = np.tile(np.arange(len(prompts)), FLAGS.num_per_class)
            conditions = conditions[labels]
        else:
            labels = conditions = chosen_labels(model)
        spec = cli.job(model, conditions, options) if jax.process_index() == 0 else {}
        tokenizer, model = model.tokenizer, model.replicate()  # frees the transformer's copy on one device
        generate_and_write(model, tokenizer, spec, conditions, labels, prompts, options, out)


if __name__ == "__main__":
    cli.run(main)
