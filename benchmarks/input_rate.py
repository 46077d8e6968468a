"""How fast the host makes batches of images, and how many cores a training machine needs for it.

    python -m benchmarks.throughput input --batch=64 --threads=4
    python -m benchmarks.throughput input --data=imagenet2012 --data_dir=DIR --threads=1 --workers=8

Goes through the loader and the transform of training; the machine should have nothing else to do.  Without
--data it makes a data set of JPEG photographs of ImageNet's usual size: noise whose spectrum falls off as
that of natural images does (Field 1987).  Training from stored tokens needs nothing of this.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from var_jax.data.decoding import decode_image
from var_jax.data.image_folder import ImageFile, make_builder
from var_jax.data.loader import train_batches
from var_jax.data.sources import Source, open_source
from var_jax.data.transforms import ToPixels, resize_short_side
from var_jax.tokenizer import model as tokenizer_model
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.hardware import CHIPS as DATA_SHEETS
from var_jax.training.task import program_flops
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import training_flops

RESIZE = 1.125  # as configs/schema.py has it
CHIPS = 8  # of a machine
MACHINES = ("TPU v5e", "H200")
ASSUMED_MFU = 0.45  # of encoder and transformer alike
PHOTOGRAPH = (500, 375)  # width, height: the commonest size in ImageNet
QUALITY = 90  # of the JPEG; gives about the 110 kB that ImageNet's files have on average
STAGED = 100  # images that the stages are timed on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only `input` heeds."""
    parser.add_argument("--data", help="input: name of a prepared data set; by default one is made")
    parser.add_argument("--data_dir", default="data", help="input: where it lies")
    parser.add_argument("--split", default="train", help="input: of the data set")
    parser.add_argument("--images", type=int, default=512, help="input: of the data set that is made")
    parser.add_argument("--threads", type=int, default=16, help="input: that decode (in each worker)")
    parser.add_argument("--workers", type=int, default=0, help="input: processes that decode instead")


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of noise with the spectrum of a photograph: amplitude in proportion to 1 / frequency."""
    width, height = PHOTOGRAPH
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency, (height, width))
    contrast = np.array([50, 12, 12])[:, None, None]  # of brightness, and of the two of colour
    planes = 128 + planes * contrast / planes.std((1, 2), keepdims=True)
    pixels = np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "YCbCr").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_photographs(folder: Path, images: int) -> Source:
    """A data set of made photographs on the disk, as var_jax.tools.prepare writes it."""
    rng, files = np.random.default_rng(0), []
    for i in range(images + 1):  # the first is held out, which a data set wants
        path = folder / f"{i}.jpg"
        path.write_bytes(photograph(rng))
        files.append(ImageFile(path, "photograph", "train" if i else "test"))
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # the line of JSON shall stand alone
        make_builder("photographs", files, folder / "data").download_and_prepare(file_format="array_record")
    return open_source("photographs", "train", folder / "data")


def loader_rate(source: Source, transform: ToPixels, args: argparse.Namespace) -> float:
    """Images/s that the training loader delivers once its buffers are full."""
    if args.workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # which grain's processes ask for
    batches = train_batches(source, transform, args.batch, 0, args.threads, args.workers)
    ahead = 2 + 2 * args.workers  # batches at least that are read ahead: from then on one in, one out
    for _ in range(ahead):
        next(batches)
    start, count = time.perf_counter(), max(ahead, args.repeats)
    for _ in range(count):
        next(batches)
    return count * args.batch / (time.perf_counter() - start)


def stage_times(source: Source, transform: ToPixels) -> dict[str, float]:
    """CPU milliseconds an image takes in one thread: to read, decode, resize, and crop and mirror."""
    rng, count = np.random.default_rng(0), min(STAGED, len(source))
    side = round(transform.size * transform.resize)
    spent = dict.fromkeys(["read", "decode", "resize", "crop"], 0.0)

    def timed(stage: str, function: Callable, *inputs):
        start = time.thread_time()
        result = function(*inputs)
        spent[stage] += time.thread_time() - start
        return result

    for i in rng.choice(len(source), count, replace=False):
        record = timed("read", source.__getitem__, i)
        timed("resize", resize_short_side, timed("decode", decode_image, record["image"]), side)
        timed("crop", transform, record, rng)  # all of it, less what was timed
    spent["crop"] = max(0.0, spent["crop"] - spent["decode"] - spent["resize"])
    return {stage: round(1e3 * seconds / count, 3) for stage, seconds in spent.items()}


def encoder_flops(tokenizer: Tokenizer) -> float:
    """FLOPs of turning one image into tokens."""
    side = tokenizer.config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(tokenizer.init, jax.random.key(0), image)["params"]
    return program_flops(partial(tokenizer_model.encode, tokenizer), params, image)


def cores_needed(flops: float, per_core: float, at_best: float) -> dict[str, dict]:
    """Machine -> images/s that it trains on, and the cores that make as many.

    Args:
      flops: of a training step, of one image.
      per_core: images/s that the loader delivers for each core.
      at_best: images/s of a core that has nothing else to do.
    """
    rates = {machine: CHIPS * DATA_SHEETS[machine].flops * ASSUMED_MFU / flops for machine in MACHINES}
    return {
        f"{CHIPS} x {machine}": {
            "images_per_s": round(rate),
            "cores": round(rate / per_core, 1),
            "cores_at_best": round(rate / at_best, 1),
        }
        for machine, rate in rates.items()
    }


def open_data(args: argparse.Namespace) -> Source | None:
    """Open the data set that --data names; None if a data set is to be made.

    Raises:
      DataSetMissing: if it is not prepared.
      ValueError: if it has fewer images than a batch.
    """
    source = open_source(args.data, args.split, args.data_dir) if args.data else None
    name, count = (f"data set {source.name}", len(source)) if source else ("the data set made", args.images)
    if count < args.batch:
        raise ValueError(f"{name} has {count} images, fewer than one batch of {args.batch}")
    return source


def input_rate(
    args: argparse.Namespace, tokenizer: Tokenizer, config: NextScaleConfig, source: Source | None
) -> dict:
    """Measures reading, decoding, resizing and cropping for training the given networks.

    Args:
      source: of `open_data`; None makes photographs.

    Returns:
      A dict for one line of JSON, in it:
        images_per_s: that the loader delivers on all cores that this process may use.
        images_per_s_per_core: the same for one of them.
        ms_per_image: CPU time of each stage.
        images_per_s_at_best: of one core, by these times.  Where it is far above images_per_s_per_core, other
          work was going on, or threads were in each other's way.
        needed: what machines need that train at ASSUMED_MFU, encoder included.
    """
    transform = ToPixels(args.data or "photographs", args.size, RESIZE, True)
    with tempfile.TemporaryDirectory() as folder:
        source = source or make_photographs(Path(folder), args.images)
        stages = stage_times(source, transform)
        rate = loader_rate(source, transform, args)
        sizes = [len(source[i]["image"]) for i in range(min(STAGED, len(source)))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_best = 1e3 / sum(stages.values())
    flops = {"encoder": encoder_flops(tokenizer), "transformer": training_flops(config)}
    return {
        "what": "input",
        "data": source.name,
        "kb_per_image": round(np.mean(sizes) / 1e3, 1),
        "depth": args.depth,
        "size": args.size,
        "batch": args.batch,
        "threads": args.threads,
        "workers": args.workers,
        "cores": cores,
        "images_per_s": round(rate, 1),
        "images_per_s_per_core": round(rate / cores, 1),
        "images_per_s_at_best": round(at_best, 1),
        "ms_per_image": stages,
        "gflops_per_image": {name: round(count / 1e9, 1) for name, count in flops.items()},
        "assumed_mfu": ASSUMED_MFU,
        "needed": cores_needed(sum(flops.values()), rate / cores, at_best),
    }
