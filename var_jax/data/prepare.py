"""Makes a data set from a folder of images.

    python -m var_jax.data.prepare --images=pictures --name=flowers --data_dir=data

Every file is decoded once, by all cores, to find those that are broken; they are listed with the reason, and
left out only with --skip_bad.  What has been checked is noted down, so that a call that was stopped goes on.
The encoded bytes are stored as they are: train with --config.data.name=flowers --config.data.dir=data.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import app, flags, logging
from tqdm import tqdm

from var_jax.data.image_folder import ImageFile, builder_of, list_images
from var_jax.data.transforms import decode

FLAGS = flags.FLAGS
SPAWN = multiprocessing.get_context("spawn")
CHUNK = 32  # files that a process checks at once


class BadImages(ValueError):
    """Some files of a folder are no images; the message lists them."""


def problem(path: Path) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        decode(path.read_bytes())
    except (ValueError, OSError) as error:
        return str(error)


def check(files: list[ImageFile], notes: Path, workers: int) -> dict[str, str | None]:
    """Decodes every file that the notes do not have yet, unchanged.

    Args:
      files: of the data set.
      notes: JSON lines of path, size, time of change and problem; appended to as files are checked.
      workers: processes.

    Returns:
      Path -> problem, or None.
    """
    known = {}
    if notes.exists():
        for line in notes.read_text().splitlines():
            try:
                path, stamp, found = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short
            known[path, tuple(stamp)] = found
    stamps = {file.path: (file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files}
    new = [path for path, stamp in stamps.items() if (str(path), stamp) not in known]
    notes.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(notes, "a") as file,
        concurrent.futures.ProcessPoolExecutor(workers, SPAWN) as pool,  # forked threads could hang
        tqdm(total=len(files), initial=len(files) - len(new), unit="image", desc="checking") as bar,
    ):
        for path, found in zip(new, pool.map(problem, new, chunksize=CHUNK), strict=True):
            known[str(path), stamps[path]] = found
            file.write(json.dumps([str(path), stamps[path], found]) + "\n")
            bar.update()
    return {str(path): known[str(path), stamp] for path, stamp in stamps.items()}


def without_bad(files: Iterable[ImageFile], problems: dict, skip_bad: bool) -> list[ImageFile]:
    """The files that are images.

    Raises:
      BadImages: listing the others, unless they are to be left out.
    """
    files = list(files)
    bad = [file for file in files if problems[str(file.path)]]
    listing = "\n".join(f"  {file.path}: {problems[str(file.path)]}" for file in bad)
    if bad and not skip_bad:
        raise BadImages(
            f"{len(bad)} of {len(files)} files cannot be decoded:\n{listing}\nMend or remove them, or leave "
            "them out with --skip_bad"
        )
    if bad:
        print(f"left out {len(bad)} of {len(files)} files that cannot be decoded:\n{listing}")
    return [file for file in files if not problems[str(file.path)]]


def prepare(
    images: Path, name: str, data_dir: Path, held_out: float, skip_bad: bool, workers: int
) -> tuple[int, int]:
    """Writes the data set `name` under `data_dir`; returns images in train and in test.

    Raises:
      ValueError: on a name that TFDS cannot have, or a folder that makes no data set.
      FileNotFoundError: where there are no images.
      FileExistsError: where there is a data set of that name.
      BadImages: listing files that cannot be decoded.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "digits":
        raise ValueError(f"--name must be small letters, digits and _, and not `digits`; found {name!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"--held_out must be a share between 0 and 1, found {held_out}")
    if (data_dir / name).exists():
        raise FileExistsError(f"{data_dir / name} is there already; remove it, or choose another --name")
    notes = data_dir / f"{name}.checked.jsonl"
    files = list_images(images.absolute(), held_out)
    files = without_bad(files, check(files, notes, workers), skip_bad)
    counts = tuple(sum(file.split == split for file in files) for split in ("train", "test"))
    if min(counts) == 0:
        raise ValueError(f"{counts[0]} images for training and {counts[1]} held out: both must have some")
    size, free = sum(file.path.stat().st_size for file in files), shutil.disk_usage(data_dir).free
    if free < 1.1 * size:
        raise OSError(f"{data_dir} has {free / 2**30:.2f} GiB free, the images take {size / 2**30:.2f} GiB")
    builder_of(name, files, data_dir).download_and_prepare(file_format="array_record")
    notes.unlink()
    return counts


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    data_dir = Path(FLAGS.data_dir).expanduser().absolute()
    try:
        counts = prepare(
            Path(FLAGS.images).expanduser(),
            FLAGS.name,
            data_dir,
            FLAGS.held_out,
            FLAGS.skip_bad,
            FLAGS.workers,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"prepare: {error}")
    print(
        f"{counts[0]} images for training, {counts[1]} held out: "
        f"--config.data.name={FLAGS.name} --config.data.dir={data_dir}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("images", None, "Folder of images: a folder a class, or flat", required=True)
    flags.DEFINE_string("name", None, "Of the data set", required=True)
    flags.DEFINE_string("data_dir", "data", "Where data sets lie")
    flags.DEFINE_float("held_out", 0.05, "Share of the images for the split `test`")
    flags.DEFINE_bool("skip_bad", False, "Leave out files that cannot be decoded")
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes that decode")
    app.run(main)
