"""A folder of images as a TFDS data set: encoded bytes are passed through as they are.

`root/class/*.jpg` is labelled by the folders, `root/*.jpg` has one class.  Where `root` holds `train` and
`test` (or `val`, `validation`) folders, these are the splits; else a share of every class is held out, chosen
by the names of the files, so that the same files are held out whenever it is prepared again.
"""

import collections
import dataclasses
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from PIL import features as pillow_features

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_OPTIONAL = {".webp": "webp", ".avif": "avif"}  # by the build of Pillow
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
UNLABELLED = "image"  # the one class of a flat folder
RESOURCE_FORKS = "__MACOSX"  # folder in archives made by macOS, of files named like the images


class UnusableFolder(ValueError):
    """A folder that makes no data set."""


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One image of a folder: its path, its class and its split (`train` or `test`; empty: not decided)."""

    path: Path
    label: str
    split: str


def readable_suffixes() -> tuple[str, ...]:
    """Suffixes of the formats that this build of Pillow decodes."""
    return tuple(
        suffix for suffix in SUFFIXES if suffix not in _OPTIONAL or pillow_features.check(_OPTIONAL[suffix])
    )


def printable(path: str | os.PathLike) -> str:
    """A path for messages: bytes that are not UTF-8, which cannot be printed, as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def list_images(root: Path) -> tuple[list[ImageFile], collections.Counter]:
    """List the images under a folder, in the order of their paths.

    Links to folders and files are followed; within a class, no folder is read twice.

    Args:
      root: the folder.

    Returns:
      The images, and how many files and folders were passed over, by suffix or reason.

    Raises:
      FileNotFoundError: if there is no folder, or no image in it.
      UnusableFolder: if images lie both in class folders and beside them, or names cannot be class names.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {printable(root)}")
    passed_over = collections.Counter()
    folders = [path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    splits = {name: root / name for name in SPLIT_FOLDERS if name in folders}
    if folders == ["train"]:  # an archive of the training images alone
        splits = {"": root / "train"}
    elif "train" not in splits or len(splits) < 2:
        splits = {"": root}
    elif others := len(folders) - len(splits):
        passed_over["folders beside those of the splits"] += others
    images = []
    for name, folder in splits.items():
        paths = sorted(_image_paths(folder, passed_over))
        flat = [path for path in paths if path.parent == folder]
        if flat and len(flat) < len(paths):
            raise UnusableFolder(
                f"{printable(folder)} holds {len(flat)} images beside its folders of classes, e.g. "
                f"{printable(flat[0].name)}: put every image into a folder of its class, or all of them flat"
            )
        for path in paths:
            label = UNLABELLED if flat else path.relative_to(folder).parts[0]
            images.append(ImageFile(path, label, SPLIT_FOLDERS.get(name, "")))
    if not images:
        reasons = f"; passed over: {summary(passed_over)}" if passed_over else ""
        raise FileNotFoundError(
            f"no images ({' '.join(readable_suffixes())}) under {printable(root)}{reasons}"
        )
    _check_labels(images)
    return images, passed_over


def summary(passed_over: Mapping[str, int]) -> str:
    """`12 .heic, 3 .txt`, the most frequent first."""
    return ", ".join(
        f"{n} {what}" for what, n in sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == RESOURCE_FORKS


def _image_paths(folder: Path, passed_over: collections.Counter) -> Iterator[Path]:
    """Images anywhere under a folder; whatever else there is, is counted in `passed_over`."""

    def cannot_be_read(error: OSError) -> None:
        passed_over["folders that cannot be read"] += 1

    suffixes, real_root = readable_suffixes(), Path(os.path.realpath(folder))
    seen = collections.defaultdict(set)  # by class: two classes may be links to one folder
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=cannot_be_read):
        real, label = Path(os.path.realpath(parent)), Path(parent).relative_to(folder).parts[:1]
        if real in seen[label] or (label and real_root.is_relative_to(real)):
            passed_over["links to folders that are read already"] += 1
            folders.clear()
            continue
        seen[label].add(real)
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
    """What a file is that is no image, or None."""
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
    """Raises UnusableFolder on names that TFDS reads otherwise: it writes lines, and strips them."""
    for label in sorted({image.label for image in images}):
        try:
            label.encode()
        except UnicodeEncodeError as error:
            raise UnusableFolder(
                f"the folder '{printable(label)}' has a name that is not UTF-8: rename it"
            ) from error
        if label != label.strip() or "\n" in label or "\r" in label:
            raise UnusableFolder(
                f"the folder {label!r} has a name with spaces at its ends or a line break, which a class "
                "cannot have: rename it"
            )


def hold_out(
    images: Sequence[ImageFile], share: float, digests: Mapping[Path, str], root: Path
) -> list[ImageFile]:
    """Decide the splits of the images that have none.

    Of every class, `share` of its distinct images are held out, at least one, but not all: those whose names
    have the lowest checksums.  So a file stays where it is when others are added to other classes.  Copies of
    an image, of whatever name or class, are on the same side.

    Args:
      images: of a folder.
      share: of the images of a class.
      digests: path -> checksum of the file's bytes.
      root: folder that the names are relative to.

    Returns:
      The images in the same order, each with a split.
    """

    def rank(image: ImageFile) -> tuple[int, bytes]:
        name = os.fsencode(image.path.relative_to(root).as_posix())
        return zlib.crc32(name), name

    first_copies = {}  # of each distinct image, that which decides for all
    for image in sorted((image for image in images if not image.split), key=rank):
        first_copies.setdefault(digests[image.path], image)
    of_class = collections.defaultdict(list)
    for digest, image in first_copies.items():  # by rank
        of_class[image.label].append(digest)
    held_out = set()
    for members in of_class.values():
        held_out.update(members[: min(max(1, round(share * len(members))), len(members) - 1)])
    if not held_out and len(first_copies) > 1:  # one image a class
        held_out.update(list(first_copies)[: max(1, round(share * len(first_copies)))])
    return [
        image
        if image.split
        else dataclasses.replace(image, split="test" if digests[image.path] in held_out else "train")
        for image in images
    ]


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
