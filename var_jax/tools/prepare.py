"""Prepare a data set from a folder of images.

    python -m var_jax.tools.prepare --images=pictures --name=flowers --data_dir=data

All cores decode every file once to find broken ones, which are listed with the reason, and left out only with
--skip_bad.  The results are logged, so that the same command resumes a call that was stopped or killed.  The
encoded bytes are stored unchanged.  Train with --config.data.name=flowers --config.data.dir=data.

Captions and embeddings are stored with the images, for training with --config.model.condition=caption:

    --captions=captions.jsonl    lines {"image": "star/1.jpg", "caption": "a red star"}, paths under --images
    --embeddings=DIR             DIR/star/1.npy for star/1.jpg: float16 or float32 [T, D], e.g. of CLIP or T5
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
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
from var_jax.data.image_conditions import Captions, Embeddings, find_embeddings, read_captions
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
SPAWN_CONTEXT = multiprocessing.get_context("spawn")
FILES_PER_TASK = 32  # files that a worker process checks at once
FEW_IMAGES = 10  # of a class
CLASSES_SHOWN = 20
MAX_FILE_BYTES = 2**30  # a TFDS record holds less than 2 GiB


class BadImages(UnusableFolder):
    """Error for a folder with files that are not images; the message lists them."""


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of decoding a file.

    Attributes:
      problem: reason why the file cannot be used; None if it can.
      digest: checksum of its bytes.
    """

    problem: str | None
    digest: str = ""


def inspect(path: Path) -> Check:
    """Decode an image file to check it."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return Check(f"larger than {MAX_FILE_BYTES >> 20} MiB")
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
    """Decode a list of image files to check them."""
    return [inspect(path) for path in paths]


def _exit_with_parent() -> None:
    """Exit a worker process when its parent exits, even by SIGKILL; it would wait for a task forever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """Create a pool of spawned processes; forked ones could hang on locks that threads of this one hold."""
    return concurrent.futures.ProcessPoolExecutor(workers, SPAWN_CONTEXT, _exit_with_parent)


def inspect_in_processes(paths: list[Path], workers: int) -> Iterator[tuple[Path, Check]]:
    """Decode files in worker processes, and yield the results in any order.

    A worker that is killed, e.g. for its memory use, breaks the whole pool.  The files of all running tasks
    are then decoded one at a time, and a file that kills its worker again is the broken one.
    """
    tasks = collections.deque(paths[i : i + FILES_PER_TASK] for i in range(0, len(paths), FILES_PER_TASK))
    while tasks:
        running = {}
        with _pool(workers) as pool:
            try:
                while tasks or running:
                    while tasks and len(running) < 2 * workers:
                        future = pool.submit(inspect_all, tasks[0])  # stays in the queue if this raises
                        running[future] = tasks.popleft()
                    done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                    for future in done:
                        checks = future.result()
                        yield from zip(running.pop(future), checks, strict=True)
            except BrokenProcessPool:
                pass  # `running` still has the files that may be broken
        yield from _inspect_one_by_one(path for task in running.values() for path in task)


def _inspect_one_by_one(paths: Iterable[Path]) -> Iterator[tuple[Path, Check]]:
    """Decode files in one worker process, which is replaced whenever a file kills it."""
    paths = collections.deque(paths)
    while paths:
        with _pool(1) as pool:
            pool.submit(os.getpid).result()  # raises if a worker cannot start, which no file is to blame for
            while paths:
                path = paths.popleft()
                try:
                    check = pool.submit(inspect_all, [path]).result()[0]
                except BrokenProcessPool:
                    yield path, Check("kills the process that decodes it (out of memory, or a crash)")
                    break
                yield path, check


@contextlib.contextmanager
def open_check_log(path: Path) -> Iterator[TextIO]:
    """Open the log of checked files for reading and appending, with an exclusive lock.

    Raises:
      BlockingIOError: if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+", buffering=1) as file:  # line-buffered, so that a kill loses no line
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"another `prepare` writes this data set ({path} is locked): wait for it, or stop it"
                ) from error
            except OSError:
                pass  # the file system has no locks
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return
        # The process that held the lock has removed the file: open a new one.


def read_check_log(log: TextIO) -> dict[tuple[str, tuple], Check]:
    """Read the checks of earlier calls, by (path, stamp), and leave the log ready for appending."""
    log.seek(0)
    text = log.read()
    if text and not text.endswith("\n"):
        log.write("\n")  # terminates a line that a kill cut short
    checks = {}
    for line in text.splitlines():
        try:
            path, stamp, problem, digest = json.loads(line)
        except ValueError:
            continue  # cut short, or of an older version, without a checksum
        checks[path, tuple(stamp)] = Check(problem, digest)
    return checks


def check_files(files: list[ImageFile], log: TextIO, workers: int) -> dict[Path, Check]:
    """Decode every file that is not in the log, or has changed since.

    Args:
      files: files of the data set.
      log: JSON lines of path, stamp (size and modification time), problem and checksum; appended to.
      workers: number of worker processes.
    """
    logged = read_check_log(log)
    stamps = {}
    for file in files:
        status = file.path.stat()
        stamps[file.path] = (status.st_size, status.st_mtime_ns)
    checks = {path: logged.get((str(path), stamp)) for path, stamp in stamps.items()}
    new = [path for path, check in checks.items() if check is None]
    with tqdm(total=len(files), initial=len(files) - len(new), unit="image", desc="checking") as progress:
        for path, check in inspect_in_processes(new, workers):
            checks[path] = check
            log.write(json.dumps([str(path), stamps[path], check.problem, check.digest]) + "\n")
            progress.update()
    return checks


def drop_bad_files(files: list[ImageFile], checks: Mapping[Path, Check], skip_bad: bool) -> list[ImageFile]:
    """Return the files that are images.

    Raises:
      BadImages: listing the other files, unless `skip_bad`.
    """
    bad = [file for file in files if checks[file.path].problem]
    listing = "\n".join(f"  {printable(file.path)}: {checks[file.path].problem}" for file in bad)
    if bad and not skip_bad:
        raise BadImages(
            f"{len(bad)} of {len(files)} files cannot be used:\n{listing}\nRepair or remove them, or leave "
            "them out with --skip_bad"
        )
    if bad:
        print(f"left out {len(bad)} of {len(files)} files that cannot be used:\n{listing}")
    return [file for file in files if not checks[file.path].problem]


def print_duplicates(files: list[ImageFile], checks: Mapping[Path, Check]) -> None:
    """Print the number of duplicate files, and of images that are in both splits."""
    splits = collections.defaultdict(set)
    for file in files:
        splits[checks[file.path].digest].add(file.split)
    if duplicates := len(files) - len(splits):
        print(
            f"{duplicates} files are copies of others, byte for byte: remove them, unless some images shall "
            "count more"
        )
    if in_both := sum(len(image_splits) > 1 for image_splits in splits.values()):
        print(
            f"{in_both} images are in the folder `train` and held out, too: the held-out loss will be too low"
        )


def check_arguments(
    images: str | os.PathLike, name: str, data_dir: str | os.PathLike, held_out: float
) -> tuple[Path, Path]:
    """Return the absolute folders of the images and of the data sets.

    Raises:
      ValueError: on a name that TFDS does not accept, a fraction outside (0, 1), or a URL.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "digits":
        raise ValueError(f"--name must be lowercase letters, digits and _, and not `digits`; got {name!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"--held_out must be a fraction between 0 and 1, got {held_out}")
    return Path(local_path(images, "--images")), Path(local_path(data_dir, "--data_dir"))


def prepare(
    images: str | os.PathLike,
    name: str,
    data_dir: str | os.PathLike,
    held_out: float,
    skip_bad: bool,
    workers: int,
    captions: Path | None = None,
    embeddings: Path | None = None,
) -> tuple[int, int]:
    """Write a data set of the images in a folder.

    Args:
      images: folder of images, with a folder per class, or flat.
      name: name of the data set.
      data_dir: directory of the data sets.
      held_out: fraction of the images of each class for the split `test`.
      skip_bad: leave out files that cannot be decoded.
      workers: number of processes that decode.
      captions: file of captions.
      embeddings: folder of embeddings.

    Returns:
      Number of images in the splits `train` and `test`.

    Raises:
      ValueError: naming the argument that is wrong.
      UnusableFolder: if the images do not make a data set, or captions or embeddings do not fit.
      FileNotFoundError: if there are no images.
      FileExistsError: if there is a data set of that name.
      BlockingIOError: if another process writes this data set.
      BadImages: listing files that cannot be decoded.
    """
    root, data_dir = check_arguments(images, name, data_dir, held_out)
    folder, log_path = data_dir / name, data_dir / f"{name}.checked.jsonl"
    exists = FileExistsError(f"{folder} exists already; remove it, or choose another --name")
    if _is_complete(folder) and not log_path.exists():
        raise exists
    files, ignored = list_images(root)
    print(f"{len(files)} images in {len({file.label for file in files})} classes under {printable(root)}")
    if ignored:
        print(f"passed over: {format_counts(ignored)}")
    texts = read_captions(captions, files, root) if captions else None
    conditions: dict[str, Captions | Embeddings] = {}
    if embeddings:
        conditions["embedding"] = find_embeddings(embeddings, files, root)
    with open_check_log(log_path) as log:
        if _is_complete(folder):
            was_interrupted = bool(read_check_log(log))
            log_path.unlink()
            if not was_interrupted:
                raise exists
            # A call was killed between its last write and the removal of its log.
            splits = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir).info.splits
            return splits["train"].num_examples, splits["test"].num_examples
        checks = check_files(files, log, workers)
        files = drop_bad_files(files, checks, skip_bad)
        files = hold_out(files, held_out, {path: check.digest for path, check in checks.items()}, root)
        print_duplicates(files, checks)
        print_classes(files)
        counts = tuple(sum(file.split == split for file in files) for split in ("train", "test"))
        if min(counts) == 0:
            raise UnusableFolder(
                f"{counts[0]} images for training and {counts[1]} held out: each split needs at least one"
            )
        if texts is not None:
            conditions["caption"] = Captions.create(texts, files)
        for arrays in conditions.values():
            print(arrays.summary(files))
        shutil.rmtree(folder, ignore_errors=True)  # partial output of a call that was killed
        size = sum(file.path.stat().st_size for file in files)
        size += sum(
            len(files) * math.prod(arrays.shape) * arrays.dtype.itemsize for arrays in conditions.values()
        )
        free = shutil.disk_usage(data_dir).free
        if free < 1.1 * size:
            raise OSError(
                f"{data_dir} has {free / 2**30:.2f} GiB free, but the data take {size / 2**30:.2f} GiB: "
                "make room or choose another --data_dir"
            )
        make_builder(name, files, data_dir, conditions).download_and_prepare(file_format="array_record")
        log_path.unlink()
    return counts


def print_classes(files: Iterable[ImageFile]) -> None:
    """Print number, name and number of images of each class, of the first `CLASSES_SHOWN` at most."""
    counts = sorted(collections.Counter(file.label for file in files).items())
    classes = [f"{i} {printable(label)} ({count})" for i, (label, count) in enumerate(counts)]
    print(f"classes: {', '.join(classes[:CLASSES_SHOWN] + ['...'] * (len(classes) > CLASSES_SHOWN))}")
    if small := [printable(label) for label, count in counts if count < FEW_IMAGES]:
        print(f"too few to learn, less than {FEW_IMAGES} images: {', '.join(small[:CLASSES_SHOWN])}")


def _is_complete(folder: Path) -> bool:
    """Return True if a data set has more than the folders `incomplete.*`, which TFDS renames at the end."""
    return folder.exists() and any(not path.name.startswith("incomplete.") for path in folder.iterdir())


def main(_):
    with config_errors():
        images, data_dir = check_arguments(FLAGS.images, FLAGS.name, FLAGS.data_dir, FLAGS.held_out)
        captions = FLAGS.captions and Path(local_path(FLAGS.captions, "--captions"))
        embeddings = FLAGS.embeddings and Path(local_path(FLAGS.embeddings, "--embeddings"))
    with config_errors(UnusableFolder, OSError):
        options = (FLAGS.held_out, FLAGS.skip_bad, FLAGS.workers, captions, embeddings)
        counts = prepare(images, FLAGS.name, data_dir, *options)
    print(f"{counts[0]} images for training, {counts[1]} held out, in {data_dir / FLAGS.name}")
    fields = [f"--config.{stage}.data." for stage in ("tokenizer", "next_scale")]
    overrides = " ".join(f"{field}name={FLAGS.name} {field}dir={data_dir}" for field in fields)
    if embeddings and not captions:
        overrides += " --config.next_scale.model.condition=embedding"
    config = "captions" if captions or embeddings else "shapes"
    print(f"next: python train.py --config=configs/{config}.py --workdir=runs/{FLAGS.name} {overrides}")


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of images, with a folder per class, or flat", required=True)
    flags.DEFINE_string("name", None, "Name of the data set", required=True)
    flags.DEFINE_string("data_dir", "data", "Directory of the data sets")
    flags.DEFINE_float("held_out", 0.05, "Fraction of the images of each class for the split `test`")
    flags.DEFINE_bool("skip_bad", False, "Leave out files that cannot be decoded")
    flags.DEFINE_string("captions", None, 'File of lines {"image": path under --images, "caption": text}')
    flags.DEFINE_string("embeddings", None, "Folder of .npy files [T, D], named as the images are")
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes that decode", lower_bound=1)
    cli.run(main, verbosity=logging.WARNING)
