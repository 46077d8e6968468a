"""Open prepared TFDS data sets as random-access sources of encoded images."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from var_jax.conditions import KINDS
from var_jax.data.digits import Digits
from var_jax.errors import UserError
from var_jax.paths import as_path, is_remote, local_path

# Data sets read with EXIF orientation ignored, as in the published loader.
EXIF_IGNORED = ("imagenet2012",)


class DataSetMissing(UserError, FileNotFoundError):
    """Data set not found at the path in the config; the message says how to prepare it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set; an item has `image`, `label`, `index`, `exif` and `valid`.

    `image` is the encoded bytes of an image.  With captions or embeddings, an item has a `condition`, too:
    word ids int32 [T] or vectors float32 [T, D] (`var_jax.conditions`).

    Attributes:
      name: `data set/split`, for messages.
      records: random-access TFDS data source, images not decoded.
      class_names: names of labels 0, 1, ...
      exif: whether to apply the EXIF orientation of the images.
      padded: length to which the source is padded with copies of the last item, of `valid` = 0.
      condition_shape: (T,) of captions, (T, D) of embeddings, () of labels.
      condition_dtype: dtype in which conditions are stored.
      vocabulary: words of the captions.
    """

    name: str
    records: Sequence[dict]
    class_names: tuple[str, ...]
    exif: bool = True
    padded: int = 0
    condition_shape: tuple[int, ...] = ()
    condition_dtype: str = ""
    vocabulary: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_records(self) -> int:
        """Number of items without padding."""
        return len(self.records)

    @property
    def num_images(self) -> int:
        """Number of images in an epoch; less than `num_records` if there are several crops of each image."""
        return self.num_records

    @property
    def condition(self) -> str:
        """Kind of the conditions."""
        return KINDS[len(self.condition_shape)]

    def condition_fields(self) -> dict[str, Any]:
        """Return the fields of a transformer's config that these conditions decide; none with labels."""
        if not self.condition_shape:
            return {}
        length, width = (*self.condition_shape, 0)[:2]
        return {"condition_length": length, "condition_width": width, "vocabulary": self.vocabulary}

    def __len__(self) -> int:
        return max(self.padded, self.num_records)

    def __getitem__(self, index: int) -> dict:
        valid = index < self.num_records
        return {**self._item(min(int(index), self.num_records - 1)), "valid": np.float32(valid)}

    def _item(self, index: int) -> dict:
        record = self.records[index]
        label = np.int32(record["label"])
        item = {"image": record["image"], "label": label, "index": index, "exif": self.exif}
        if self.condition_shape:
            item["condition"] = widened(record[self.condition])
        return item

    def pad_to_multiple(self, size: int) -> "Source":
        """Return this source, padded to a multiple of `size` items."""
        return dataclasses.replace(self, padded=-(-self.num_records // size) * size)


def widened(condition: np.ndarray) -> np.ndarray:
    """Return stored conditions as batches have them: int32 or float32."""
    return condition.astype(np.float32 if condition.dtype.kind == "f" else np.int32)


def readable_path(path: str | os.PathLike, name: str) -> epath.Path:
    """Return a path for reading array_record files: local or gs://, the only URLs that their reader supports.

    Raises:
      ValueError: on any other URL; names the config field or flag `name`.
    """
    return as_path(path) if os.fspath(path).startswith("gs://") else local_path(path, name)


def open_source(name: str, split: str, data_dir: str | os.PathLike, condition: str = "label") -> Source:
    """Open a split of a data set prepared under `data_dir` in array_record format.

    The embedded data set `digits` is prepared on first use.

    Args:
      name: of the data set.
      split: of the data set.
      data_dir: directory of prepared data sets, local or gs://.
      condition: kind of the conditions, one of `var_jax.conditions.KINDS`.

    Raises:
      DataSetMissing: if the data set is not there; the message says how to prepare it.
      ValueError: if it has no such split or conditions, or is not in a random-access format.
    """
    data_dir = readable_path(data_dir, "config.data.dir")
    if name == "digits" and not is_remote(data_dir):
        prepare_digits(data_dir)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise DataSetMissing(_missing_message(name, data_dir)) from error
    if split not in builder.info.splits:
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {sorted(builder.info.splits)}")
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"data set {name!r} under {data_dir} is not in array_record format, which random access needs; "
            f"prepare it again: tfds build {name} --file_format=array_record --data_dir={data_dir}"
        ) from error
    label = builder.info.features["label"]
    exif = builder.name not in EXIF_IGNORED
    source = Source(f"{name}/{split}", records, tuple(label.names), exif)
    if condition == "label":
        return source
    if condition not in KINDS:
        raise ValueError(f"the condition must be one of {', '.join(KINDS)}; got {condition!r}")
    stored = dict(builder.info.features.items()).get(condition)
    if not isinstance(stored, tfds.features.Tensor) or len(stored.shape) != KINDS.index(condition):
        raise ValueError(
            f"data set {name!r} has no {condition}s; prepare it under another --name with --{condition}s "
            "(docs/your_own_images.md)"
        )
    vocabulary = builder.info.metadata["vocabulary"] if condition == "caption" else ()
    return dataclasses.replace(
        source,
        condition_shape=stored.shape,
        condition_dtype=np.dtype(stored.np_dtype).name,
        vocabulary=tuple(vocabulary),
    )


def prepare_digits(data_dir: epath.Path) -> None:
    """Write the data set `digits` under `data_dir`, unless it exists.

    Safe for several processes and hosts at once: each writes its own copy to a temporary directory, and the
    first to finish renames it into place.
    """
    path = data_dir / "digits" / str(Digits.VERSION)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".digits.", dir=data_dir) as temporary:
        builder = Digits(data_dir=temporary, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
        try:
            builder.data_path.rename(path)
        except OSError:
            if not path.exists():
                raise


def _missing_message(name: str, data_dir: epath.Path) -> str:
    """Return the message for a data set that is not prepared, with the commands that prepare it."""
    if name == "digits":
        return (
            f"the digits are not under {data_dir} (config.data.dir); they cannot be prepared in a bucket.\n"
            f"  Prepare them in a local --config.data.dir, and copy its folder `digits` to {data_dir}."
        )
    return (
        f"data set {name!r} is not prepared under {data_dir} (config.data.dir).\n"
        "  To prepare a folder of pictures of your own:\n"
        f"    python -m var_jax.tools.prepare --images=FOLDER --name={name} --data_dir={data_dir}\n"
        f"  To prepare a data set of TensorFlow Datasets: pip install tensorflow, then\n"
        f"    tfds build {name} --file_format=array_record --data_dir={data_dir}\n"
        f"  (for imagenet2012, first put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into\n"
        f"  {data_dir}/downloads/manual).  If it is somewhere else: --config.data.dir=DIR.\n"
        f"  To try everything without a data set: python train.py --config=configs/digits.py"
    )
