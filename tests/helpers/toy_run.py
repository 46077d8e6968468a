"""Train the toy in one process of a run, with the flags that train.py has for several hosts.

Every process writes the checksums of the images that it feeds to each step into a file under WORKDIR/fed.
"""

import json
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import app, flags

from tests.helpers.toy import Toy, toy_stage
from var_jax.cli import abort_on_error, define_host_flags, initialize_distributed
from var_jax.data.loader import train_batches
from var_jax.data.sources import open_source
from var_jax.training import hosts, trainer
from var_jax.training.metrics import Log

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Directory of the run.")
flags.DEFINE_string("data_dir", None, "Directory of the digits.")
flags.DEFINE_integer("steps", None, "Total number of steps.")
flags.DEFINE_integer("batch", None, "Images per step.")
flags.DEFINE_float("pause", 0.0, "Minimum seconds per step.")
flags.DEFINE_integer("fails_at", 0, "Step at which process 1 fails; 0 for none.")
flags.DEFINE_integer("full_at", 0, "Step at which the disk is filled, except room for logs; 0 for none.")
flags.DEFINE_integer("ballast", 1, "Further parameters of the toy.")
flags.DEFINE_float("file_timeout", 30.0, "Seconds until all hosts must see a new file.")
define_host_flags()


class SlowLog(Log):
    def advance(self, step):
        super().advance(step)
        time.sleep(FLAGS.pause)
        if step == FLAGS.fails_at and jax.process_index() == 1:
            raise RuntimeError("the cosmic ray")
        if step == FLAGS.full_at and self.active:
            free = shutil.disk_usage(FLAGS.workdir).free
            (Path(FLAGS.workdir) / "filler").write_bytes(bytes(free - 200_000))


def recorded_batches(source, transform, batch, seed, threads, workers, start, rows) -> Iterator[dict]:
    """Yield the batches of `train_batches`, recording their images."""
    path = Path(FLAGS.workdir) / "fed" / f"{jax.process_index()}_of_{jax.process_count()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    batches = train_batches(source, transform, batch, seed, threads, workers, start, rows)
    for step, batch_of_step in enumerate(batches, start + 1):
        with path.open("a") as file:
            file.write(json.dumps([step, [zlib.crc32(image) for image in batch_of_step["image"]]]) + "\n")
        yield batch_of_step


def main(_):
    initialize_distributed()
    trainer.Log, trainer.train_batches = SlowLog, recorded_batches
    hosts.FILE_TIMEOUT = FLAGS.file_timeout
    sources = tuple(open_source("digits", split, FLAGS.data_dir) for split in ("train", "test"))
    stage = toy_stage(FLAGS.data_dir, every=5, batch=FLAGS.batch)
    with abort_on_error():
        trainer.train(
            Toy(noisy=True, ballast=FLAGS.ballast), stage, FLAGS.steps, Path(FLAGS.workdir), sources
        )


if __name__ == "__main__":
    app.run(main)
