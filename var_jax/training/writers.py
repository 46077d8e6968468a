"""Writers of metrics: TensorBoard, CSV files and Weights & Biases, chosen by `train.writers`.

`Log` passes every line of metrics.jsonl to each of them.
"""

import abc
import contextlib
import csv
import io
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from types import ModuleType

import jax
import tensorboardX
from absl import logging
from etils import epath
from PIL import Image
from tensorboardX.record_writer import register_writer_factory

from var_jax.errors import ConfigError
from var_jax.paths import as_path, is_remote, write_atomic

WRITERS = ("tensorboard", "csv", "wandb")
MAX_WRITE_FRACTION = 0.05  # of the time, spent on writing
WANDB_RUN_FILE = "wandb_run.json"  # has the id of the W&B run, so that a resumed stage goes on with it


def parse_writers(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names in `train.writers`, which may be joined by commas on the command line.

    Raises:
      ConfigError: if one is no writer, or needs a package that is not installed (on the primary host).
    """
    joined = value if isinstance(value, str) else ",".join(value)
    names = tuple(dict.fromkeys(filter(None, joined.split(","))))
    if unknown := set(names) - set(WRITERS):
        raise ConfigError(
            f"train.writers must be some of {', '.join(WRITERS)}, got {', '.join(sorted(unknown))}"
        )
    if "wandb" in names and jax.process_index() == 0:
        import_wandb()
    return names


class Writer(abc.ABC):
    """Destination of the metrics of a stage, on the primary host only."""

    @abc.abstractmethod
    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a line; must neither fail nor wait for storage."""

    @abc.abstractmethod
    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        """Add previews by name, as for `write`."""

    @abc.abstractmethod
    def flush(self, now: bool) -> None:
        """Write to storage; without `now`, only if that does not slow training down.

        Raises:
          OSError: if that fails; the content is kept for the next call.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Write everything; errors as for `flush`."""


def open_writer(
    name: str, directory: epath.Path, stage: str, start: int, config: dict, lines: Sequence[dict]
) -> Writer:
    """Open a writer.

    Args:
      name: one of WRITERS.
      directory: directory of the stage.
      stage: its name.
      start: step to resume from.
      config: config of the stage.
      lines: lines of metrics.jsonl up to `start`.

    Raises:
      ConfigError: if W&B cannot start.
    """
    if name == "tensorboard":
        return TensorBoardWriter(directory / "tensorboard", start)
    if name == "csv":
        return CsvWriter(directory / "csv", lines)
    return WandbWriter(directory, stage, config)


# --- Files that grow


class AppendFile:
    """File to append to; flushed content survives the end of the process and of the machine.

    A local file is opened and closed at each flush, because mounts of object stores (gcsfuse) upload a file
    when it is closed. An object in a bucket cannot be appended to and is rewritten. If writing takes long, a
    flush may be deferred to a later one.
    """

    def __init__(self, path: os.PathLike, content: bytes = b""):
        """Create the file with this content, replacing an existing one."""
        self.path = as_path(path)
        self._size = len(content)
        self._pending = bytearray()
        self._remote_content = bytearray(content) if is_remote(self.path) else None
        self._next_flush = 0.0  # the earliest time
        self._lock = threading.Lock()  # guards `_pending`
        write_atomic(self.path, content)

    def write(self, content: bytes) -> None:
        """Add content, to be written by `flush`; may be called from another thread."""
        with self._lock:
            self._pending += content

    def flush(self, now: bool = False) -> None:
        """Write the pending content; without `now`, only if the last flush was long enough ago.

        Raises:
          OSError: if it cannot be written; it stays pending, and the file unchanged.
        """
        start = time.monotonic()
        content = bytes(self._pending)
        if not content or (start < self._next_flush and not now):
            return
        if self._remote_content is None:
            self._append(content)
        else:
            write_atomic(self.path, bytes(self._remote_content + content))
            self._remote_content += content
        self._size += len(content)
        with self._lock:
            del self._pending[: len(content)]
        end = time.monotonic()
        self._next_flush = end + (end - start) / MAX_WRITE_FRACTION

    def _append(self, content: bytes) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(content)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)  # remove what was partly written
            raise


# --- TensorBoard


class _EventFile:
    """TensorBoard event file that tensorboardX writes to from its thread.

    It only buffers, so nothing in that thread can fail: if the thread died, the training loop would hang in
    the tenth `add_scalar` after that. `TensorBoardWriter.flush` writes to storage.
    """

    def __init__(self, path: str):
        self.file = AppendFile(path)

    def write(self, content: bytes) -> None:
        self.file.write(content)

    def flush(self) -> None:
        pass

    close = flush


class _EventFiles:
    """Factory of the event file of one SummaryWriter, registered with tensorboardX under a path prefix."""

    PREFIX = "var_jax"

    def path(self, folder: epath.Path) -> str:
        """Register this factory, and return the path to give to SummaryWriter for a folder."""
        register_writer_factory(self.PREFIX, self)
        return f"{self.PREFIX}:{folder}"

    def directory_check(self, path: str) -> None:
        """Do nothing: AppendFile makes the folder."""

    def open(self, path: str) -> _EventFile:
        event_file = _EventFile(path.removeprefix(f"{self.PREFIX}:"))
        self.file = event_file.file
        return event_file


class TensorBoardWriter(Writer):
    """Writer of scalars `kind/name` to an event file; previews stay in `WORKDIR/<stage>/previews`."""

    def __init__(self, folder: epath.Path, start: int):
        files = _EventFiles()
        self._board = tensorboardX.SummaryWriter(
            files.path(folder), purge_step=start + 1, filename_suffix=f".{start}"
        )
        self._file = files.file

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        pass

    def flush(self, now: bool) -> None:
        self._file.flush(now)

    def close(self) -> None:
        self._board.close()
        self._file.flush(now=True)


# --- CSV


class CsvWriter(Writer):
    """Writer of a CSV file for each kind, `train.csv`, `eval.csv`, ...: a row a line, a column a metric.

    The files are written again from metrics.jsonl when the stage is resumed.
    """

    def __init__(self, folder: epath.Path, lines: Sequence[dict]):
        self._folder = folder
        self._tables: dict[str, _CsvTable] = {}
        for path in folder.glob("*.csv") if folder.exists() else ():
            path.unlink()
        for line in lines:
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
            step = numbers.pop("step")
            self.write(step, line["kind"], numbers)
        self.flush(now=True)

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        if kind not in self._tables:
            self._tables[kind] = _CsvTable(self._folder / f"{kind}.csv")
        self._tables[kind].add({"step": step, **metrics})

    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        pass

    def flush(self, now: bool) -> None:
        for table in self._tables.values():
            table.flush(now)

    def close(self) -> None:
        self.flush(now=True)


class _CsvTable:
    """CSV file whose columns are the metrics so far; it is written again when a row brings a new one."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._columns: dict[str, None] = {}  # in order
        self._rows: list[dict] = []
        self._file: AppendFile | None = None  # None: to be written again

    def add(self, row: dict) -> None:
        self._rows.append(row)
        if row.keys() <= self._columns.keys():
            if self._file:
                self._file.write(self._format([row]))
        else:
            self._columns |= dict.fromkeys(row)
            self._file = None

    def flush(self, now: bool) -> None:
        if self._file is None:
            self._file = AppendFile(self._path, self._format(self._rows, has_header=True))
        self._file.flush(now)

    def _format(self, rows: list[dict], has_header: bool = False) -> bytes:
        """Format rows; a missing value, or one that is not finite, is an empty cell."""
        text = io.StringIO()
        cells = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        if has_header:
            cells.writeheader()
        cells.writerows({k: v if math.isfinite(v) else "" for k, v in row.items()} for row in rows)
        return text.getvalue().encode()


# --- Weights & Biases


def import_wandb() -> ModuleType:
    """Import wandb.

    Raises:
      ConfigError: if it is not installed; has the command that installs it.
    """
    try:
        import wandb
        from wandb import init  # noqa: F401  a folder `wandb`, such as it leaves, can be imported too
    except ImportError as error:
        raise ConfigError(
            "train.writers names wandb, which is not installed: pip install wandb (the extra `wandb`), or "
            "leave it out"
        ) from error
    return wandb


class WandbWriter(Writer):
    """Writer to a run of Weights & Biases, which is in one group with the other stages.

    The environment of wandb applies: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE.  If wandb fails while training
    runs, training goes on without it.
    """

    def __init__(self, directory: epath.Path, stage: str, config: dict):
        self._wandb = wandb = import_wandb()
        workdir = directory.parent.name
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "var_jax"),
                group=workdir,
                name=f"{workdir} {stage}",
                job_type=stage,
                id=_wandb_run_id(directory / WANDB_RUN_FILE),
                resume="allow",
                dir=None if is_remote(directory) else os.fspath(directory),
                config=config,
            )
        except wandb.Error as error:
            raise ConfigError(
                f"train.writers: wandb cannot start: {error}\n"
                "  Log in (wandb login), write to disk (WANDB_MODE=offline), or leave wandb out."
            ) from error
        # Rows are placed by their own step: wandb drops those whose internal step is not the latest, such as
        # reports of skipped steps, and the steps that a resumed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        self._log({"step": step} | {f"{kind}/{name}": value for name, value in metrics.items()})

    def write_pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        with self._warning_on_failure():  # an Image is written to disk at once
            images = {f"preview/{name}": self._wandb.Image(picture) for name, picture in pictures.items()}
            if images:
                self._log({"step": step} | images)

    def flush(self, now: bool) -> None:
        pass  # wandb writes from a process of its own

    def close(self) -> None:
        with self._warning_on_failure():
            if self._run:
                self._run.finish()

    def _log(self, row: dict) -> None:
        with self._warning_on_failure():
            if self._run:
                self._run.log(row)

    @contextlib.contextmanager
    def _warning_on_failure(self):
        """If wandb fails, which is a ConnectionError if its process ended, warn and write to it no more."""
        try:
            yield
        except (self._wandb.Error, OSError) as error:
            logging.warning("wandb failed: %s. Training goes on; metrics.jsonl has every line.", error)
            self._run = None


def _wandb_run_id(path: epath.Path) -> str:
    """Return the id of the stage's W&B run, in the run directory; a new one is written there."""
    if path.exists():
        return json.loads(path.read_text())["id"]
    run_id = secrets.token_hex(4)
    write_atomic(path, json.dumps({"id": run_id}).encode())
    return run_id
