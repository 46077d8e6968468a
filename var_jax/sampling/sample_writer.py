"""Samples on disk while they are made: thousands of images, never all in memory, killed at any time.

Images and tokens are appended to two flat files in `samples.partial/`; their length says how many are
done.  At the end they become `samples.npz` in the layout of the ADM evaluator, and `tokens.npy`, each in one
stream.  The comment of the zip archive that samples.npz is says which job made it.
"""

import contextlib
import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from var_jax.errors import UserError

PIECE = 2**24  # bytes copied at once


class SamplesNotWritten(UserError, OSError):
    """Samples could not be written; what was complete before is untouched."""


class OtherSamples(UserError, ValueError):
    """The folder holds unfinished samples of another kind."""


class SampleStore:
    """The samples of one call of sample.py.

    Attributes:
      path: of samples.npz.
      finished: whether samples.npz is complete, and of this job.
    """

    def __init__(self, out: Path, count: int, image_shape: tuple[int, int, int], length: int, job: dict):
        """Opens what an earlier call left, or starts.

        Args:
          out: folder of samples.npz.
          count: images in all.
          image_shape: (H, W, 3).
          length: L, tokens of an image.
          job: what decides the images, as JSON; must be the same to go on.

        Raises:
          OtherSamples: if the unfinished samples in `out` are of another job, naming what differs.
          SamplesNotWritten: if the disk has no room for all of it.
        """
        self.path, self._tokens_path = out / "samples.npz", out / "tokens.npy"
        self._folder = out / "samples.partial"
        self._count, self._image_shape, self._length = count, image_shape, length
        self._job, record = json.loads(json.dumps(job)), self._folder / "job.json"
        with explained(out):
            saved = json.loads(record.read_text()) if record.exists() else None
            self.finished = _origin(self.path).get("job") == self._job
            if self.finished:
                if saved == self._job:  # killed before its folder was gone
                    self._remove_folder()
                return
            if saved is None:  # nothing, or what a kill left of a folder that was being removed
                self._remove_folder()
                self._folder.mkdir(parents=True)
                _write_whole(record, json.dumps(self._job).encode())
            else:
                _check_same(saved, self._job, self._folder)
        each = int(np.prod(image_shape)) + 4 * length
        need = (2 * count - self.done()) * each
        if (free := shutil.disk_usage(out).free) < need:
            raise SamplesNotWritten(
                f"{out} has {free / 2**20:.1f} MiB free, but {count} images need {need / 2**20:.1f} MiB "
                "until samples.npz is complete; make room or choose another --out"
            )

    def _files(self) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Each flat file and the bytes that an image takes in it."""
        images = self._folder / "images.uint8", int(np.prod(self._image_shape))
        return images, (self._folder / "tokens.int32", 4 * self._length)

    def _remove_folder(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def done(self) -> int:
        """Images that are complete on disk."""
        if self.finished:
            return self._count
        return min(path.stat().st_size // size if path.exists() else 0 for path, size in self._files())

    def same_chunk(self, chunk: int, asked: bool = False) -> int:
        """Return the size of chunk to work with, and note it down.

        It is that of the unfinished call, if there is one, unless the user asked for this one.
        """
        if self.finished:
            return chunk
        note = self._folder / "chunk"
        with explained(self._folder.parent):
            saved = note.read_text() if note.exists() else ""
            if saved.isdecimal() and not asked:
                return int(saved)
            _write_whole(note, str(chunk).encode())
        return chunk

    def resume(self, chunk: int) -> int:
        """Drops what lies beyond the last whole chunk; returns the first image that is still to be made.

        Chunks then begin where those of an unbroken run do, so that every bit is the same.
        """
        done = self.done()
        if self.finished:
            return done
        first = done if done == self._count else done // chunk * chunk
        with explained(self._folder.parent):
            for path, size in self._files():
                with open(path, "ab") as file:
                    file.truncate(first * size)
        return first

    def append(self, images: np.ndarray, tokens: np.ndarray) -> None:
        """Adds images uint8 [n, H, W, 3] and tokens int32 [n, L]; on disk when it returns.

        Raises:
          SamplesNotWritten: if the disk is full.
        """
        with explained(self._folder.parent):
            for (path, _), array in zip(self._files(), (images, tokens), strict=True):
                with open(path, "ab") as file:
                    file.write(np.ascontiguousarray(array).tobytes())
                    _sync(file)

    def images(self) -> np.ndarray:
        """uint8 [N, H, W, 3], mapped from the disk."""
        if self.finished:
            return _mapped_member(self.path, "arr_0.npy")
        return np.memmap(self._files()[0][0], np.uint8, "r", shape=(self._count, *self._image_shape))

    def tokens(self) -> np.ndarray:
        """int32 [N, L], mapped from the disk.

        Raises:
          OSError: if tokens.npy is missing, or not of the samples in samples.npz.
        """
        if not self.finished:
            return np.memmap(self._files()[1][0], np.int32, "r", shape=(self._count, self._length))
        tokens = np.load(self._tokens_path, mmap_mode="r")
        if _checksum(tokens) != _origin(self.path)["tokens"]:
            raise OSError(f"{self._tokens_path} is not of the images in {self.path.name}")
        return tokens

    def finish(self, labels: np.ndarray) -> Path:
        """Writes samples.npz and tokens.npy, and only then removes the flat files.

        Args:
          labels: int [N].

        Returns:
          Path of samples.npz: `arr_0` uint8 [N, H, W, 3], `arr_1` int64 [N].

        Raises:
          SamplesNotWritten: if the disk is full; the samples are kept, and the same call finishes them.
        """
        if self.finished:
            return self.path
        images, tokens = self.images(), self.tokens()
        with explained(self.path.parent):
            with _replaced(self._tokens_path) as file:
                _write_array(file, tokens)
            with _replaced(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.comment = json.dumps({"job": self._job, "tokens": _checksum(tokens)}).encode()
                for name, array in (("arr_0", images), ("arr_1", labels.astype(np.int64))):
                    # A fixed date: the same samples make the same file.
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                        _write_array(member, array)
            self.finished = True
            self._remove_folder()
        return self.path


def _origin(path: Path) -> dict:
    """What the comment of a samples.npz says of it; empty where there is no such file, or it says nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            origin = json.loads(archive.comment or b"{}")
    except (FileNotFoundError, zipfile.BadZipFile, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def _mapped_member(path: Path, name: str) -> np.ndarray:
    """An array in an .npz that is not compressed, mapped from the disk."""
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name).header_offset
    with open(path, "rb") as file:
        file.seek(offset + 26)  # of the local header: lengths of the name and of the extra field, then both
        file.seek(offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2)))
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)


def _write_array(file, array: np.ndarray) -> None:
    """Writes an array in the .npy format."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    for piece in _pieces(array):
        file.write(piece)


def _pieces(array: np.ndarray) -> Iterator[bytes]:
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].tobytes()


def _checksum(array: np.ndarray) -> str:
    crc = 0
    for piece in _pieces(array):
        crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


@contextlib.contextmanager
def _replaced(path: Path):
    """A file to write that takes its name once it is whole and on the disk, its name too."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            _sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # of one that failed: it would fill the disk
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_whole(path: Path, content: bytes) -> None:
    with _replaced(path) as file:
        file.write(content)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_same(saved: dict, now: dict, folder: Path) -> None:
    different = [
        f"{name}: {saved.get(name)} there, {now.get(name)} now"
        for name in sorted(set(saved) | set(now))
        if saved.get(name) != now.get(name)
    ]
    if different:
        raise OtherSamples(
            f"{folder} holds unfinished samples of another call; remove it, use another --out, or set "
            "back\n  " + "\n  ".join(different)
        )


@contextlib.contextmanager
def explained(out: Path):
    """Turns what the disk says into what to do about it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room" if full else "mend that"
        raise SamplesNotWritten(
            f"samples could not be written under {out}: {error.strerror or error}; {hint} and run the same "
            "command again to go on"
        ) from error
