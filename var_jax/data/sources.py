"""Prepared data sets as random-access sources of encoded images."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from var_jax.data.digits import Digits
from var_jax.errors import UserError


class DataSetMissing(UserError, FileNotFoundError):
    """A data set is not where the config says; the message tells how to prepare it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set; item i is a dict of encoded bytes `image`, `label` and its `index`.

    Attributes:
      name: of data set and split, for messages.
      records: random-access TFDS data source, images not decoded.
      class_names: of labels 0, 1, ...
      padded: length to which the end is filled up with the last item, marked by `valid` = 0.
    """

    name: str
    records: Sequence[dict]
    class_names: tuple[str, ...]
    padded: int = 0

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_records(self) -> int:
        """Items without filling."""
        return len(self.records)

    @property
    def num_images(self) -> int:
        """Images, which make an epoch; fewer than the items where these are several crops of each."""
        return self.num_records

    def __len__(self) -> int:
        return max(self.padded, self.num_records)

    def __getitem__(self, index: int) -> dict:
        valid = index < self.num_records
        return {**self._item(min(int(index), self.num_records - 1)), "valid": np.float32(valid)}

    def _item(self, index: int) -> dict:
        record = self.records[index]
        return {"image": record["image"], "label": np.int32(record["label"]), "index": index}

    def pad_to_multiple(self, size: int) -> "Source":
        """The same source, filled up to whole batches of `size`."""
        return dataclasses.replace(self, padded=-(-self.num_records // size) * size)


def open_source(name: str, split: str, data_dir: str | os.PathLike) -> Source:
    """Opens a split of a data set prepared under `data_dir` in array_record form.

    The embedded `digits` are prepared on first use.

    Raises:
      DataSetMissing: if the data set is not there; says how to prepare it.
      ValueError: if it has no such split, or is not in a random-access format.
    """
    data_dir = Path(data_dir).expanduser().absolute()
    try:
        if name == "digits":
            builder = Digits(data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
        else:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise DataSetMissing(_how_to_prepare(name, data_dir)) from error
    if split not in builder.info.splits:
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {sorted(builder.info.splits)}")
    try:
        decoders = {"image": tfds.decode.SkipDecoding()}
        records = tfds.data_source(name, split=split, data_dir=data_dir, decoders=decoders, download=False)
    except NotImplementedError as error:
        raise ValueError(
            f"data set {name!r} under {data_dir} is not in array_record form, which random access needs; "
            f"prepare it again: tfds build {name} --file_format=array_record --data_dir={data_dir}"
        ) from error
    label = builder.info.features["label"]
    return Source(f"{name}/{split}", records, tuple(label.names))


def _how_to_prepare(name: str, data_dir: Path) -> str:
    return (
        f"data set {name!r} is not prepared under {data_dir} (config.data.dir).\n"
        f"  To prepare it: pip install tensorflow, then\n"
        f"    tfds build {name} --file_format=array_record --data_dir={data_dir}\n"
        f"  (for imagenet2012, first put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into\n"
        f"  {data_dir}/downloads/manual).  If it is elsewhere: --config.data.dir=DIR.\n"
        f"  To see everything work without any data set: python train.py --config=configs/digits.py"
    )
