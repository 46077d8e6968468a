"""Draws the finer maps of images anew: what is coarse stays, what is fine is renewed.

    python -m var_jax.tools.vary --workdir=runs/digits --image=digit.png --label=3 --out=vary

Writes `vary.png`: a row for each scale k that is the first to be drawn anew, from k = 0 (nothing is kept) to
the last; in each row the image as the tokenizer has it, then its variations.  With --towards the image is led
to another class.  This is a script; no module imports it.
"""

import numpy as np
from absl import flags
from etils import epath

from var_jax import cli
from var_jax.images import image_grid, save_png
from var_jax.paths import as_path
from var_jax.sampling.options import MAX_SEED
from var_jax.tools.image_files import fitted, open_image

FLAGS = flags.FLAGS


def vary(model, out: epath.Path) -> None:
    """Writes the picture, a row for each first scale that is drawn anew."""
    side, scales = model.tokenizer.module.config.image_size, model.module.config.schedule
    if FLAGS.image:
        image = np.asarray(fitted(open_image(FLAGS.image, "RGB"), side, FLAGS.image), np.float32) / 255
        tokens = model.tokenizer.encode(image[None])
    label = cli.labels(model, "label", most=1) if FLAGS.label else np.array([model.num_classes])
    towards = cli.labels(model, "towards", most=1) if FLAGS.towards else label
    options = cli.as_keywords(cli.options(model))
    if not FLAGS.image:
        _, tokens = model.generate(label, FLAGS.seed, return_tokens=True, **options)
    original, rows = model.tokenizer.decode(tokens), []
    labels, many = np.repeat(towards, FLAGS.num), np.repeat(tokens, FLAGS.num, axis=0)
    seed = (FLAGS.seed + 1) % (MAX_SEED + 1)  # of other draws than those that made the image
    for k in range(len(scales)):
        varied = model.vary(many, k, labels, seed, **options)
        rows.append(np.concatenate([original, varied]))
    picture = image_grid(np.concatenate(rows), columns=FLAGS.num + 1)
    save_png(picture, out / "vary.png")
    print(f"{len(rows)} rows of {FLAGS.num} variations, a row a scale to start from: {out}/vary.png")


def main(_):
    model = cli.load()
    vary(model, as_path(FLAGS.out or "vary"))


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    flags.DEFINE_string("image", None, "The image; by default one is drawn")
    flags.DEFINE_list("label", None, "Its class; `none`, the default, for no class")
    flags.DEFINE_list("towards", None, "Another class to lead it to; by default its own")
    flags.DEFINE_integer("num", 8, "Variations in a row", lower_bound=1)
    cli.run(main)
