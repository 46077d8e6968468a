"""Encode a data set into tokens once, so that training a transformer needs neither images nor the encoder.

    python -m var_jax.tools.encode_dataset --workdir=runs/tokenizer --data.name=imagenet2012 \\
        --data.dir=DATA --eval_split=validation --crops=10 --flip --out=TOKENS
    python train.py --config=configs/var.py:d16 --workdir=runs/d16 --config.tokenizer=runs/tokenizer \\
        --config.data.tokens=TOKENS

Every training image is cut out at random `--crops` times, every held-out image once at the centre.  Images
are decoded ahead by threads and encoded by all devices of this host.  A call that was stopped goes on with
the files that are missing.
"""

import shlex
import sys

from absl import flags
from etils import epath

from var_jax import cli
from var_jax.data.sources import Source, open_source, readable_path
from var_jax.data.token_cache import CacheSpec
from var_jax.data.token_writer import BatchEncoder, make_cache_spec, write_cache
from var_jax.errors import config_errors
from var_jax.interop.load import load_tokenizer

FLAGS = flags.FLAGS


def from_flags() -> tuple[epath.Path, CacheSpec, tuple[Source, Source], BatchEncoder]:
    """Open and check all that the flags name: directory, description, images and encoder.

    Raises:
      FileNotFoundError: where there is no tokenizer or no data set.
      ValueError: on flags that do not fit, or files that cannot be read.
    """
    out = readable_path(FLAGS.out, "--out")
    tokenizer, params = load_tokenizer(*cli.tokenizer_source(), dtype=FLAGS.dtype)
    data = {name: FLAGS[name].value for name in ("train_split", "eval_split", "resize", "flip", "shift")}
    data["name"], folder = FLAGS["data.name"].value, FLAGS["data.dir"].value
    sources = tuple(
        open_source(data["name"], split, folder) for split in (FLAGS.train_split, FLAGS.eval_split)
    )
    description = make_cache_spec(tokenizer, params, sources, data, FLAGS.crops, FLAGS.seed, FLAGS.shard)
    return out, description, sources, BatchEncoder(tokenizer, params, FLAGS.batch)


def main(_):
    with config_errors(ValueError, OSError):
        out, description, sources, encode = from_flags()
    command = shlex.join(["python", "-m", "var_jax.tools.encode_dataset", *sys.argv[1:]])
    with config_errors(OSError):  # a full disk
        write_cache(out, description, sources, encode, FLAGS.threads, command)
    print(
        f"{description.train_images} images in {description.crops} crops, {description.eval_images} held "
        f"out, of {description.data} (tokenizer {description.tokenizer}): --config.data.tokens={out}"
    )


if __name__ == "__main__":
    cli.define_tokenizer_flags()
    flags.DEFINE_string("data.name", None, "Of a prepared data set", required=True)
    flags.DEFINE_string("data.dir", "data", "Where data sets lie, local or gs://")
    flags.DEFINE_string("train_split", "train", "Split that is cut out at random")
    flags.DEFINE_string("eval_split", "test", "Held-out split, cut out at the centre")
    flags.DEFINE_string("out", None, "Directory of the cache, local or gs://", required=True)
    flags.DEFINE_integer("crops", 1, "Of each training image", lower_bound=1)
    flags.DEFINE_float("resize", 1.125, "Short side over image size before the crop", lower_bound=1)
    flags.DEFINE_bool("flip", False, "Mirror half of the crops")
    flags.DEFINE_integer("shift", 0, "Pixels that half of the images are moved by at most", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the crops", lower_bound=0)
    flags.DEFINE_integer("batch", 64, "Images at once, over all devices", lower_bound=1)
    flags.DEFINE_integer("threads", 16, "That read and decode ahead", lower_bound=1)
    flags.DEFINE_integer("shard", 2**16, "Records of a file, the most that a kill can lose", lower_bound=1)
    cli.run(main)
