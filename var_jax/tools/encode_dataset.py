"""Encode a data set into tokens once, so that training a transformer needs neither images nor the encoder.

    python -m var_jax.tools.encode_dataset --workdir=runs/tokenizer --data=imagenet2012 --data_dir=DATA \\
        --eval_split=validation --crops=10 --flip --out=TOKENS
    python train.py --config=configs/var.py:d16 --workdir=runs/d16 --config.tokenizer=runs/tokenizer \\
        --config.data.tokens=TOKENS

Each training image is cropped at random `--crops` times, each held-out image once at the center.  Threads
decode images ahead of the devices of this host, which all encode.  The same command resumes a call that was
stopped, with the files that are missing.
"""

import shlex
import sys

from absl import flags
from etils import epath

from var_jax import cli
from var_jax.conditions import KINDS
from var_jax.data.sources import Source, open_source, readable_path
from var_jax.data.token_cache import CacheSpec
from var_jax.data.token_writer import BatchEncoder, make_cache_spec, write_cache
from var_jax.errors import config_errors
from var_jax.interop.load import load_tokenizer

FLAGS = flags.FLAGS
RENAMED_FLAGS = {"data.name": "data", "data.dir": "data_dir"}  # accepted until the next release


def from_flags() -> tuple[epath.Path, CacheSpec, tuple[Source, Source], BatchEncoder]:
    """Open and check everything that the flags name.

    Returns:
      Directory of the cache, its spec, the training and held-out images, and the encoder.

    Raises:
      FileNotFoundError: if there is no tokenizer or no data set.
      ValueError: on flags that do not fit, or files that cannot be read.
    """
    out = readable_path(FLAGS.out, "--out")
    tokenizer, params = load_tokenizer(*cli.tokenizer_source(), dtype=FLAGS.dtype)
    data = {name: FLAGS[name].value for name in ("train_split", "eval_split", "resize", "flip", "shift")}
    data["name"] = FLAGS.data
    sources = tuple(
        open_source(FLAGS.data, split, FLAGS.data_dir, FLAGS.condition)
        for split in (FLAGS.train_split, FLAGS.eval_split)
    )
    options = (FLAGS.crops, FLAGS.seed, FLAGS.shard, FLAGS.features)
    spec = make_cache_spec(tokenizer, params, sources, data, *options)
    return out, spec, sources, BatchEncoder(tokenizer, params, FLAGS.batch)


def main(_):
    with config_errors(ValueError, OSError):
        out, spec, sources, encode = from_flags()
    command = shlex.join(["python", "-m", "var_jax.tools.encode_dataset", *sys.argv[1:]])
    with config_errors(OSError):  # a full disk
        write_cache(out, spec, sources, encode, FLAGS.threads, command)
    print(
        f"{spec.train_images} images in {spec.crops} crops, {spec.eval_images} held out, of {spec.data} "
        f"(tokenizer {spec.tokenizer}): --config.data.tokens={out}"
    )


if __name__ == "__main__":
    cli.define_tokenizer_flags()
    flags.DEFINE_string("data", None, "Name of a prepared data set", required=True)
    flags.DEFINE_string("data_dir", "data", "Directory of the prepared data sets, local or gs://")
    flags.DEFINE_string("train_split", "train", "Training split, cropped at random")
    flags.DEFINE_string("eval_split", "test", "Held-out split, cropped at the center")
    flags.DEFINE_string("out", None, "Directory of the cache, local or gs://", required=True)
    flags.DEFINE_integer("crops", 1, "Crops of each training image", lower_bound=1)
    flags.DEFINE_float("resize", 1.125, "Short side before the crop, over the image size", lower_bound=1)
    flags.DEFINE_bool("flip", False, "Mirror half of the crops")
    flags.DEFINE_integer("shift", 0, "Largest translation, in pixels, of half of the images", lower_bound=0)
    flags.DEFINE_bool("features", False, "Keep the features, too, for self-correction (docs/training.md)")
    flags.DEFINE_enum(
        "condition", "label", KINDS, "Keep the captions or embeddings, too (config.model.condition)"
    )
    flags.DEFINE_integer("seed", 0, "Random seed of the crops", lower_bound=0)
    flags.DEFINE_integer("batch", 64, "Images per batch, over all devices", lower_bound=1)
    flags.DEFINE_integer("threads", 16, "Threads that read and decode ahead", lower_bound=1)
    flags.DEFINE_integer("shard", 2**16, "Records per file; a kill loses at most one file", lower_bound=1)
    cli.run(main, renamed=RENAMED_FLAGS)
