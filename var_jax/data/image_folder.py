"""A folder of images as a TFDS data set: encoded bytes are passed through as they are.

`root/class/*.jpg` is labelled by the folders, `root/*.jpg` has one class.  Where `root` holds `train` and
`test` (or `val`, `validation`) folders, these are the splits; else a share of the files is held out, chosen
by their names, so that the same files are held out whenever it is prepared again.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
UNLABELLED = "image"  # the one class of a flat folder


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image of a folder: its path, its class and its split (`train` or `test`)."""

    path: Path
    label: str
    split: str


def list_images(root: Path, held_out: float) -> list[ImageFile]:
    """Every image under a folder, in the order of their paths.

    Args:
      root: the folder.
      held_out: share of the files for the `test` split, where there are no folders for splits.

    Raises:
      FileNotFoundError: where there is no folder, or no image in it.
      ValueError: where images lie both in class folders and beside them.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    splits = {name: root / name for name in SPLIT_FOLDERS if (root / name).is_dir()}
    if "train" not in splits or len(splits) < 2:
        splits = {None: root}
    found = []
    for name, folder in splits.items():
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        flat = [path for path in paths if path.parent == folder]
        if flat and len(flat) < len(paths):
            raise ValueError(
                f"{folder} holds {len(flat)} images beside its folders of classes, e.g. {flat[0].name}: put "
                "every image into a folder of its class, or all of them flat"
            )
        for path in paths:
            label = UNLABELLED if flat else path.relative_to(folder).parts[0]
            split = _split(path.relative_to(root), held_out) if name is None else SPLIT_FOLDERS[name]
            found.append(ImageFile(path, label, split))
    if not found:
        raise FileNotFoundError(f"no images ({' '.join(SUFFIXES)}) under {root}")
    return found


def _split(path: Path, held_out: float) -> str:
    """Decided by the name alone."""
    return "test" if zlib.crc32(path.as_posix().encode()) < held_out * 2**32 else "train"


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """Builder of a data set from image files; made by `builder_of`, which gives it its name."""

    VERSION = tfds.core.Version("1.0.0")
    files: Sequence[ImageFile] = ()

    def _info(self) -> tfds.core.DatasetInfo:
        labels = sorted({file.label for file in self.files})
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=labels)}
        return tfds.core.DatasetInfo(
            builder=self, description="A folder of images.", features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str = ""):
        for i, file in enumerate(self.files):
            if file.split == split:
                yield i, {"image": file.path.read_bytes(), "label": file.label}


def builder_of(name: str, files: Sequence[ImageFile], data_dir: Path) -> ImageFolder:
    """A builder that writes these files as the data set `name` under `data_dir`, in array_record form."""
    with tfds.core.registered.skip_registration():  # which knows a name once and for all
        cls = type(name, (ImageFolder,), {"name": name, "files": files})
    return cls(data_dir=data_dir, file_format="array_record")
