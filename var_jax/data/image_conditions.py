"""Captions and embeddings of the images of a folder: read, checked, and turned into arrays of one shape."""

import collections
import dataclasses
import json
import os
import reprlib
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from var_jax.conditions import encode_caption, make_vocabulary, split_words
from var_jax.data.image_folder import ImageFile, UnusableFolder, printable

MAX_WORDS = 512  # of a caption; all are padded to the longest one
# Raised by NumPy on damaged or hostile headers.
_DAMAGED_FILE_ERRORS = (OSError, ValueError, TypeError, OverflowError, MemoryError, tokenize.TokenError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    """Captions of a data set, as word ids.

    Attributes:
      texts: caption of each image that has one, with words.
      vocabulary: sorted words of the training captions.
      length: T, the number of words of the longest training caption.
    """

    texts: Mapping[Path, str]
    vocabulary: tuple[str, ...]
    length: int
    dtype = np.dtype(np.int32)

    @classmethod
    def create(cls, texts: Mapping[Path, str], files: Iterable[ImageFile]) -> "Captions":
        """Return the captions, with vocabulary and length of those of the training split.

        Raises:
          UnusableFolder: if no training image has a caption.
        """
        training = [texts[file.path] for file in files if file.split == "train" and file.path in texts]
        length = max((len(split_words(text)) for text in training), default=0)
        if not length:
            raise UnusableFolder(
                "no training image has a caption with words (--captions); caption some of them"
            )
        return cls(texts=texts, vocabulary=make_vocabulary(training), length=length)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    def array(self, path: Path) -> np.ndarray:
        """Return the word ids of an image's caption: int32 [T]; all padding if it has none."""
        return encode_caption(self.texts.get(path, ""), self.vocabulary, self.length)

    def summary(self, files: Sequence[ImageFile]) -> str:
        """Describe the captions, and count what training cannot learn from them."""
        texts = [self.texts[file.path] for file in files if file.path in self.texts]
        unknown = set(make_vocabulary(texts)).difference(self.vocabulary)
        return (
            f"captions: of {len(texts)} of {len(files)} images, at most {self.length} words long, with "
            f"{len(self.vocabulary)} distinct words"
            + f", and {len(unknown)} more in held-out captions only"
            * bool(unknown)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of a data set, one .npy file an image.

    Attributes:
      files: file of each image that has one.
      shape: (T, D), T of the longest one.
      dtype: float16 if all files have it, else float32.
    """

    files: Mapping[Path, Path]
    shape: tuple[int, int]
    dtype: np.dtype

    @classmethod
    def create(cls, files: Mapping[Path, Path]) -> "Embeddings":
        """Read and check the file of each image.

        Raises:
          UnusableFolder: naming the file that does not fit, and why.
        """
        length, dtypes, first, width = 1, set(), None, 0
        for path in files.values():
            rows = read_embedding(path)
            first, width = first or path, width or rows.shape[1]
            if rows.shape[1] != width:
                raise UnusableFolder(
                    f"{printable(path)} has D = {rows.shape[1]}, but {printable(first)} has {width}; "
                    "all must have the same"
                )
            length = max(length, len(rows))
            dtypes.add(rows.dtype)
        return cls(files=files, shape=(length, width), dtype=np.result_type(*dtypes))

    def array(self, path: Path) -> np.ndarray:
        """Return the embedding of an image, padded with zeros: [T, D]; all zeros if it has none."""
        padded = np.zeros(self.shape, self.dtype)
        if path in self.files:
            rows = read_embedding(self.files[path])
            padded[: len(rows)] = rows
        return padded

    def summary(self, files: Sequence[ImageFile]) -> str:
        """Describe the embeddings."""
        count = sum(file.path in self.files for file in files)
        return f"embeddings: of {count} of {len(files)} images, {self.dtype} {list(self.shape)}"


def read_captions(path: Path, images: Iterable[ImageFile], root: Path) -> dict[Path, str]:
    """Read a file of JSON lines {"image": path under the root, "caption": text}.

    Returns:
      The captions that have words, by path of the image.

    Raises:
      OSError: if the file cannot be read.
      UnusableFolder: naming the first line that does not fit, and why.
    """
    by_name = {str(image.path.relative_to(root)): image.path for image in images}
    form = '{"image": PATH, "caption": TEXT}'
    texts, lines = {}, {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{printable(path)}, line {number}: "
            try:
                entry = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UnusableFolder(f"{where}not JSON, {reprlib.repr(line)}; expected {form}") from error
            name, text = (entry.get(key) if isinstance(entry, dict) else None for key in ("image", "caption"))
            if not isinstance(name, str) or not isinstance(text, str):
                raise UnusableFolder(f"{where}expected {form}, both strings; got {reprlib.repr(entry)}")
            image = by_name.get(os.path.normpath(name))
            if image is None:
                raise UnusableFolder(
                    f"{where}no image {name!r} under {printable(root)}; expected a path like "
                    f"{printable(next(iter(by_name)))!r}"
                )
            if image in lines:
                raise UnusableFolder(
                    f"{where}a second caption of {name!r}, after line {lines[image]}; give one for each image"
                )
            words = len(split_words(text))
            if words > MAX_WORDS:
                raise UnusableFolder(
                    f"{where}a caption of {words} words; at most {MAX_WORDS}, to which all are padded"
                )
            lines[image] = number
            if words:
                texts[image] = text
    return texts


def find_embeddings(folder: Path, images: Sequence[ImageFile], root: Path) -> Embeddings:
    """Find and check the embeddings folder/<path under the root without its suffix>.npy.

    Raises:
      UnusableFolder: naming the file that does not fit, and why; or if there is none, or two images for one.
    """
    files = {}
    for image in images:
        path = folder / image.path.relative_to(root).with_suffix(".npy")
        if path.exists():
            files[image.path] = path
    if not files:
        example = folder / images[0].path.relative_to(root).with_suffix(".npy")
        raise UnusableFolder(f"no image has an embedding (--embeddings); expected e.g. {printable(example)}")
    path, uses = collections.Counter(files.values()).most_common(1)[0]
    if uses > 1:
        names = [printable(image.relative_to(root)) for image in files if files[image] == path]
        raise UnusableFolder(
            f"{printable(path)} is the embedding of {uses} images, {', '.join(names)}: rename one of them"
        )
    return Embeddings.create(files)


def read_embeddings(folder: Path) -> tuple[list[str], np.ndarray]:
    """Read the .npy files of a folder, in order of their names: the names, and the embeddings [N, T, D].

    Raises:
      UnusableFolder: if there are none, or naming the file that does not fit, and why.
    """
    paths = sorted(folder.glob("*.npy"))
    if not paths:
        raise UnusableFolder(f"there is no .npy file in {printable(folder)}")
    embeddings = Embeddings.create({path: path for path in paths})
    return [path.stem for path in paths], np.stack([embeddings.array(path) for path in paths])


def read_embedding(path: Path) -> np.ndarray:
    """Read an embedding without the rows of zeros at its end: float16 or float32 [T, D].

    Nothing in the file is executed.

    Raises:
      UnusableFolder: if it is no such array; the message names the file.
    """
    expected = "expected a float16 or float32 array [T, D], as written by numpy.save"
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # reads no more than the file has
    except _DAMAGED_FILE_ERRORS as error:
        raise UnusableFolder(f"{printable(path)}: {error or type(error).__name__}; {expected}") from error
    if array.ndim != 2 or 0 in array.shape or array.dtype.newbyteorder("=") not in (np.float16, np.float32):
        hint = "; for one vector, save array[None]" if array.ndim == 1 else ""
        raise UnusableFolder(f"{printable(path)} has {array.dtype} {list(array.shape)}; {expected}{hint}")
    array = np.array(array, array.dtype.newbyteorder("="))
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise UnusableFolder(
            f"{printable(path)} has {array[row, column]} at [{row}, {column}]; all numbers must be finite"
        )
    rows = array.any(axis=1)
    length = int(np.flatnonzero(rows)[-1]) + 1 if rows.any() else 0
    if not rows[:length].all():
        raise UnusableFolder(
            f"{printable(path)} has a row of zeros, [{np.argmin(rows)}], before others; zeros are padding, "
            "which comes last"
        )
    return array[:length]
