"""Measure how fast the host decodes batches of images, and estimate the cores that a training machine needs.

    python -m benchmarks.throughput input --batch=64 --threads=4
    python -m benchmarks.throughput input --data=imagenet2012 --data_dir=DIR --threads=1 --workers=8
    python -m benchmarks.throughput input --tokens --batch=512

Uses the loader and the transform of training; the machine should be otherwise idle.  Without --data it
writes a data set of JPEG photographs of ImageNet's usual size: noise whose spectrum falls off like that of
natural images (Field 1987).  With --tokens it reads a token cache instead, of random tokens, with a
sleep in place of the training step of an H200 node.
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
from etils import epath
from PIL import Image

from var_jax.data import transforms
from var_jax.data.decoding import decode_image
from var_jax.data.image_folder import ImageFile, make_builder
from var_jax.data.loader import train_batches
from var_jax.data.sources import Source, open_source
from var_jax.data.token_cache import CacheManifest, CacheSpec, TokenSource, open_token_cache
from var_jax.data.token_writer import write_records
from var_jax.data.transforms import ToPixels, resize_short_side
from var_jax.tokenizer import model as tokenizer_model
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.hardware import CHIPS as DATA_SHEETS
from var_jax.training.task import program_flops
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import training_flops

RESIZE = 1.125  # the default of configs/schema.py
CHIPS_PER_MACHINE = 8  # TPU chips or GPUs
MACHINES = ("TPU v5e", "H200")
ASSUMED_MFU = 0.45  # model FLOPs utilization of both encoder and transformer
PHOTOGRAPH = (500, 375)  # width and height: the most common size in ImageNet
QUALITY = 90  # JPEG quality that gives files of about 110 kB, the average in ImageNet
TIMED_IMAGES = 100  # by time_stages
CACHED_IMAGES = 20_000  # of a token cache


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only the mode `input` of benchmarks.throughput uses."""
    parser.add_argument("--data", help="input: name of a prepared data set; default: generated images")
    parser.add_argument("--data_dir", default="data", help="input: directory of data sets")
    parser.add_argument("--split", default="train", help="input: split of the data set")
    parser.add_argument("--images", type=int, default=512, help="input: number of generated images")
    parser.add_argument("--threads", type=int, default=16, help="input: decoding threads, in each worker")
    parser.add_argument("--workers", type=int, default=0, help="input: decoding processes; 0: none")
    parser.add_argument("--tokens", action="store_true", help="input: read a token cache instead of images")
    parser.add_argument("--step_ms", type=float, default=150.0, help="input: with --tokens, time of a step")


def make_photograph(rng: np.random.Generator) -> bytes:
    """Generate a JPEG of noise with the spectrum of a photograph: amplitude proportional to 1 / frequency."""
    width, height = PHOTOGRAPH
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency, (height, width))
    contrast = np.array([50, 12, 12])[:, None, None]  # of luma and of the two chroma planes
    planes = 128 + planes * contrast / planes.std((1, 2), keepdims=True)
    pixels = np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "YCbCr").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_photographs(folder: Path, images: int) -> Source:
    """Write a data set of generated photographs in the format of var_jax.tools.prepare, and open it."""
    rng, files = np.random.default_rng(0), []
    for i in range(images + 1):  # the first is the test split, which a data set must have
        path = folder / f"{i}.jpg"
        path.write_bytes(make_photograph(rng))
        files.append(ImageFile(path, "photograph", "train" if i else "test"))
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # only the JSON line goes to stdout
        make_builder("photographs", files, folder / "data").download_and_prepare(file_format="array_record")
    return open_source("photographs", "train", folder / "data")


def measure_loader(source: Source, transform: ToPixels, args: argparse.Namespace) -> float:
    """Measure the images/s of the training loader once its prefetch buffers are full."""
    if args.workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # required by grain's processes
    batches = train_batches(source, transform, args.batch, 0, args.threads, args.workers)
    ahead = 2 + 2 * args.workers  # prefetched batches, at least; then the rate is steady
    for _ in range(ahead):
        next(batches)
    start, count = time.perf_counter(), max(ahead, args.repeats)
    for _ in range(count):
        next(batches)
    return count * args.batch / (time.perf_counter() - start)


def make_tokens(folder: Path, config: NextScaleConfig) -> TokenSource:
    """Write a token cache of random tokens, and open its training split."""
    spec = CacheSpec(
        data="tokens",
        train_split="train",
        eval_split="test",
        train_images=CACHED_IMAGES,
        eval_images=1,
        class_names=tuple(map(str, range(config.num_classes))),
        tokenizer="random",
        scales=config.scales,
        num_codes=config.num_codes,
        dtype="float32",
        crops=1,
        resize=RESIZE,
        flip=True,
        shift=0,
        seed=0,
        shard=CACHED_IMAGES // 4,
        transform=transforms.VERSION,
    )
    rng = np.random.default_rng(0)
    for split in ("train", "eval"):
        for path, indices in spec.shards(epath.Path(folder), split).items():
            records = np.zeros(len(indices), spec.layout)
            records["tokens"] = rng.integers(config.num_codes, size=records["tokens"].shape)
            write_records(path, records)
    CacheManifest(spec, command="", complete=True).write(epath.Path(folder))
    return open_token_cache(folder)[0]


def measure_tokens(args: argparse.Namespace, config: NextScaleConfig) -> dict:
    """Measure how long a training step of `args.step_ms` waits for its batch of tokens.

    Returns:
      A dict for one line of JSON, among it `wait_ms`: the median over the steps, and `longest_wait_ms`.
    """
    with tempfile.TemporaryDirectory() as folder:
        batches = train_batches(make_tokens(Path(folder), config), None, args.batch, 0, args.threads)
        next(batches)
        waits = []
        for _ in range(max(args.repeats, 20)):
            time.sleep(args.step_ms / 1e3)
            start = time.perf_counter()
            next(batches)
            waits.append(1e3 * (time.perf_counter() - start))
    return {
        "what": "input",
        "data": "tokens",
        "batch": args.batch,
        "step_ms": args.step_ms,
        "images_per_s_wanted": round(1e3 * args.batch / args.step_ms),
        "wait_ms": round(float(np.median(waits)), 3),
        "longest_wait_ms": round(max(waits), 3),
    }


def time_stages(source: Source, transform: ToPixels) -> dict[str, float]:
    """Measure the CPU milliseconds per image to read, decode, resize, and crop and mirror, in one thread."""
    rng, count = np.random.default_rng(0), min(TIMED_IMAGES, len(source))
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
        timed("crop", transform, record, rng)  # the whole transform; decode and resize are subtracted below
    spent["crop"] = max(0.0, spent["crop"] - spent["decode"] - spent["resize"])
    return {stage: round(1e3 * seconds / count, 3) for stage, seconds in spent.items()}


def encoder_flops(tokenizer: Tokenizer) -> float:
    """Compute the FLOPs of encoding one image into tokens."""
    side = tokenizer.config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(tokenizer.init, jax.random.key(0), image)["params"]
    return program_flops(partial(tokenizer_model.encode, tokenizer), params, image)


def cores_needed(flops: float, per_core: float, at_best: float) -> dict[str, dict]:
    """Estimate the training rate of each machine, and the CPU cores that decode as many images.

    Args:
      flops: of a training step, per image.
      per_core: images/s that the loader delivers per core.
      at_best: images/s of an otherwise idle core.

    Returns:
      Machine -> images_per_s, cores and cores_at_best.
    """
    rates = {
        machine: CHIPS_PER_MACHINE * DATA_SHEETS[machine].flops * ASSUMED_MFU / flops for machine in MACHINES
    }
    return {
        f"{CHIPS_PER_MACHINE} x {machine}": {
            "images_per_s": round(rate),
            "cores": round(rate / per_core, 1),
            "cores_at_best": round(rate / at_best, 1),
        }
        for machine, rate in rates.items()
    }


def open_data(args: argparse.Namespace) -> Source | None:
    """Open the data set that --data names; return None if photographs are to be generated.

    Raises:
      DataSetMissing: if it is not prepared.
      ValueError: if it has fewer images than a batch.
    """
    source = open_source(args.data, args.split, args.data_dir) if args.data else None
    name, count = (f"data set {source.name}", len(source)) if source else ("generated data set", args.images)
    if count < args.batch:
        raise ValueError(f"{name} has {count} images, fewer than one batch of {args.batch}")
    return source


def measure_input(
    args: argparse.Namespace, tokenizer: Tokenizer, config: NextScaleConfig, source: Source | None
) -> dict:
    """Measure reading, decoding, resizing and cropping of images to train given networks.

    Args:
      args: command line of benchmarks.throughput.
      tokenizer: whose encoder runs in the training step.
      config: of the transformer.
      source: data set returned by `open_data`; None: generate photographs.

    Returns:
      A dict for one line of JSON.  Among its values:
        images_per_s: rate of the loader on all cores that this process may use.
        images_per_s_per_core: the same, per core.
        ms_per_image: CPU time of each stage.
        images_per_s_at_best: rate of one core by these times.  If it is far above images_per_s_per_core, the
          machine was busy, or threads were waiting for each other.
        needed: requirements of machines that train at ASSUMED_MFU, encoder included.
    """
    transform = ToPixels(args.data or "photographs", args.size, RESIZE, True)
    with tempfile.TemporaryDirectory() as folder:
        source = source or make_photographs(Path(folder), args.images)
        stages = time_stages(source, transform)
        rate = measure_loader(source, transform, args)
        sizes = [len(source[i]["image"]) for i in range(min(TIMED_IMAGES, len(source)))]
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
