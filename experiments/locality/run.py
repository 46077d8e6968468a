"""Measure how the orders of a token map separate neighboring tokens, and what tokens share by distance.

    python -m experiments.locality.run --workdir=RUN --data=digits --data_dir=data --out=DIR
    python -m experiments.locality.run --side=16 --out=DIR

Next-token systems must choose an order.  For every order of `var_jax.transformer.positions`, measures the
distance in the sequence of cells that touch in the image.  With a tokenizer (--workdir or --tokenizer), also
measures the mutual information in bits of two tokens of an image, against their Manhattan distance in the
image and against their distance in the sequence.  Tokens are those of the last, finest map of random images.

With many codes and few images, the plain estimate of mutual information is mostly bias.  Therefore the codes
are clustered by k-means into at most MAX_GROUPS groups, and the estimate for shuffled images is subtracted
(`experiments/locality/measures.py`).  Groups share less information than codes: compare the shape of the
curves, not their height.  Every value is a mean over all pairs at that distance.  The longest distances have
few pairs, in the image only at its border (which shares much if an object is surrounded by background), so
values scatter; the curves over the sequence omit distances with fewer pairs than the side of the map.

Prints markdown tables and writes them to `locality.md`, all numbers to `locality.json`, every order as a path
to `orders.png`, and the curves to `locality.png`.
"""

import json

import numpy as np
from absl import flags

import var_jax
from experiments.locality import report
from experiments.locality.measures import (
    group_codes,
    mean_by_image_distance,
    mean_by_lag,
    mutual_information,
    neighbor_distances,
    position_entropy,
)
from var_jax import cli
from var_jax.data.loader import train_batches
from var_jax.data.sources import Source, open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import config_errors
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.orders import ORDERS, prediction_order

FLAGS = flags.FLAGS
MAX_GROUPS = 16  # of codes
ENCODE_BATCH = 64  # images
DEFAULT_SIDE = 16  # of the map, without --side and tokenizer


def distances_by_order(side: int) -> dict[str, dict[str, np.ndarray]]:
    """Compute the sequence distance of neighbors: order -> horizontal, vertical and both, int32 [pairs]."""
    result = {}
    for name in ORDERS:
        horizontal, vertical = (a.ravel() for a in neighbor_distances(prediction_order(name, side), side))
        both = np.concatenate([horizontal, vertical])
        result[name] = {"horizontal": horizontal, "vertical": vertical, "both": both}
    return result


def check_map(tokenizer: var_jax.LoadedTokenizer) -> None:
    """Raise ValueError if the last map has a single token."""
    if tokenizer.scales[-1] < 2:
        raise ValueError(f"the last map of scales {tokenizer.scales} has one token, which has no neighbors")


def finest_tokens(tokenizer: var_jax.LoadedTokenizer, source: Source, images: int) -> np.ndarray:
    """Encode random images of a data set; return the tokens of the last map, int32 [N, n * n].

    Args:
      tokenizer: with last side n.
      source: data set.
      images: maximum N; a smaller data set is used completely.

    Raises:
      CorruptImage: naming a record that is not an image.
    """
    count = min(images, source.num_images)
    pixels = ToPixels(source.name, tokenizer.module.config.image_size, resize=1.0, flip=False)
    batches = train_batches(source, pixels, min(ENCODE_BATCH, count), seed=0, threads=2)
    first = tokenizer.module.config.schedule.starts[-1]
    parts = []
    while sum(map(len, parts)) < count:
        parts.append(tokenizer.encode(next(batches)["image"] / np.float32(255))[:, first:])
    return np.concatenate(parts)[:count]


def measure_information(tokenizer: var_jax.LoadedTokenizer, tokens: np.ndarray) -> dict:
    """Measure the mutual information of tokens in bits by distance.

    Args:
      tokenizer: with last side n.
      tokens: of the last map, int32 [N, n * n].

    Returns:
      `image`, by distance in the image; `lag`, by distance in the sequence of each order; and the numbers of
      `images` and `groups`, the `side` n, and the mean `entropy` of a position.
    """
    quantizer = Quantizer.create(tokenizer.params["quantizer"], tokenizer.module.config)
    counts = np.bincount(tokens.ravel(), minlength=tokenizer.num_codes)
    groups = group_codes(np.asarray(quantizer.codes, np.float32), counts, MAX_GROUPS)
    bits, side = mutual_information(groups[tokens]), tokenizer.scales[-1]
    return {
        "images": len(tokens),
        "side": side,
        "groups": len(np.unique(groups[tokens])),
        "entropy": float(position_entropy(groups[tokens]).mean()),
        "image": mean_by_image_distance(bits, side).tolist(),
        "lag": {name: mean_by_lag(bits, prediction_order(name, side)).tolist() for name in ORDERS},
    }


def main(_):
    out = cli.local_folder("out")
    information, side = None, FLAGS.side or DEFAULT_SIDE
    if FLAGS.workdir or FLAGS.tokenizer:
        path, scales = cli.tokenizer_source()
        with config_errors():
            tokenizer = var_jax.load_tokenizer(path, scales=scales)
            source = open_source(FLAGS.data, FLAGS.split, FLAGS.data_dir)
            check_map(tokenizer)
        information = measure_information(tokenizer, finest_tokens(tokenizer, source, FLAGS.images))
        information = {"data": source.name, **information}
        side = FLAGS.side or information["side"]
    distances = distances_by_order(side)
    out.mkdir(parents=True, exist_ok=True)
    tables = report.distance_table(side, distances)
    if information:
        tables += f"\n\n{report.information_table(information)}"
    summaries = {
        name: {kind: report.summarize_distances(values) for kind, values in kinds.items()}
        for name, kinds in distances.items()
    }
    numbers = {"side": side, "distances": summaries, "information": information}
    (out / "locality.md").write_text(tables + "\n")
    (out / "locality.json").write_text(json.dumps(numbers, indent=1))
    report.plot_orders(side, distances, out / "orders.png")
    report.plot_curves(side, distances, information, out / "locality.png")
    print(f"{tables}\n\nthe orders: {out / 'orders.png'}; the curves: {out / 'locality.png'}")


if __name__ == "__main__":
    cli.define_tokenizer_flags()
    flags.DEFINE_string("data", "digits", "Name of a prepared data set")
    flags.DEFINE_string("data_dir", "data", "Directory of data sets")
    flags.DEFINE_string("split", "train", "Split of the data set")
    flags.DEFINE_integer("images", 4096, "Maximum number of images to encode", lower_bound=2)
    flags.DEFINE_integer(
        "side", None, "Side of the map; default: that of the tokenizer's last map, else 16", lower_bound=2
    )
    flags.DEFINE_string("out", None, "Directory of the results", required=True)
    cli.run(main)
