"""One process of a run of the toy, with the flags that train.py has for several hosts.

Writes which images it fed to each step into WORKDIR/fed, a file for each process.
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
from var_jax.cli import define_host_flags, failing_at_once, join_hosts
from var_jax.data.loader import train_batches
from var_jax.data.sources import open_source
from var_jax.training import hosts, trainer
from var_jax.training.metrics import Log

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Of the run")
flags.DEFINE_string("data_dir", None, "Where the digits are")
flags.DEFINE_integer("steps", None, "In all")
flags.DEFINE_integer("batch", None, "Images a step")
flags.DEFINE_float("pause", 0.0, "Seconds that a step takes at least")
flags.DEFINE_integer("fails_at", 0, "Step at which process 1 fails")
flags.DEFINE_integer("full_at", 0, "Step at which something else fills the disk, but for room for logs")
flags.DEFINE_integer("ballast", 1, "Of the toy")
flags.DEFINE_float("seen_within", 30.0, "Seconds for a file to be seen by all hosts")
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


def noted_batches(source, transform, batch, seed, threads, workers, start, rows) -> Iterator[dict]:
    """As `train_batches`; writes down their images."""
    path = Path(FLAGS.workdir) / "fed" / f"{jax.process_index()}_of_{jax.process_count()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    batches = train_batches(source, transform, batch, seed, threads, workers, start, rows)
    for step, result in enumerate(batches, start + 1):
        with path.open("a") as file:
            file.write(json.dumps([step, [zlib.crc32(image) for image in result["image"]]]) + "\n")
        yield result


def main(_):
    join_hosts()
    trainer.Log, trainer.train_batches = SlowLog, noted_batches
    hosts.SEEN_WITHIN = FLAGS.seen_within
    sources = tuple(open_source("digits", split, FLAGS.data_dir) for split in ("train", "test"))
    stage = toy_stage(FLAGS.data_dir, every=5, batch=FLAGS.batch)
    with failing_at_once():
        trainer.train(
            Toy(noisy=True, ballast=FLAGS.ballast), stage, FLAGS.steps, Path(FLAGS.workdir), sources
        )


if __name__ == "__main__":
    app.run(main)
