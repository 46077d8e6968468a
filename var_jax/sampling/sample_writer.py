"""Write samples to disk while they are generated, without holding all in memory, safe against kills.

Images and tokens are appended to two flat files in `samples.partial/`, whose lengths give the number of
complete images.  At the end they are streamed into `samples.npz`, in the layout of the ADM evaluator, and
`tokens.npy`.  The comment of the zip archive samples.npz identifies the job that made it.
"""

import contextlib
import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32, UInt8

from var_jax.errors import UserError

COPY_BYTES = 2**24  # bytes copied at once


class SamplesNotWritten(UserError, OSError):
    """Error for samples that cannot be written; images that were complete before are untouched."""


class OtherSamples(UserError, ValueError):
    """Error for a folder with unfinished samples of another job."""


class SampleStore:
    """Resumable storage of the samples of one call of sample.py.

    Attributes:
      path: path of samples.npz.
      finished: True if samples.npz is complete and of this job.
    """

    def __init__(self, out: Path, count: int, image_shape: tuple[int, int, int], length: int, job: dict):
        """Open the storage that an earlier call left unfinished or finished, or create it.

        Args:
          out: folder of samples.npz.
          count: number of images of the job.
          image_shape: (H, W, 3).
          length: L, number of tokens of an image.
          job: values that decide the images, as JSON; must be the same to resume.

        Raises:
          OtherSamples: if the unfinished samples in `out` are of another job, naming the differences.
          SamplesNotWritten: if the disk has not enough free space for the job.
        """
        self.path = out / "samples.npz"
        self._tokens_path = out / "tokens.npy"
        self._folder = out / "samples.partial"
        self._count, self._image_shape, self._length = count, image_shape, length
        self._job = json.loads(json.dumps(job))
        job_path = self._folder / "job.json"
        with explain_write_errors(out):
            saved = json.loads(job_path.read_text()) if job_path.exists() else None
            self.finished = _read_origin(self.path).get("job") == self._job
            if self.finished:
                if saved == self._job:  # an earlier call was killed before it removed the folder
                    self._remove_folder()
                return
            if saved is None:  # no folder, or one whose removal was interrupted by a kill
                self._remove_folder()
                self._folder.mkdir(parents=True)
                _write_file(job_path, json.dumps(self._job).encode())
            else:
                check_same_job(saved, self._job, self._folder)
        bytes_per_image = int(np.prod(image_shape)) + 4 * length
        needed = (2 * count - self.done()) * bytes_per_image
        if (free := shutil.disk_usage(out).free) < needed:
            raise SamplesNotWritten(
                f"{out} has {free / 2**20:.1f} MiB free, but {count} images need {needed / 2**20:.1f} MiB "
                "until samples.npz is complete; make room or choose another --out"
            )

    def _files(self) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Return each flat file with the number of bytes that an image takes in it."""
        images = self._folder / "images.uint8", int(np.prod(self._image_shape))
        return images, (self._folder / "tokens.int32", 4 * self._length)

    def _remove_folder(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def done(self) -> int:
        """Return the number of images that are complete on disk."""
        if self.finished:
            return self._count
        return min(path.stat().st_size // size if path.exists() else 0 for path, size in self._files())

    def resolve_chunk(self, chunk: int, is_explicit: bool = False) -> int:
        """Return the chunk size to generate with, and record it for later calls.

        Args:
          chunk: size that this call would use.
          is_explicit: True if the user asked for this size; otherwise the size that an unfinished call
            recorded takes precedence.
        """
        if self.finished:
            return chunk
        path = self._folder / "chunk"
        with explain_write_errors(self._folder.parent):
            saved = path.read_text() if path.exists() else ""
            if saved.isdecimal() and not is_explicit:
                return int(saved)
            _write_file(path, str(chunk).encode())
        return chunk

    def resume(self, chunk: int) -> int:
        """Truncate the files to whole chunks, and return the number of the first image to generate.

        Chunks then begin where those of an uninterrupted run do, so that the result is the same bit for bit.
        """
        done = self.done()
        if self.finished:
            return done
        first = done if done == self._count else done // chunk * chunk
        with explain_write_errors(self._folder.parent):
            for path, size in self._files():
                with open(path, "ab") as file:
                    file.truncate(first * size)
        return first

    def append(self, images: UInt8[np.ndarray, "n H W 3"], tokens: Int32[np.ndarray, "n L"]) -> None:
        """Append images and their tokens, and sync them to disk.

        Raises:
          SamplesNotWritten: if the disk is full.
        """
        with explain_write_errors(self._folder.parent):
            for (path, _), array in zip(self._files(), (images, tokens), strict=True):
                with open(path, "ab") as file:
                    file.write(np.ascontiguousarray(array).tobytes())
                    _sync(file)

    def images(self) -> UInt8[np.ndarray, "N H W 3"]:
        """Return all images, memory-mapped."""
        if self.finished:
            return memmap_member(self.path, "arr_0.npy")
        return np.memmap(self._files()[0][0], np.uint8, "r", shape=(self._count, *self._image_shape))

    def tokens(self) -> Int32[np.ndarray, "N L"]:
        """Return the tokens of all images, memory-mapped.

        Raises:
          OSError: if tokens.npy is missing, or does not belong to samples.npz.
        """
        if not self.finished:
            return np.memmap(self._files()[1][0], np.int32, "r", shape=(self._count, self._length))
        tokens = np.load(self._tokens_path, mmap_mode="r")
        if _checksum(tokens) != _read_origin(self.path)["tokens"]:
            raise OSError(f"{self._tokens_path} does not belong to the images in {self.path.name}")
        return tokens

    def finish(self, labels: Int[np.ndarray, " N"], prompts: Sequence[str] = ()) -> Path:
        """Write samples.npz and tokens.npy, and only then remove the flat files.

        Args:
          labels: class of each image, or number of its prompt.
          prompts: texts that were drawn, if any.

        Returns:
          Path of samples.npz: `arr_0` uint8 [N, H, W, 3], `arr_1` int64 [N], and `prompts`, if any, str [P].

        Raises:
          SamplesNotWritten: if the disk is full; the flat files are kept, so that the same call can be
            repeated.
        """
        if self.finished:
            return self.path
        images, tokens = self.images(), self.tokens()
        with explain_write_errors(self.path.parent):
            with atomic_write(self._tokens_path) as file:
                _write_array(file, tokens)
            with atomic_write(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.comment = json.dumps({"job": self._job, "tokens": _checksum(tokens)}).encode()
                arrays = {"arr_0": images, "arr_1": labels.astype(np.int64)}
                if prompts:
                    arrays["prompts"] = np.array(prompts)
                for name, array in arrays.items():
                    # ZipInfo has a fixed date, so that the same samples give the same file.
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                        _write_array(member, array)
            self.finished = True
            self._remove_folder()
        return self.path


def _read_origin(path: Path) -> dict:
    """Read the job and the checksum of the tokens from the comment of a samples.npz; {} if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            origin = json.loads(archive.comment or b"{}")
    except (FileNotFoundError, zipfile.BadZipFile, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def memmap_member(path: Path, name: str) -> np.ndarray:
    """Memory-map an array of an uncompressed .npz file.

    Raises:
      ValueError: if it holds Python objects, or is of a format that NumPy writes for structured arrays only.
    """
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name).header_offset
    with open(path, "rb") as file:
        # The local header: at 26 the lengths of the name and of the extra field, at 30 both of these.
        file.seek(offset + 26)
        file.seek(offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2)))
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has version {version} of the .npy format, expected (1, 0)")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects")
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _write_array(file, array: np.ndarray) -> None:
    """Write an array in the .npy format."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    for block in _byte_blocks(array):
        file.write(block)


def _byte_blocks(array: np.ndarray) -> Iterator[bytes]:
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), COPY_BYTES):
        yield flat[start : start + COPY_BYTES].tobytes()


def _checksum(array: np.ndarray) -> str:
    crc = 0
    for block in _byte_blocks(array):
        crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a file for writing that gets its name when it is complete and, like its name, synced to disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            _sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # a failed write would leave the disk full
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_file(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_same_job(saved: dict, job: dict, folder: Path) -> None:
    """Raise OtherSamples, naming the differences, unless both jobs are the same."""
    differences = [
        f"{name}: {saved.get(name)} there, {job.get(name)} now"
        for name in sorted(set(saved) | set(job))
        if saved.get(name) != job.get(name)
    ]
    if differences:
        raise OtherSamples(
            f"{folder} holds unfinished samples of another call; remove it, use another --out, or set "
            "these values back:\n  " + "\n  ".join(differences)
        )


@contextlib.contextmanager
def explain_write_errors(out: Path):
    """Convert an OSError to a SamplesNotWritten that says how to go on."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room" if is_full else "fix the cause"
        raise SamplesNotWritten(
            f"samples could not be written under {out}: {error.strerror or error}; {hint} and run the same "
            "command again to go on"
        ) from error
