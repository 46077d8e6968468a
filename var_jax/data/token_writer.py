"""Encode the images of a data set into a token cache (`token_cache`), on all devices of this host."""

import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
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
from var_jax.tokenizer.quantizer import Quantizer

OVERHEAD = 128  # upper bound on the bytes that a file format adds to a record


class CacheMismatch(UserError, ValueError):
    """Output directory that holds another cache or other files; the message names every difference."""


class BatchEncoder:
    """Compiled encoder of up to `batch` images uint8 [n, H, W, 3], on all devices.

    Attributes:
      image_size: H and W.
      batch: maximum number of images per call.

    Raises:
      ValueError: if the batch is not a multiple of the number of devices.
    """

    def __init__(self, tokenizer: Tokenizer, params: dict, batch: int):
        mesh = make_mesh()
        if batch % mesh.size:
            raise ValueError(f"--batch={batch} must be a multiple of {mesh.size}, the number of devices")
        self.image_size = tokenizer.config.image_size
        self.batch = batch
        self._sharding = batch_sharding(mesh)
        self._params = jax.device_put(tokenizer_in_compute_dtype(params, tokenizer), replicated(mesh))
        self._encode = jax.jit(partial(_features_and_tokens, tokenizer))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encode images as tokens int32 [n, L]."""
        return self.features_and_tokens(images)[1]

    def features_and_tokens(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute the features float16 [n, h, w, C] of images, and the tokens of the float32 features."""
        # Always pad to one shape, so that the encoder is compiled once.
        padded = np.zeros((self.batch, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        features, tokens = self._encode(self._params, jax.device_put(padded, self._sharding))
        return np.asarray(features)[: len(images)], np.asarray(tokens)[: len(images)]


def _features_and_tokens(tokenizer: Tokenizer, params: dict, images: jax.Array):
    features = tokenizer.apply({"params": params}, normalize(images), method="features")
    tokens = Quantizer.create(params["quantizer"], tokenizer.config).tokenize(features)
    return features.astype(jnp.float16), tokens


def crop_record(source: Source, transform: ToPixels, seed: int | None, record: int) -> dict:
    """Return a record of a cache before encoding: record c * num_records + i is crop c of image i.

    The crop is random, a function of (seed, i, c), or the center crop if `seed` is None.
    """
    crop, image = divmod(record, source.num_records)
    return transform(source[image], None if seed is None else np.random.default_rng((seed, image, crop)))


def write_records(path: epath.Path, records: np.ndarray) -> None:
    """Write an array_record file atomically.

    Raises:
      OSError: if it cannot be written.
    """
    if is_remote(path):  # array_record writes only local files; an upload is atomic
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
        message = f"{path} could not be written: {error}; run the same command again to resume"
        raise OSError(message) from error
    partial_path.rename(path)


def claim_directory(out: epath.Path, spec: CacheSpec, command: str) -> None:
    """Write the manifest of a new cache, or check that the directory has a manifest of the same spec.

    Raises:
      CacheMismatch: if the directory holds something else; the message names every difference.
    """
    try:
        differences = CacheManifest.read(out).holds.differences(spec)
    except FileNotFoundError:
        differences = [path.name for path in sorted(out.glob("*.array_record"))[:1]]
        out.mkdir(parents=True, exist_ok=True)
        CacheManifest(spec, command).write(out)
    if differences:
        raise CacheMismatch(
            f"{out} holds something else already; remove it, or choose another --out\n  "
            + "\n  ".join(differences)
        )


def check_disk_space(out: epath.Path, spec: CacheSpec, records: int) -> None:
    """Check that the disk has room for a number of records; object storage is not checked.

    Raises:
      OSError: if it has not.
    """
    if is_remote(out):
        return
    need = records * (spec.layout.itemsize + OVERHEAD)
    free = shutil.disk_usage(out).free
    if free < need:
        raise OSError(f"{out} has {free / 2**30:.2f} GiB free, the tokens take {need / 2**30:.2f} GiB")


def write_cache(
    out: epath.Path,
    spec: CacheSpec,
    sources: tuple[Source, Source],
    encode: BatchEncoder,
    threads: int,
    command: str,
) -> None:
    """Write the missing files of a token cache, and mark it complete.

    Args:
      out: directory of the cache.
      spec: of the cache.
      sources: training and held-out images.
      encode: images to tokens, and features if the spec has them.
      threads: number of threads that read and decode ahead.
      command: command that resumes writing, for the message about an incomplete cache.

    Raises:
      CacheMismatch: if the directory holds something else.
      OSError: if there is not enough disk space, or a file cannot be written.
      CorruptImage: if an image cannot be decoded; the message names the record.
    """
    claim_directory(out, spec, command)
    train, held_out = sources
    side = encode.image_size
    train_transform = ToPixels(train.name, side, spec.resize, spec.flip, spec.shift)
    eval_transform = ToPixels(held_out.name, side, spec.resize, False)
    crops = {
        "train": partial(crop_record, train, train_transform, spec.seed),
        "eval": partial(crop_record, held_out, eval_transform, None),
    }
    shards = [(split, *shard) for split in SPLITS for shard in spec.shards(out, split).items()]
    missing = [shard for shard in shards if not shard[1].exists()]
    total, left = (sum(len(records) for *_, records in group) for group in (shards, missing))
    check_disk_space(out, spec, left)
    with tqdm(total=total, initial=total - left, unit="image", desc="encoding") as bar:
        for split, path, indices in missing:
            dataset = grain.MapDataset.range(indices.start, indices.stop).map(crops[split])
            parts = []
            for batch in read_ahead(dataset, encode.batch, threads).batch(encode.batch):
                part = np.zeros(len(batch["label"]), spec.layout)
                part["label"] = batch["label"]
                if spec.condition_shape:
                    part["condition"] = batch["condition"]
                if spec.feature_shape:
                    part["features"], part["tokens"] = encode.features_and_tokens(batch["image"])
                else:
                    part["tokens"] = encode(batch["image"])
                parts.append(part)
                bar.update(len(part))
            write_records(path, np.concatenate(parts))
    CacheManifest(spec, command, complete=True).write(out)


def make_cache_spec(
    tokenizer: Tokenizer,
    params: dict,
    sources: tuple[Source, Source],
    data: Mapping[str, Any],
    crops: int,
    seed: int,
    shard: int = 2**16,
    features: bool = False,
) -> CacheSpec:
    """Return the spec of a cache of these images and this tokenizer.

    Args:
      tokenizer, params: the tokenizer that encodes.
      sources: training and held-out images.
      data: section `data` of a config: name, train_split, eval_split, resize, flip and shift.
      crops, seed, shard: fields of `CacheSpec`.
      features: whether to keep the features.
    """
    side = tokenizer.config.schedule.side
    train, held_out = sources
    copied_fields = ("train_split", "eval_split", "resize", "flip", "shift")
    return CacheSpec(
        data=data["name"],
        **{name: data[name] for name in copied_fields},
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
        feature_shape=(side, side, tokenizer.config.code_dim) if features else (),
        condition_shape=train.condition_shape,
        condition_dtype=train.condition_dtype,
        vocabulary=train.vocabulary,
    )
