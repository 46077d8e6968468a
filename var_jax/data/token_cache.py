"""Tokens of a data set, encoded once and for all: what such a cache holds, and reading it.

`python -m var_jax.tools.encode_dataset` writes it: a directory of array_record files and `description.json`.
A record is a label (int32) and L tokens (uint16, or int32 where there are more than 65536 codes), all
little-endian.  Training records come crop after crop: record c * images + i is crop c of image i.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import logging
from etils import epath

from var_jax.data import transforms
from var_jax.data.sources import DataSetMissing, Source, readable_path
from var_jax.scales import Scales

DESCRIPTION = "description.json"
SPLITS = ("train", "eval")  # as files are called, whatever their splits are called in the data set


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache holds: all that its tokens depend on, so that equal descriptions mean equal tokens.

    Attributes:
      data: name of the data set.
      train_split: cut out at random, `crops` times.
      eval_split: cut out at the centre, once.
      train_images: in the training split.
      eval_images: in the held-out split.
      class_names: of labels 0, 1, ...
      tokenizer: fingerprint of the tokenizer.
      scales: sides of the token maps.
      num_codes: V.
      dtype: that the encoder computed in; in float32, tokens are the same on every platform.
      crops: of each training image.
      resize, flip, shift: as `ToPixels` takes them.
      seed: of the crops; crop c of image i depends on (seed, i, c) alone.
      shard: records of a file, but for the last.
      transform: `transforms.VERSION` that made the pixels; 0 in caches older than this field.
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

    @functools.cached_property
    def layout(self) -> np.dtype:
        """Of a record: a label and L tokens."""
        code = "<u2" if self.num_codes <= 2**16 else "<i4"
        return np.dtype([("label", "<i4"), ("tokens", code, (Scales(self.scales).length,))])

    def records(self, split: str) -> int:
        """Of `train` or `eval`."""
        return self.train_images * self.crops if split == "train" else self.eval_images

    def shards(self, directory: epath.Path, split: str) -> dict[epath.Path, range]:
        """The files of `train` or `eval`, in order, and the records that each holds."""
        records, size = range(self.records(split)), self.shard
        count = -(-len(records) // size)
        return {
            directory / f"{split}-{i:05d}-of-{count:05d}.array_record": records[i * size :][:size]
            for i in range(count)
        }

    def differences(self, asked: "CacheSpec") -> list[str]:
        """One line for each field in which another description is not this one."""
        fields = [field.name for field in dataclasses.fields(self)]
        pairs = [(name, getattr(self, name), getattr(asked, name)) for name in fields]
        return [f"{name}: {there!r} there, {now!r} now" for name, there, now in pairs if there != now]

    def check_data(self, asked: Mapping[str, Any]) -> None:
        """Raises ValueError, naming both, unless a section `data` of a config asks for these crops."""
        pairs = {"name": self.data, "resize": self.resize, "flip": self.flip, "shift": self.shift}
        different = [
            f"config.data.{name}: {asked[name]!r} asked for, {here!r} in the cache"
            for name, here in pairs.items()
            if asked[name] != here
        ]
        if different:
            raise ValueError(
                "the token cache (config.data.tokens) is of other images or crops than the config asks for; "
                "set what the cache has, or encode anew, into another directory\n  " + "\n  ".join(different)
            )

    def check_tokenizer(self, fingerprint: str, scales: tuple[int, ...], num_codes: int) -> None:
        """Raises ValueError, naming both, unless the tokens are those of this tokenizer."""
        asked = dataclasses.replace(self, tokenizer=fingerprint, scales=scales, num_codes=num_codes)
        if different := self.differences(asked):
            raise ValueError(
                f"the token cache (config.data.tokens) of {self.data} is of another tokenizer than that of "
                "this run (config.tokenizer); encode anew, into another directory, or name the right one\n  "
                + "\n  ".join(different)
            )

    def dtype_notice(self) -> str | None:
        """What is to be said of tokens that are not those of a float32 encoder; None of those that are."""
        if self.dtype == "float32":
            return None
        return (
            f"the token cache (config.data.tokens) of {self.data} was encoded in {self.dtype}: some of its "
            "tokens are not those that this tokenizer has in float32, in which images are encoded everywhere "
            "else (docs/precision.md); encode anew with --dtype=auto, into another directory, for these"
        )


@dataclasses.dataclass(frozen=True)
class CacheManifest:
    """The content of `description.json`.

    Attributes:
      holds: what is in the cache, or will be.
      command: that writes it, and goes on where it was stopped.
      complete: whether everything is there.
    """

    holds: CacheSpec
    command: str
    complete: bool = False

    def write(self, directory: epath.Path) -> None:
        """All of it at once, or not at all."""
        partial = directory / f"{DESCRIPTION}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        partial.replace(directory / DESCRIPTION)

    @classmethod
    def read(cls, directory: epath.Path) -> "CacheManifest":
        """Raises FileNotFoundError where there is none, ValueError on what is no description."""
        note = json.loads((directory / DESCRIPTION).read_text())
        try:
            holds = {name: tuple(v) if isinstance(v, list) else v for name, v in note["holds"].items()}
            return cls(CacheSpec(**holds), note["command"], note["complete"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory / DESCRIPTION} describes no token cache: {error!r}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSource(Source):
    """One split of a cache; item i is a dict of `tokens` int32 [L], `label` and `valid`.

    Attributes:
      description: of the cache.
      crops: records that each image has.
    """

    description: CacheSpec
    crops: int

    @property
    def num_images(self) -> int:
        return self.num_records // self.crops

    def _item(self, index: int) -> dict:
        record = np.frombuffer(self.records[index], self.description.layout)[0]
        return {"tokens": record["tokens"].astype(np.int32), "label": np.int32(record["label"])}


def open_token_cache(directory: str | os.PathLike) -> tuple[TokenSource, TokenSource]:
    """The training and the held-out split of a cache, local or gs://.

    A cache made by an older version of the transform is taken, with a warning: its tokens are those of crops
    that training does not see any more, but of crops.

    Raises:
      DataSetMissing: if there is none, or not all of it yet; says how to make or finish it.
      ValueError: if its files are not what its description says.
    """
    directory = readable_path(directory, "config.data.tokens")
    try:
        note = CacheManifest.read(directory)
    except FileNotFoundError as error:
        raise DataSetMissing(
            f"no token cache at {directory} (config.data.tokens).  To make one:\n  "
            "python -m var_jax.tools.encode_dataset --workdir=TOKENIZER --data=DATASET --data_dir=DIR "
            f"--out={directory}"
        ) from error
    holds, parts = note.holds, []
    if holds.transform != transforms.VERSION:
        logging.warning(
            "the token cache %s holds crops of transform version %d; this library makes version %d, which "
            "differs in EXIF orientation, transparency, 16-bit images and the rounding of crops",
            directory,
            holds.transform,
            transforms.VERSION,
        )
    for split in SPLITS:
        shards = holds.shards(directory, split)
        missing = [path.name for path in shards if not path.exists()]
        if missing or not note.complete:
            raise DataSetMissing(
                f"the token cache {directory} (config.data.tokens) is not complete"
                + (f", it lacks {len(missing)} files, e.g. {missing[0]}" if missing else "")
                + f".  To finish it:\n  {note.command}"
            )
        records = grain.sources.ArrayRecordDataSource([str(path) for path in shards])
        if len(records) != holds.records(split):
            raise ValueError(
                f"the token cache {directory} has {len(records)} records in {len(shards)} files like "
                f"{next(iter(shards)).name}, but {DESCRIPTION} says {holds.records(split)}"
            )
        name = f"{holds.data}/{holds.train_split if split == 'train' else holds.eval_split}"
        crops = holds.crops if split == "train" else 1
        parts.append(TokenSource(name, records, holds.class_names, description=holds, crops=crops))
    return tuple(parts)
