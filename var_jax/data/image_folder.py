"""A TFDS data set from a folder of images, stored as their original encoded bytes.

Images in `root/class/*.jpg` have the folder's name as their class; images in `root/*.jpg` have one class.
If `root` has folders `train` and `test` (or `val`, `validation`), these are the splits.  Otherwise a share of
every class is held out, chosen by the names of the files, so that preparing the data set again holds out the
same files.
"""

import collections
import dataclasses
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import features as pillow_features

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_OPTIONAL_SUFFIXES = {".webp": "webp", ".avif": "avif"}  # depend on the build of Pillow
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
UNLABELLED = "image"  # the only class of a folder without class folders
RESOURCE_FORKS = "__MACOSX"  # in archives made by macOS: a folder of metadata files named like the images


class UnusableFolder(ValueError):
    """A folder that cannot be made into a data set."""


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image file with its class and its split (`train`, `test`, or empty if not decided yet)."""

    path: Path
    label: str
    split: str


def readable_suffixes() -> tuple[str, ...]:
    """Return the file suffixes of the formats that this build of Pillow can decode."""
    return tuple(
        suffix
        for suffix in IMAGE_SUFFIXES
        if suffix not in _OPTIONAL_SUFFIXES or pillow_features.check(_OPTIONAL_SUFFIXES[suffix])
    )


def printable(path: str | os.PathLike) -> str:
    """Return a path as printable text: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def list_images(root: Path) -> tuple[list[ImageFile], collections.Counter]:
    """List the images under a folder, sorted by path.

    Links to folders and files are followed; within a class, no folder is read twice.

    Args:
      root: the folder.

    Returns:
      The images, and the counts of the files and folders that were passed over, by suffix or reason.

    Raises:
      FileNotFoundError: if there is no such folder, or no image in it.
      UnusableFolder: if there are images both inside and outside of class folders, or if the name of a
        folder cannot be a class name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {printable(root)}")
    passed_over = collections.Counter()
    folders = [path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    splits = {name: root / name for name in SPLIT_FOLDERS if name in folders}
    if folders == ["train"]:  # an archive of the training images only
        splits = {"": root / "train"}
    elif "train" not in splits or len(splits) < 2:
        splits = {"": root}
    elif others := len(folders) - len(splits):
        passed_over["folders that are not splits"] += others
    images = []
    for name, folder in splits.items():
        paths = sorted(_image_paths(folder, passed_over))
        flat = [path for path in paths if path.parent == folder]
        if flat and len(flat) < len(paths):
            raise UnusableFolder(
                f"{printable(folder)} holds {len(flat)} images outside of its class folders, e.g. "
                f"{printable(flat[0].name)}: put every image into a class folder, or use no class folders"
            )
        for path in paths:
            label = UNLABELLED if flat else path.relative_to(folder).parts[0]
            images.append(ImageFile(path, label, SPLIT_FOLDERS.get(name, "")))
    if not images:
        reasons = f"; passed over: {format_counts(passed_over)}" if passed_over else ""
        raise FileNotFoundError(
            f"no images ({' '.join(readable_suffixes())}) under {printable(root)}{reasons}"
        )
    _check_labels(images)
    return images, passed_over


def format_counts(passed_over: Mapping[str, int]) -> str:
    """Format counts as `12 .heic, 3 .txt`, the most frequent first."""
    return ", ".join(
        f"{n} {kind}" for kind, n in sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == RESOURCE_FORKS


def _image_paths(folder: Path, passed_over: collections.Counter) -> Iterator[Path]:
    """Yield the paths of all images under a folder; count everything else in `passed_over`."""

    def count_unreadable(error: OSError) -> None:
        passed_over["folders that cannot be read"] += 1

    suffixes = readable_suffixes()
    real_root = Path(os.path.realpath(folder))
    visited = collections.defaultdict(set)  # real paths by class: two classes may be links to one folder
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=count_unreadable):
        real_path = Path(os.path.realpath(parent))
        label = Path(parent).relative_to(folder).parts[:1]
        if real_path in visited[label] or (label and real_root.is_relative_to(real_path)):
            passed_over["links to folders that are read already"] += 1
            folders.clear()
            continue
        visited[label].add(real_path)
        if hidden := [name for name in folders if _is_hidden(name)]:
            passed_over["hidden folders"] += len(hidden)
            folders[:] = [name for name in folders if name not in hidden]
        for name in files:
            path = Path(parent, name)
            if reason := _reason_to_pass_over(path, suffixes):
                passed_over[reason] += 1
            else:
                yield path


def _reason_to_pass_over(path: Path, suffixes: tuple[str, ...]) -> str | None:
    """Return why a file is not listed as an image, or None if it is an image."""
    if path.name.startswith("."):
        return "hidden files"
    if path.suffix.lower() not in suffixes:
        return printable(path.suffix.lower()) or "files without a suffix"
    try:
        mode = path.stat().st_mode
    except OSError:
        return "broken links" if path.is_symlink() else "files that cannot be read"
    return None if stat.S_ISREG(mode) else "files that are neither files nor folders"


def _check_labels(images: Iterable[ImageFile]) -> None:
    """Check that class names survive TFDS, which writes one name per line and strips whitespace.

    Raises:
      UnusableFolder: on a name that does not.
    """
    for label in sorted({image.label for image in images}):
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise UnusableFolder(
                f"the folder '{printable(label)}' has a name that is not UTF-8: rename it"
            ) from error
        if label != label.strip() or "\n" in label or "\r" in label:
            raise UnusableFolder(
                f"the folder {label!r} has a name that begins or ends with a space or has a line break, "
                "which a class name cannot have: rename it"
            )


def hold_out(
    images: Sequence[ImageFile], share: float, digests: Mapping[Path, str], root: Path
) -> list[ImageFile]:
    """Assign a split to the images that have none, holding out a share of every class for testing.

    In every class, `share` of its distinct images are held out, at least one but not all: those whose names
    have the lowest checksums.  So a file keeps its split when files are added to other classes.  Copies of
    an image, under any name or class, are in the same split.

    Args:
      images: of a folder.
      share: fraction of the images of a class to hold out.
      digests: path -> checksum of the file's bytes.
      root: folder that the names are relative to.

    Returns:
      The images in the same order, each with a split.
    """

    def rank(image: ImageFile) -> tuple[int, bytes]:
        name = os.fsencode(image.path.relative_to(root).as_posix())
        return zlib.crc32(name), name

    first_copies = {}  # by digest: the copy of lowest rank decides for all copies
    for image in sorted((image for image in images if not image.split), key=rank):
        first_copies.setdefault(digests[image.path], image)
    digests_by_class = collections.defaultdict(list)
    for digest, image in first_copies.items():  # in order of rank
        digests_by_class[image.label].append(digest)
    held_out = set()
    for members in digests_by_class.values():
        held_out.update(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    if not held_out and len(first_copies) > 1:  # one image per class
        held_out.update(list(first_copies)[: max(1, round(share * len(first_copies)))])
    return [
        image
        if image.split
        else dataclasses.replace(image, split="test" if digests[image.path] in held_out else "train")
        for image in images
    ]


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a data set from image files; create it with `make_builder`, which sets its name."""

    VERSION = tfds.core.Version("1.0.0")
    files: Sequence[ImageFile] = ()
    conditions: Mapping[str, Any] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        labels = sorted({file.label for file in self.files})
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=labels)}
        for name, arrays in self.conditions.items():
            features[name] = tfds.features.Tensor(
                shape=arrays.shape, dtype=arrays.dtype, encoding=tfds.features.Encoding.BYTES
            )
        metadata = None
        if "caption" in self.conditions:
            metadata = tfds.core.MetadataDict(vocabulary=self.conditions["caption"].vocabulary)
        return tfds.core.DatasetInfo(
            builder=self,
            description="A folder of images.",
            features=tfds.features.FeaturesDict(features),
            metadata=metadata,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str = ""):
        for i, file in enumerate(self.files):
            if file.split == split:
                arrays = {name: arrays.array(file.path) for name, arrays in self.conditions.items()}
                yield i, {"image": file.path.read_bytes(), "label": file.label, **arrays}


def make_builder(
    name: str, files: Sequence[ImageFile], data_dir: Path, conditions: Mapping[str, Any] | None = None
) -> ImageFolder:
    """Return a builder that writes a data set in array_record format.

    Args:
      name: of the data set.
      files: its images.
      data_dir: directory of the data sets.
      conditions: `Captions` and `Embeddings` of the images, by their kind (`var_jax.conditions.KINDS`).
    """
    with tfds.core.registered.skip_registration():  # the registry accepts a name only once per process
        cls = type(name, (ImageFolder,), {"name": name, "files": files, "conditions": conditions or {}})
    return cls(data_dir=data_dir, file_format="array_record")
