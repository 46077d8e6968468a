"""Token caches: data sets encoded to tokens in advance; their format, and reading them.

`python -m var_jax.tools.encode_dataset` writes a cache: a directory of array_record files and
`description.json`.  A record is a label (int32), L tokens (uint16, or int32 if there are more than 65536
codes) and, with --features, the features that they quantize (float16) and, with --condition, the caption
(word ids, int32) or the embedding (float16 or float32), all little-endian.  Training records are ordered by
crop: record c * images + i is crop c of image i.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging
from etils import epath

from var_jax.conditions import KINDS
from var_jax.data import transforms
from var_jax.data.sources import DataSetMissing, Source, readable_path, widened
from var_jax.scales import Scales

DESCRIPTION = "description.json"
ENCODE_COMMAND = "python -m var_jax.tools.encode_dataset --workdir=TOKENIZER --data=DATASET --data_dir=DIR"
SPLITS = ("train", "eval")  # in file names; the splits of the data set may have other names


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Spec of a token cache: all that its tokens depend on, so that caches of equal specs have equal tokens.

    Attributes:
      data: name of the data set.
      train_split: split of the training images, of which `crops` random crops each are encoded.
      eval_split: split of the held-out images, of which the center crop is encoded.
      train_images: number of images in the training split.
      eval_images: number of images in the held-out split.
      class_names: names of labels 0, 1, ...
      tokenizer: fingerprint of the tokenizer.
      scales: sides of the token maps.
      num_codes: V.
      dtype: dtype of the encoder's computation; in float32, tokens are the same on every platform.
      crops: number of crops of each training image.
      resize, flip, shift: fields of `ToPixels`.
      seed: of the crops; crop c of image i depends only on (seed, i, c).
      shard: number of records per file, except the last.
      transform: `transforms.VERSION` that made the pixels; 0 in caches older than this field.
      feature_shape: (h, w, C) of the features in each record; () without features.
      condition_shape, condition_dtype, vocabulary: of the captions or embeddings in each record, as in
        `Source`; empty with labels alone.
    """

    data: str
    train_split: str
    eval_split: str
    train_images: int
    eval_images: int
    class_names: tuple[str, ...]
    tokenizer: str
    scales: tuple[int, ...]
    num_codes: int
    dtype: str
    crops: int
    resize: float
    flip: bool
    shift: int
    seed: int
    shard: int
    transform: int = 0
    feature_shape: tuple[int, ...] = ()
    condition_shape: tuple[int, ...] = ()
    condition_dtype: str = ""
    vocabulary: tuple[str, ...] = ()

    @functools.cached_property
    def layout(self) -> np.dtype:
        """Structured dtype of a record: a label, L tokens, and maybe features and a condition."""
        code = "<u2" if self.num_codes <= 2**16 else "<i4"
        fields = [("label", "<i4"), ("tokens", code, (Scales(self.scales).length,))]
        if self.feature_shape:
            fields.append(("features", "<f2", self.feature_shape))
        if self.condition_shape:
            fields.append(("condition", f"<{np.dtype(self.condition_dtype).str[1:]}", self.condition_shape))
        return np.dtype(fields)

    def records(self, split: str) -> int:
        """Return the number of records in the split `train` or `eval`."""
        return self.train_images * self.crops if split == "train" else self.eval_images

    def shards(self, directory: epath.Path, split: str) -> dict[epath.Path, range]:
        """Return the files of the split `train` or `eval` in order, each with its range of record indices."""
        records = range(self.records(split))
        starts = records[:: self.shard]
        return {
            directory / f"{split}-{i:05d}-of-{len(starts):05d}.array_record": records[start:][: self.shard]
            for i, start in enumerate(starts)
        }

    def differences(self, other: "CacheSpec") -> list[str]:
        """Return one line per field in which another spec differs: this value is `there`, the other `now`."""
        fields = [field.name for field in dataclasses.fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in fields]
        return [f"{name}: {there!r} there, {now!r} now" for name, there, now in pairs if there != now]

    def check_data(self, data: Mapping[str, Any]) -> None:
        """Check that the section `data` of a config describes the images and crops of this cache.

        Raises:
          ValueError: naming the fields that differ, with both values.
        """
        cached = {"name": self.data, "resize": self.resize, "flip": self.flip, "shift": self.shift}
        differences = [
            f"config.data.{name}: {data[name]!r} asked for, {value!r} in the cache"
            for name, value in cached.items()
            if data[name] != value
        ]
        if differences:
            raise ValueError(
                "the token cache (config.data.tokens) is of other images or crops than the config asks for; "
                "set the values of the cache, or encode again into another directory\n  "
                + "\n  ".join(differences)
            )

    def check_tokenizer(self, fingerprint: str, scales: tuple[int, ...], num_codes: int) -> None:
        """Check that the tokens are of this tokenizer.

        Raises:
          ValueError: naming the fields that differ, with both values.
        """
        expected = dataclasses.replace(self, tokenizer=fingerprint, scales=scales, num_codes=num_codes)
        if differences := self.differences(expected):
            raise ValueError(
                f"the token cache (config.data.tokens) of {self.data} is of another tokenizer than that of "
                "this run (config.tokenizer); encode again into another directory, or give that tokenizer\n  "
                + "\n  ".join(differences)
            )

    def dtype_notice(self) -> str | None:
        """Return a notice if the tokens were not computed in float32; else None."""
        if self.dtype == "float32":
            return None
        return (
            f"the token cache (config.data.tokens) of {self.data} was encoded in {self.dtype}: some of its "
            "tokens are not those of the float32 encoder, which is used everywhere else (docs/precision.md); "
            "for float32 tokens, encode again with --dtype=auto into another directory"
        )


@dataclasses.dataclass(frozen=True)
class CacheManifest:
    """Content of `description.json`: the spec and the state of a cache.

    Attributes:
      holds: spec of the cache.
      command: command that writes the cache, and resumes writing it.
      complete: whether all files are written.
    """

    holds: CacheSpec
    command: str
    complete: bool = False

    def write(self, directory: epath.Path) -> None:
        """Write `description.json` atomically."""
        partial = directory / f"{DESCRIPTION}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        partial.replace(directory / DESCRIPTION)

    @classmethod
    def read(cls, directory: epath.Path) -> "CacheManifest":
        """Read `description.json`.

        Raises:
          FileNotFoundError: if there is none.
          ValueError: if it does not describe a token cache.
        """
        manifest = json.loads((directory / DESCRIPTION).read_text())
        try:
            fields = {name: tuple(v) if isinstance(v, list) else v for name, v in manifest["holds"].items()}
            command = manifest["command"].replace("var_jax.data.tokenize", "var_jax.tools.encode_dataset")
            return cls(CacheSpec(**fields), command, manifest["complete"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory / DESCRIPTION} describes no token cache: {error!r}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSource(Source):
    """One split of a token cache; an item has `tokens` int32 [L], `label`, `valid` and maybe `condition`.

    Attributes:
      description: spec of the cache.
      crops: number of records of each image.
      features: whether items have `features`, too, float16 [h, w, C].
    """

    description: CacheSpec
    crops: int
    features: bool = False

    @property
    def num_images(self) -> int:
        return self.num_records // self.crops

    @property
    def record(self) -> dict[str, Any]:
        """Return what the items depend on, to compare with that of a resumed run."""
        return dataclasses.asdict(self.description)

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Read items of a batch in one go, as `source[i]` for each i, stacked."""
        indices = np.asarray(indices)
        records = self.records.__getitems__(np.minimum(indices, self.num_records - 1).tolist())
        fields = np.frombuffer(b"".join(records), self.description.layout)
        items = {
            "tokens": fields["tokens"].astype(np.int32),
            "label": fields["label"].astype(np.int32),
            "valid": (indices < self.num_records).astype(np.float32),
        }
        if self.features:
            items["features"] = fields["features"]
        if self.condition_shape:
            items["condition"] = widened(fields["condition"])
        return items

    def __getitem__(self, index: int) -> dict:
        return {name: values[0] for name, values in self.batch([index]).items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTokenSource(TokenSource):
    """Training split of a token cache, item i with sample i of a transformer (modulo their number).

    A batch also has `sample_tokens` int32 [B, L], `sample_label` int32 [B] and, if `condition`, its like.

    Attributes:
      samples: tokens that `var_jax.tools.sample_tokens` has written.
    """

    samples: TokenSource

    @property
    def record(self) -> dict[str, Any]:
        return super().record | {"samples": self.samples.record}

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        samples = self.samples.batch(np.asarray(indices) % len(self.samples))
        names = ("tokens", "label", "condition")
        return super().batch(indices) | {f"sample_{name}": samples[name] for name in names if name in samples}


def open_token_cache(
    directory: str | os.PathLike,
    features: bool = False,
    field: str = "config.data.tokens",
    command: str = ENCODE_COMMAND,
    condition: str = "label",
) -> tuple[TokenSource, TokenSource]:
    """Open the training and held-out splits of a token cache, local or gs://.

    A cache made with an older version of the transform is accepted with a warning: its crops differ slightly
    from those that the current version makes, but are valid.

    Args:
      directory: of the cache.
      features: whether training items have features, too.
      field: config field that names it, for messages.
      command: command that makes one, for messages.
      condition: kind of the conditions; with "label", others in the cache are left unread.

    Raises:
      DataSetMissing: if there is no cache, or it is incomplete; the message says how to make or finish it.
      ValueError: if its files do not match its description, or it has no features or no such conditions.
    """
    directory = readable_path(directory, field)
    try:
        manifest = CacheManifest.read(directory)
    except FileNotFoundError as error:
        raise DataSetMissing(
            f"no token cache at {directory} ({field}).  To make one:\n  {command} --out={directory}"
        ) from error
    spec = manifest.holds
    if spec.transform != transforms.VERSION:
        logging.warning(
            "the token cache %s holds crops of transform version %d; the current version is %d, which "
            "differs in EXIF orientation, transparency, 16-bit images and the rounding of crops",
            directory,
            spec.transform,
            transforms.VERSION,
        )
    if features and not spec.feature_shape:
        raise ValueError(
            f"the token cache {directory} has no features, which config.correction requantizes; set "
            "config.correction.strength=0, or encode again with --features into another directory"
        )
    if condition not in ("label", KINDS[len(spec.condition_shape)]):
        raise ValueError(
            f"the token cache {directory} has no {condition}s, which config.model.condition asks for; encode "
            f"again with --condition={condition} into another directory"
        )
    conditions = ("condition_shape", "condition_dtype", "vocabulary") if condition != "label" else ()
    splits = []
    for split in SPLITS:
        shards = spec.shards(directory, split)
        missing = [path.name for path in shards if not path.exists()]
        if missing or not manifest.complete:
            raise DataSetMissing(
                f"the token cache {directory} ({field}) is not complete"
                + (f", it lacks {len(missing)} files, e.g. {missing[0]}" if missing else "")
                + f".  To finish it:\n  {manifest.command}"
            )
        records = grain.sources.ArrayRecordDataSource([str(path) for path in shards]) if shards else ()
        if len(records) != spec.records(split):
            raise ValueError(
                f"the token cache {directory} has {len(records)} records in {len(shards)} files like "
                f"{next(iter(shards)).name}, but {DESCRIPTION} says {spec.records(split)}"
            )
        name = f"{spec.data}/{spec.train_split if split == 'train' else spec.eval_split}"
        crops = spec.crops if split == "train" else 1
        options = dict(crops=crops, features=features and split == "train")
        options |= {field: getattr(spec, field) for field in conditions}
        splits.append(TokenSource(name, records, spec.class_names, description=spec, **options))
    return tuple(splits)
