"""Encodes the images of a data set into a token cache (`token_cache`), on all devices of this host."""

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from var_jax.data import transforms
from var_jax.data.loader import read_ahead
from var_jax.data.sources import Source
from var_jax.data.token_cache import SPLITS, CacheManifest, CacheSpec
from var_jax.data.transforms import ToPixels
from var_jax.errors import UserError
from var_jax.images import normalize
from var_jax.paths import is_remote
from var_jax.sampling.cast_params import tokenizer_in_compute_dtype
from var_jax.sharding import batch_sharding, make_mesh, replicated
from var_jax.tokenizer.model import Tokenizer, fingerprint

OVERHEAD = 128  # bytes at most that a record takes in a file beside its own


class CacheMismatch(UserError, ValueError):
    """A directory holds something else than what is to be written; names every difference."""


class BatchEncoder:
    """Turns up to `batch` images uint8 [n, H, W, 3] into tokens int32 [n, L], on all devices.

    Attributes:
      image_size: H and W.
      batch: images at once.

    Raises:
      ValueError: on a batch that the devices cannot share.
    """

    def __init__(self, tokenizer: Tokenizer, params: dict, batch: int):
        mesh = make_mesh()
        if batch % mesh.size:
            raise ValueError(f"--batch={batch} must be a multiple of {mesh.size}, the number of devices")
        self.image_size, self.batch = tokenizer.config.image_size, batch
        self._sharding = batch_sharding(mesh)
        self._params = jax.device_put(tokenizer_in_compute_dtype(params, tokenizer), replicated(mesh))
        self._program = jax.jit(
            lambda params, images: tokenizer.apply({"params": params}, normalize(images), method="encode")
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        filled = np.zeros((self.batch, *images.shape[1:]), np.uint8)  # one shape: compiled once
        filled[: len(images)] = images
        tokens = self._program(self._params, jax.device_put(filled, self._sharding))
        return np.asarray(tokens)[: len(images)]


def crop_record(source: Source, transform: ToPixels, seed: int | None, record: int) -> dict:
    """Record c * images + i of a cache, not encoded yet: crop c of image i; the centre without a seed."""
    crop, image = divmod(record, source.num_records)
    return transform(source[image], None if seed is None else np.random.default_rng((seed, image, crop)))


def write_records(path: epath.Path, records: np.ndarray) -> None:
    """Writes a file, which has its name only when it is whole.

    Raises:
      OSError: where it cannot be written.
    """
    if is_remote(path):  # where array_record writes nothing, and an object appears whole or not at all
        with tempfile.TemporaryDirectory() as folder:
            local = epath.Path(folder) / path.name
            write_records(local, records)
            path.write_bytes(local.read_bytes())
        return
    partial_path = path.with_suffix(".partial")
    try:
        writer = ArrayRecordWriter(str(partial_path))
        for record in records:
            writer.write(record.tobytes())
        writer.close()
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {error}; run the same command again to go on") from error
    partial_path.rename(path)


def claim_directory(out: epath.Path, description: CacheSpec, command: str) -> None:
    """Notes down what a directory is going to hold, or finds that it holds just that, or a part of it.

    Raises:
      OtherCache: where it holds something else; names every difference.
    """
    try:
        different = CacheManifest.read(out).holds.differences(description)
    except FileNotFoundError:
        different = [path.name for path in sorted(out.glob("*.array_record"))[:1]]
        out.mkdir(parents=True, exist_ok=True)
        CacheManifest(description, command).write(out)
    if different:
        raise CacheMismatch(
            f"{out} holds something else already; remove it, or choose another --out\n  "
            + "\n  ".join(different)
        )


def check_space(out: epath.Path, description: CacheSpec, records: int) -> None:
    """Raises OSError unless the disk has room for so many records; object storage always has."""
    if is_remote(out):
        return
    need, free = records * (description.layout.itemsize + OVERHEAD), shutil.disk_usage(out).free
    if free < need:
        raise OSError(f"{out} has {free / 2**30:.2f} GiB free, the tokens take {need / 2**30:.2f} GiB")


def write_cache(
    out: epath.Path,
    description: CacheSpec,
    sources: tuple[Source, Source],
    encode: BatchEncoder,
    threads: int,
    command: str,
) -> None:
    """Writes what a cache lacks.

    Args:
      out: directory of the cache.
      description: of what it shall hold.
      sources: training and held-out images.
      encode: images to tokens.
      threads: that read and decode ahead.
      command: that does this, to be named where the cache is found incomplete.

    Raises:
      OtherCache: where the directory holds something else.
      OSError: where there is no room.
      CorruptImage: naming a record that is no image.
    """
    claim_directory(out, description, command)
    train, held_out = sources
    spec, side = description, encode.image_size
    pixels = ToPixels(train.name, side, spec.resize, spec.flip, spec.shift)
    crops = {
        "train": partial(crop_record, train, pixels, spec.seed),
        "eval": partial(crop_record, held_out, ToPixels(held_out.name, side, spec.resize, False), None),
    }
    shards = [(split, *shard) for split in SPLITS for shard in spec.shards(out, split).items()]
    missing = [shard for shard in shards if not shard[1].exists()]
    total, left = (sum(len(records) for *_, records in some) for some in (shards, missing))
    check_space(out, spec, left)
    with tqdm(total=total, initial=total - left, unit="image", desc="encoding") as bar:
        for split, path, which in missing:
            dataset = grain.MapDataset.range(which.start, which.stop).map(crops[split])
            parts = []
            for batch in read_ahead(dataset, encode.batch, threads).batch(encode.batch):
                parts.append(np.zeros(len(batch["label"]), spec.layout))
                parts[-1]["label"], parts[-1]["tokens"] = batch["label"], encode(batch["image"])
                bar.update(len(parts[-1]))
            write_records(path, np.concatenate(parts))
    CacheManifest(spec, command, complete=True).write(out)


def describe(
    tokenizer: Tokenizer,
    params: dict,
    sources: tuple[Source, Source],
    data: Mapping[str, Any],
    crops: int,
    seed: int,
    shard: int = 2**16,
) -> CacheSpec:
    """What a cache of these images by this tokenizer holds.

    Args:
      tokenizer, params: that encode.
      sources: training and held-out images.
      data: name, train_split, eval_split, resize, flip and shift, as a config's section `data` has them.
      crops, seed, shard: as `CacheSpec` has them.
    """
    train, held_out = sources
    same = ("train_split", "eval_split", "resize", "flip", "shift")
    return CacheSpec(
        data=data["name"],
        **{name: data[name] for name in same},
        train_images=train.num_images,
        eval_images=held_out.num_images,
        class_names=train.class_names,
        tokenizer=fingerprint(params),
        scales=tokenizer.config.scales,
        num_codes=tokenizer.config.num_codes,
        dtype=tokenizer.dtype_of_encoder.name,
        crops=crops,
        seed=seed,
        shard=shard,
        transform=transforms.VERSION,
    )
