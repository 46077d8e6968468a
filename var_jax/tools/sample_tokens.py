"""Sample tokens from a transformer into a token cache: the negatives of `config.align.method=ddo`.

    python -m var_jax.tools.sample_tokens --workdir=runs/digits --num_per_class=144 --out=runs/samples
    python train.py --config=configs/align.py:digits --workdir=runs/aligned --config.init_from=runs/digits \\
        --config.tokenizer=runs/digits --config.data.tokens=TOKENS --config.align.method=ddo \\
        --config.align.samples=runs/samples

Samples follow the distribution of the transformer itself: no guidance, all codes, temperature 1.  The same
command resumes a call that was stopped, with the files that are missing.
"""

import shlex
import sys

import numpy as np
from absl import flags
from etils import epath

import var_jax
from var_jax import cli
from var_jax.data import transforms
from var_jax.data.sources import readable_path
from var_jax.data.token_cache import CacheManifest, CacheSpec
from var_jax.data.token_writer import check_disk_space, claim_directory, write_records
from var_jax.errors import config_errors
from var_jax.interop.load import load_tokenizer
from var_jax.sampling.options import MAX_SEED, SamplingOptions
from var_jax.tokenizer.model import fingerprint

FLAGS = flags.FLAGS
OPTIONS = SamplingOptions(guidance=0.0, top_k=0, top_p=0.0)


def samples_spec(model: var_jax.LoadedVAR, tokenizer: str, num_per_class: int, seed: int) -> CacheSpec:
    """Return the spec of a cache of samples: training records without crops, and no held-out ones.

    Args:
      model: the transformer.
      tokenizer: fingerprint of its tokenizer.
      num_per_class: number of samples of each class.
      seed: sample i depends on (seed, i) alone.
    """
    return CacheSpec(
        data=f"samples of transformer {fingerprint(model.checkpoint_params)}",
        train_split="train",
        eval_split="none",
        train_images=num_per_class * model.num_classes,
        eval_images=0,
        class_names=model.class_names or tuple(map(str, range(model.num_classes))),
        tokenizer=tokenizer,
        scales=model.scales,
        num_codes=model.tokenizer.num_codes,
        dtype=model.module.dtype.name,
        crops=1,
        resize=1.0,
        flip=False,
        shift=0,
        seed=seed,
        shard=2**16,
        transform=transforms.VERSION,
    )


def write_samples(
    out: epath.Path, spec: CacheSpec, model: var_jax.LoadedVAR, batch: int, command: str
) -> None:
    """Sample the missing files of a cache, and mark it complete.

    Args:
      out: directory of the cache.
      spec: of the cache.
      model: the transformer.
      batch: number of images to generate at once.
      command: command that resumes writing.

    Raises:
      CacheMismatch: if the directory holds something else.
      OSError: if there is not enough disk space, or a file cannot be written.
    """
    claim_directory(out, spec, command)
    missing = {path: indices for path, indices in spec.shards(out, "train").items() if not path.exists()}
    check_disk_space(out, spec, sum(map(len, missing.values())))
    labels = np.arange(spec.train_images) % model.num_classes
    for path, indices in missing.items():
        records = np.zeros(len(indices), spec.layout)
        records["label"] = labels[indices]
        batches = model.generate_batches(
            labels[: indices.stop], spec.seed, batch, OPTIONS, start=indices.start
        )
        records["tokens"] = np.concatenate([tokens for _, tokens in batches])
        write_records(path, records)
    CacheManifest(spec, command, complete=True).write(out)


def main(_):
    with config_errors(ValueError, OSError):
        out = readable_path(FLAGS.out, "--out")
        model = cli.load()
        cli.check_classes(model)
        _, params = load_tokenizer(*cli.tokenizer_source(), dtype=FLAGS.dtype)
    spec = samples_spec(model, fingerprint(params), FLAGS.num_per_class, FLAGS.seed)
    command = shlex.join(["python", "-m", "var_jax.tools.sample_tokens", *sys.argv[1:]])
    with config_errors(OSError):  # a full disk
        write_samples(out, spec, model.replicate(), FLAGS.batch, command)
    print(f"{spec.train_images} {spec.data}: --config.align.samples={out}")


if __name__ == "__main__":
    cli.define_model_flags(has_output=False)
    flags.DEFINE_string("out", None, "Directory of the cache, local or gs://", required=True)
    flags.DEFINE_integer("num_per_class", 100, "Samples of each class", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Random seed; sample i depends on (seed, i) alone", 0, MAX_SEED)
    flags.DEFINE_integer("batch", 64, "Images generated at once", lower_bound=1)
    cli.run(main)
