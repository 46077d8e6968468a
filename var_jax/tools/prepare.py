"""Makes a data set from a folder of images.

    python -m var_jax.tools.prepare --images=pictures --name=flowers --data_dir=data

Every file is decoded once, by all cores, to find those that are broken; they are listed with the reason, and
left out only with --skip_bad.  What has been checked is noted down, so that a call that was stopped, in
whatever way, goes on when it is given again.
The encoded bytes are stored as they are: train with --config.data.name=flowers --config.data.dir=data.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TextIO

import tensorflow_datasets as tfds
from absl import flags, logging
from tqdm import tqdm

from var_jax import cli
from var_jax.data.decoding import DecodeError, decode_image
from var_jax.data.image_folder import (
    ImageFile,
    UnusableFolder,
    format_counts,
    hold_out,
    list_images,
    make_builder,
    printable,
)
from var_jax.data.transforms import MAX_ASPECT
from var_jax.errors import config_errors
from var_jax.paths import local_path

FLAGS = flags.FLAGS
SPAWN = multiprocessing.get_context("spawn")
CHUNK = 32  # files that a process checks at once
MAX_BYTES = 2**30  # of a file: a record of TFDS holds less than 2 GiB


class BadImages(UnusableFolder):
    """Some files of a folder are no images; the message lists them."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of decoding a file: what is wrong with it, or None, and a checksum of its bytes."""

    problem: str | None
    digest: str = ""


def inspect(path: Path) -> Check:
    """Decode an image file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return Check(f"larger than {MAX_BYTES >> 20} MiB")
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        return Check(str(error) or "takes more memory than there is")
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        width, height = decode_image(data).size
    except DecodeError as error:
        return Check(str(error), digest)
    if max(width, height) > MAX_ASPECT * min(width, height):
        return Check(f"{width} x {height}: more than {MAX_ASPECT} times as long as wide", digest)
    return Check(None, digest)


def inspect_all(paths: list[Path]) -> list[Check]:
    """Decode some files."""
    return [inspect(path) for path in paths]


def _end_with_parent() -> None:
    """Exit a worker once its parent is gone, even by SIGKILL: it would wait for its next task for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Spawned processes: forked ones could hang on locks that threads of this one hold."""
    return concurrent.futures.ProcessPoolExecutor(workers, SPAWN, _end_with_parent)


def inspect_in_processes(paths: list[Path], workers: int) -> Iterator[tuple[Path, Check]]:
    """Decode files in worker processes, in any order.

    A worker that is killed, as for the memory that it takes, breaks the whole pool: the files that were being
    decoded are then decoded one at a time, and the file that ends a worker again is the one at fault.
    """
    chunks = collections.deque(paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK))
    while chunks:
        running = {}
        with _pool(workers) as pool:
            try:
                while chunks or running:
                    while chunks and len(running) < 2 * workers:
                        future = pool.submit(inspect_all, chunks[0])  # on failure, the chunk stays
                        running[future] = chunks.popleft()
                    done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                    for future in done:
                        checks = future.result()
                        yield from zip(running.pop(future), checks, strict=True)
            except BrokenProcessPool:
                pass  # `running` has the suspects
        yield from _inspect_one_by_one(path for chunk in running.values() for path in chunk)


def _inspect_one_by_one(paths: Iterable[Path]) -> Iterator[tuple[Path, Check]]:
    """Decode files in one worker process, replaced whenever a file ends it."""
    paths = collections.deque(paths)
    while paths:
        with _pool(1) as pool:
            pool.submit(os.getpid).result()  # a worker that does not even start is no fault of a file
            while paths:
                path = paths.popleft()
                try:
                    check = pool.submit(inspect_all, [path]).result()[0]
                except BrokenProcessPool:
                    yield path, Check("ends the process that decodes it (out of memory, or a crash)")
                    break
                yield path, check


@contextlib.contextmanager
def open_notes(path: Path) -> Iterator[TextIO]:
    """Open the notes of a data set for reading and appending, by one process at a time.

    Raises:
      BlockingIOError: if another process has them open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+", buffering=1) as file:  # by lines: a kill loses none
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"another `prepare` writes this data set ({path} is in use): let it finish, or stop it"
                ) from error
            except OSError:
                pass  # a file system without locks
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return
        # Removed by the process that had it before: open another.


def read_notes(notes: TextIO) -> dict[tuple[str, tuple], Check]:
    """(Path, stamp) -> check, of the notes of earlier calls; afterwards they can be appended to."""
    notes.seek(0)
    text, known = notes.read(), {}
    if text and not text.endswith("\n"):
        notes.write("\n")  # ends the line that a kill cut short
    for line in text.splitlines():
        try:
            path, stamp, problem, digest = json.loads(line)
        except ValueError:
            continue  # cut short, or of an older version, without a checksum
        known[path, tuple(stamp)] = Check(problem, digest)
    return known


def check(files: list[ImageFile], notes: TextIO, workers: int) -> dict[Path, Check]:
    """Decode every file that the notes do not have yet, unchanged.

    Args:
      files: of the data set.
      notes: JSON lines of path, size and time of change, problem and checksum; appended to.
      workers: processes.
    """
    known, stamps = read_notes(notes), {}
    for file in files:
        status = file.path.stat()
        stamps[file.path] = (status.st_size, status.st_mtime_ns)
    checks = {path: known.get((str(path), stamp)) for path, stamp in stamps.items()}
    new = [path for path, result in checks.items() if result is None]
    with tqdm(total=len(files), initial=len(files) - len(new), unit="image", desc="checking") as bar:
        for path, result in inspect_in_processes(new, workers):
            checks[path] = result
            notes.write(json.dumps([str(path), stamps[path], result.problem, result.digest]) + "\n")
            bar.update()
    return checks


def without_bad(files: list[ImageFile], checks: Mapping[Path, Check], skip_bad: bool) -> list[ImageFile]:
    """The files that are images.

    Raises:
      BadImages: listing the others, unless they are to be left out.
    """
    bad = [file for file in files if checks[file.path].problem]
    listing = "\n".join(f"  {printable(file.path)}: {checks[file.path].problem}" for file in bad)
    if bad and not skip_bad:
        raise BadImages(
            f"{len(bad)} of {len(files)} files cannot be used:\n{listing}\nMend or remove them, or leave "
            "them out with --skip_bad"
        )
    if bad:
        print(f"left out {len(bad)} of {len(files)} files that cannot be used:\n{listing}")
    return [file for file in files if not checks[file.path].problem]


def print_copies(files: list[ImageFile], checks: Mapping[Path, Check]) -> None:
    """Print how many files are copies of others, and how many of these are on both sides of the split."""
    splits = collections.defaultdict(set)
    for file in files:
        splits[checks[file.path].digest].add(file.split)
    if copies := len(files) - len(splits):
        print(f"{copies} files are copies of others, byte for byte")
    if on_both := sum(len(of_one) > 1 for of_one in splits.values()):
        print(
            f"{on_both} images are in the folder `train` and held out as well: the held-out loss will flatter"
        )


def check_arguments(
    images: str | os.PathLike, name: str, data_dir: str | os.PathLike, held_out: float
) -> tuple[Path, Path]:
    """Folder of the images and of the data sets, absolute.

    Raises:
      ValueError: on a name that TFDS cannot have, a share that is none, or a URL.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "digits":
        raise ValueError(f"--name must be small letters, digits and _, and not `digits`; got {name!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"--held_out must be a share between 0 and 1, got {held_out}")
    return Path(local_path(images, "--images")), Path(local_path(data_dir, "--data_dir"))


def prepare(
    images: str | os.PathLike,
    name: str,
    data_dir: str | os.PathLike,
    held_out: float,
    skip_bad: bool,
    workers: int,
) -> tuple[int, int]:
    """Writes the data set `name` under `data_dir`; returns images in train and in test.

    Raises:
      ValueError: on arguments that make no data set.
      UnusableFolder: on a folder that makes none.
      FileNotFoundError: where there are no images.
      FileExistsError: where there is a data set of that name.
      BlockingIOError: where another process makes it.
      BadImages: listing files that cannot be decoded.
    """
    root, data_dir = check_arguments(images, name, data_dir, held_out)
    folder, notes_path = data_dir / name, data_dir / f"{name}.checked.jsonl"
    exists = FileExistsError(f"{folder} is there already; remove it, or choose another --name")
    if _is_whole(folder) and not notes_path.exists():
        raise exists
    files, passed_over = list_images(root)
    print(f"{len(files)} images in {len({file.label for file in files})} classes under {printable(root)}")
    if passed_over:
        print(f"passed over: {format_counts(passed_over)}")
    with open_notes(notes_path) as notes:
        if _is_whole(folder):
            was_begun = bool(read_notes(notes))
            notes_path.unlink()
            if not was_begun:
                raise exists
            splits = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir).info.splits
            return splits["train"].num_examples, splits["test"].num_examples  # killed after its last write
        checks = check(files, notes, workers)
        files = without_bad(files, checks, skip_bad)
        files = hold_out(files, held_out, {path: result.digest for path, result in checks.items()}, root)
        print_copies(files, checks)
        counts = tuple(sum(file.split == split for file in files) for split in ("train", "test"))
        if min(counts) == 0:
            raise UnusableFolder(
                f"{counts[0]} images for training and {counts[1]} held out: both must have some"
            )
        shutil.rmtree(folder, ignore_errors=True)  # what a call that was killed had written
        size, free = sum(file.path.stat().st_size for file in files), shutil.disk_usage(data_dir).free
        if free < 1.1 * size:
            raise OSError(
                f"{data_dir} has {free / 2**30:.2f} GiB free, the images take {size / 2**30:.2f} GiB"
            )
        make_builder(name, files, data_dir).download_and_prepare(file_format="array_record")
        notes_path.unlink()
    return counts


def _is_whole(folder: Path) -> bool:
    """Whether a data set is more than the folders that TFDS writes to, and renames when it is done."""
    return folder.exists() and any(not path.name.startswith("incomplete.") for path in folder.iterdir())


def main(_):
    with config_errors():
        images, data_dir = check_arguments(FLAGS.images, FLAGS.name, FLAGS.data_dir, FLAGS.held_out)
    with config_errors(UnusableFolder, OSError):
        counts = prepare(images, FLAGS.name, data_dir, FLAGS.held_out, FLAGS.skip_bad, FLAGS.workers)
    print(
        f"{counts[0]} images for training, {counts[1]} held out: "
        f"--config.data.name={FLAGS.name} --config.data.dir={data_dir}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of images: a folder a class, or flat", required=True)
    flags.DEFINE_string("name", None, "Of the data set", required=True)
    flags.DEFINE_string("data_dir", "data", "Where data sets lie")
    flags.DEFINE_float("held_out", 0.05, "Share of the images of each class for the split `test`")
    flags.DEFINE_bool("skip_bad", False, "Leave out files that cannot be decoded")
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes that decode", lower_bound=1)
    cli.run(main, verbosity=logging.WARNING)
