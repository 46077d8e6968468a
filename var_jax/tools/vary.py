"""Generate variations of an image: keep its coarse maps and resample the finer ones.

    python -m var_jax.tools.vary --workdir=runs/digits --image=digit.png --label=3 --out=vary

Writes `vary.png`: a row for each first resampled scale k, from k = 0 (nothing is kept) to the last; in each
row the reconstruction of the image, then its variations.  --towards edits the image towards another class.
"""

import dataclasses

import numpy as np
from absl import flags
from etils import epath

from var_jax import cli
from var_jax.api import LoadedVAR
from var_jax.images import image_grid, save_png
from var_jax.paths import as_path
from var_jax.sampling.options import MAX_SEED
from var_jax.tools.image_files import center_crop_resize, open_image

FLAGS = flags.FLAGS


def vary(model: LoadedVAR, out: epath.Path) -> None:
    """Generate the variations of the flags, and write vary.png."""
    if FLAGS.image:
        image = center_crop_resize(open_image(FLAGS.image, "RGB"), model.image_size, FLAGS.image)
        tokens = model.tokenizer.encode(np.asarray(image, np.float32)[None] / 255)
    options = dataclasses.asdict(cli.options(model))
    if not FLAGS.image:
        label = cli.condition(model, "label", 1)
        _, tokens = model.generate(seed=FLAGS.seed, return_tokens=True, **label, **options)
    original = model.tokenizer.decode(tokens)
    towards = cli.condition(model, "towards" if FLAGS.towards else "label", FLAGS.num)
    tokens = np.repeat(tokens, FLAGS.num, axis=0)
    seed = (FLAGS.seed + 1) % (MAX_SEED + 1)  # the seed of the image itself would sample it again
    rows = []
    for k in range(len(model.scales)):
        variations = model.vary(tokens, k, seed=seed, **towards, **options)
        rows.append(np.concatenate([original, variations]))
    save_png(image_grid(np.concatenate(rows), columns=FLAGS.num + 1), out / "vary.png")
    print(f"{len(rows)} rows of {FLAGS.num} variations, one row per first resampled scale: {out}/vary.png")


def main(_):
    model = cli.load()
    vary(model, as_path(FLAGS.out or "vary"))


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    flags.DEFINE_string("image", None, "Image file; by default an image is generated")
    flags.DEFINE_list("label", None, "Class of the image, or its caption; `none`, the default, for no class")
    flags.DEFINE_list("towards", None, "Class or caption to edit towards; by default that of the image")
    flags.DEFINE_integer("num", 8, "Variations per row", lower_bound=1)
    cli.run(main)
