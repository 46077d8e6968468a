"""Samples on disk while they are made: thousands of images, never all in memory, killed at any time.

Images and tokens are appended to two flat files in `samples.partial/`; their length says how many are
done.  At the end they become `samples.npz` in the layout of the ADM evaluator, in one stream.
"""

import contextlib
import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PIECE = 2**24  # bytes copied at once


class SamplesNotWritten(OSError):
    """Samples could not be written; what was complete before is untouched."""


class OtherSamples(ValueError):
    """The folder holds unfinished samples of another kind."""


class SampleStore:
    """The samples of one call of sample.py.

    Attributes:
      path: of samples.npz.
    """

    def __init__(self, out: Path, count: int, image_shape: tuple[int, int, int], length: int, job: dict):
        """Opens what an earlier call left unfinished, or starts.

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
        self.path, self._folder = out / "samples.npz", out / "samples.partial"
        self._count, self._image_shape, self._length = count, image_shape, length
        record = self._folder / "job.json"
        with _explained(out):
            self._folder.mkdir(parents=True, exist_ok=True)
            if record.exists():
                _check_same(json.loads(record.read_text()), json.loads(json.dumps(job)), self._folder)
            else:
                written = record.with_suffix(".new")
                written.write_text(json.dumps(job))
                written.replace(record)
        image, sequence = int(np.prod(image_shape)), 4 * length
        need = 2 * count * image + count * sequence - self.done() * (image + sequence)
        if (free := shutil.disk_usage(out).free) < need:
            raise SamplesNotWritten(
                f"{out} has {free / 2**20:.1f} MiB free, but {count} images need {need / 2**20:.1f} MiB "
                "until samples.npz is complete; make room or choose another --out"
            )

    def _files(self) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Each flat file and the bytes that an image takes in it."""
        images = self._folder / "images.uint8", int(np.prod(self._image_shape))
        return images, (self._folder / "tokens.int32", 4 * self._length)

    def done(self) -> int:
        """Images that are complete on disk."""
        return min(path.stat().st_size // size if path.exists() else 0 for path, size in self._files())

    def same_chunk(self, chunk: int) -> int:
        """The size of chunk that the unfinished call worked with; or else this one, noted down."""
        note = self._folder / "chunk"
        if not note.exists():
            note.write_text(str(chunk))
        return int(note.read_text())

    def resume(self, chunk: int) -> int:
        """Drops what lies beyond the last whole chunk; returns the first image that is still to be made.

        Chunks then begin where those of an unbroken run do, so that every bit is the same.
        """
        done = self.done()
        first = done if done == self._count else done // chunk * chunk
        for path, size in self._files():
            with open(path, "ab") as file:
                file.truncate(first * size)
        return first

    def append(self, images: np.ndarray, tokens: np.ndarray) -> None:
        """Adds images uint8 [n, H, W, 3] and tokens int32 [n, L]; on disk when it returns.

        Raises:
          SamplesNotWritten: if the disk is full.
        """
        with _explained(self._folder.parent):
            for (path, _), array in zip(self._files(), (images, tokens), strict=True):
                with open(path, "ab") as file:
                    file.write(np.ascontiguousarray(array).tobytes())
                    file.flush()
                    os.fsync(file.fileno())

    def images(self) -> np.ndarray:
        """uint8 [N, H, W, 3], mapped from the disk."""
        return np.memmap(self._files()[0][0], np.uint8, "r", shape=(self._count, *self._image_shape))

    def tokens(self) -> np.ndarray:
        """int32 [N, L], mapped from the disk."""
        return np.memmap(self._files()[1][0], np.int32, "r", shape=(self._count, self._length))

    def finish(self, labels: np.ndarray) -> Path:
        """Writes samples.npz (`arr_0` uint8 [N, H, W, 3], `arr_1` int64 [N]) and removes the flat files."""
        partial = self.path.with_name("samples.npz.partial")
        with _explained(self.path.parent):
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name, array in (("arr_0", self.images()), ("arr_1", labels.astype(np.int64))):
                    # A fixed date: the same samples make the same file.
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                        header = np.lib.format.header_data_from_array_1_0(array)
                        np.lib.format.write_array_header_1_0(member, header)
                        for piece in _pieces(array):
                            member.write(piece)
            partial.replace(self.path)
        shutil.rmtree(self._folder)
        return self.path


def _pieces(array: np.ndarray) -> Iterator[bytes]:
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), PIECE):
        yield flat[start : start + PIECE].tobytes()


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
def _explained(out: Path):
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
