"""Which order of a token map keeps together what belongs together?  Next-token systems must choose one.

    python -m experiments.locality.run --workdir=RUN --data=digits --data_dir=data --out=DIR
    python -m experiments.locality.run --side=16 --out=DIR

For every order of `var_jax.transformer.positions`: how far apart in the sequence cells end up that touch
in the image.
With a tokenizer (--workdir or --tokenizer) also what real tokens tell about each other: the mutual
information of two tokens of an image, in bits, against their Manhattan distance in the image and against
their distance in the sequence.  It takes the last, finest map, of images drawn at random.

Mutual information found in few images with many codes is nearly all bias.  So the codes are put into at most
GROUPS groups by k-means of their vectors, and what the same formula finds after the images were shuffled is
taken off (`evaluation/locality.py`).  Groups share less than codes do: read how the curves fall, not how much
there is in all.  Every value is a mean over all pairs at that distance.  At the longest there are few, in the
image from the rim alone (which shares much where a background runs round an object), and values scatter; the
curves over the sequence leave those out that are of fewer pairs than the side of the map.

Prints a markdown table and writes it as `locality.md`, all numbers as `locality.json`, every order as a path
in `orders.png`, and the curves in `locality.png`.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import var_jax
from benchmarks.tables import markdown_table
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
from var_jax.transformer.positions import ORDERS, order

FLAGS = flags.FLAGS
MAX_GROUPS = 16
ENCODE_BATCH = 64
DEFAULT_SIDE = 16  # of the map, where neither a flag nor a tokenizer says
# Orders that are each other's mirror image, or reverse, have the same curves: dashes let both be seen.
ORDER_STYLES = {
    "raster": dict(color="C0", linewidth=2.5),
    "column": dict(color="C1", linewidth=1.8, linestyle=(0, (4, 4))),
    "snake": dict(color="C2", linewidth=1.8),
    "spiral_in": dict(color="C3", linewidth=2.5),
    "spiral_out": dict(color="C4", linewidth=1.8, linestyle=(0, (4, 4))),
    "z_curve": dict(color="C5", linewidth=1.8),
    "hilbert": dict(color="black", linewidth=1.8),
    "random": dict(color="0.6", linewidth=1.8),
}


def distances_by_order(side: int) -> dict[str, dict[str, np.ndarray]]:
    """Distance in the sequence of neighbours: order -> `horizontal`, `vertical` and `both`, int32 [pairs]."""
    result = {}
    for name in ORDERS:
        horizontal, vertical = (a.ravel() for a in neighbor_distances(order(name, side), side))
        both = np.concatenate([horizontal, vertical])
        result[name] = {"horizontal": horizontal, "vertical": vertical, "both": both}
    return result


def summarize_distances(values: np.ndarray) -> dict[str, float]:
    """Mean, 95th percentile (the least distance that 95% are within) and maximum."""
    p95 = np.percentile(values, 95, method="inverted_cdf")
    return {"mean": float(values.mean()), "p95": int(p95), "max": int(values.max())}


def check_map(tokenizer: var_jax.LoadedTokenizer) -> None:
    """Raises ValueError where the last map has but one token."""
    if tokenizer.scales[-1] < 2:
        raise ValueError(f"the last map of scales {tokenizer.scales} has one token: it has no neighbours")


def finest_tokens(tokenizer: var_jax.LoadedTokenizer, source: Source, images: int) -> np.ndarray:
    """Tokens int32 [N, n * n] of the last map, of so many images of a data set, or of all it has.

    Raises:
      CorruptImage: naming a record that is no image.
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
    """Mutual information in bits by distance: `image`, and `lag` of each order; and what it was taken of."""
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
        "lag": {name: mean_by_lag(bits, order(name, side)).tolist() for name in ORDERS},
    }


def distance_table(side: int, apart: dict) -> str:
    """Markdown, an order a row."""
    kinds = ("horizontal", "vertical", "both")
    title = (
        f"Distance in the sequence of neighbours in a {side} x {side} map: mean / 95th percentile / maximum"
    )
    rows = [
        [
            name,
            *(" / ".join(f"{x:.4g}" for x in summarize_distances(result[kind]).values()) for kind in kinds),
        ]
        for name, result in apart.items()
    ]
    return f"{title}\n\n{markdown_table(['order', *kinds], rows)}"


def information_table(result: dict) -> str:
    """Markdown: a row for distance in the image, and one for the distance in each sequence."""
    at = [2**k for k in range(result["side"] ** 2) if 2**k < result["side"] ** 2]
    title = f"Mutual information of two tokens, in bits, by their distance ({result['images']} images of "
    title += (
        f"{result['data']}, {result['side']} x {result['side']} map, {result['groups']} groups of codes, "
    )
    title += f"{result['entropy']:.2f} bits at a place on average)"
    rows = [
        [name, *(f"{values[d - 1]:.3f}" if d <= len(values) else "" for d in at)]
        for name, values in {"in the image": result["image"], **result["lag"]}.items()
    ]
    return f"{title}\n\n{markdown_table(['distance', *map(str, at)], rows)}"


def plot_orders(side: int, apart: dict, path: Path) -> None:
    """Every order as a path through the map, from dark to light."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, name in zip(axes.flat, ORDERS, strict=True):
        row, column = np.divmod(order(name, side), side)
        points = np.stack([column, row], axis=1)
        lines = LineCollection(np.stack([points[:-1], points[1:]], axis=1), cmap="plasma", capstyle="round")
        lines.set_array(np.arange(len(points) - 1))
        lines.set(linewidth=0.8 if name == "random" else 2.2)
        axis.add_collection(lines)
        axis.plot(*points[0], "o", color=lines.cmap(0.0), markersize=9)
        axis.plot(*points[-1], "s", color=lines.cmap(1.0), markersize=8, markeredgecolor="black")
        both = summarize_distances(apart[name]["both"])
        axis.set_title(f"{name}: mean {both['mean']:.3g}, p95 {both['p95']}")
        axis.set(xlim=(-0.7, side - 0.3), ylim=(side - 0.3, -0.7), aspect="equal", xticks=[], yticks=[])
    figure.get_layout_engine().set(hspace=0.06)
    figure.suptitle(
        f"Orders of a {side} x {side} map, from the first cell (circle, dark) to the last (square, light);\n"
        "distance in the sequence of neighbours in the image: mean and 95th percentile\n"
    )
    figure.savefig(path, dpi=100)


def plot_curves(side: int, apart: dict, result: dict | None, path: Path) -> None:
    """How far image neighbours are apart; and mutual information by distance, where it was measured."""
    panels = 3 if result else 1
    figure = Figure(figsize=(5.5 * panels + 1.5, 5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    spread, *measured = axes[0]
    for name, style in ORDER_STYLES.items():
        values = np.sort(apart[name]["both"])
        at = [*values, side * side]
        spread.step(
            at, np.minimum(np.arange(1, len(at) + 1) / len(values), 1), where="post", label=name, **style
        )
    spread.set(xlabel="distance in the sequence, at most", ylabel="share of neighbours", ylim=(0, 1.02))
    spread.set_title(f"where neighbours in a {side} x {side} map end up")
    _set_log2_axis(spread, side * side)
    if result:
        by_image, by_order = measured
        by_image.plot(np.arange(1, len(result["image"]) + 1), result["image"], "o-", color="C0", markersize=4)
        by_image.set(xlabel="Manhattan distance in the image", ylabel="mutual information, bits")
        by_image.set_title(
            f"{result['images']} images of {result['data']}, {result['side']} x {result['side']} map"
        )
        for name, style in ORDER_STYLES.items():
            values = result["lag"][name][: 1 - result["side"]]
            by_order.plot(np.arange(1, len(values) + 1), values, **style)
        by_order.set(xlabel="distance in the sequence")
        by_order.set_title("the same pairs of tokens, by order")
        _set_log2_axis(by_order, result["side"] ** 2)
        top = max(axis.dataLim.y1 for axis in measured)
        for axis in measured:
            axis.set_ylim(min(0, *(axis.dataLim.y0 for axis in measured)), 1.05 * top)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.legend(*spread.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=100)


def _set_log2_axis(axis: Axes, most: int) -> None:
    """A logarithmic axis from 1 on, with 1, 2, 4, ... written at it."""
    ticks = 2 ** np.arange(int(np.log2(most)) + 1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlim(0.9, most)


def main(_):
    out = cli.local_folder("out")
    result, side = None, FLAGS.side or DEFAULT_SIDE
    if FLAGS.workdir or FLAGS.tokenizer:
        path, scales = cli.tokenizer_source()
        with config_errors():
            tokenizer = var_jax.load_tokenizer(path, scales=scales)
            source = open_source(FLAGS.data, FLAGS.split, FLAGS.data_dir)
            check_map(tokenizer)
        result = measure_information(tokenizer, finest_tokens(tokenizer, source, FLAGS.images))
        result, side = {"data": source.name, **result}, FLAGS.side or result["side"]
    apart = distances_by_order(side)
    out.mkdir(parents=True, exist_ok=True)
    tables = distance_table(side, apart) + (f"\n\n{information_table(result)}" if result else "")
    spread = {
        name: {kind: summarize_distances(values) for kind, values in kinds.items()}
        for name, kinds in apart.items()
    }
    numbers = {"side": side, "distances": spread, "information": result}
    (out / "locality.md").write_text(tables + "\n")
    (out / "locality.json").write_text(json.dumps(numbers, indent=1))
    plot_orders(side, apart, out / "orders.png")
    plot_curves(side, apart, result, out / "locality.png")
    print(f"{tables}\n\nthe orders: {out / 'orders.png'}; the curves: {out / 'locality.png'}")


if __name__ == "__main__":
    cli.define_tokenizer_flags()
    flags.DEFINE_string("data", "digits", "Name of a prepared data set")
    flags.DEFINE_string("data_dir", "data", "Where data sets lie")
    flags.DEFINE_string("split", "train", "Split that the images are taken from")
    flags.DEFINE_integer("images", 4096, "Images that are encoded, at most", lower_bound=2)
    flags.DEFINE_integer(
        "side", None, "Of the map; by default that of the tokenizer's last, else 16", lower_bound=2
    )
    flags.DEFINE_string("out", None, "Directory of the results", required=True)
    cli.run(main)
