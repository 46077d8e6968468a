"""Tables and plots of `experiments.locality`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from benchmarks.tables import markdown_table
from var_jax.transformer.orders import ORDERS, prediction_order

# Orders that are mirror images or reverses of each other have the same curves; dashes keep both visible.
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


def summarize_distances(values: np.ndarray) -> dict[str, float]:
    """Compute mean, 95th percentile (the smallest distance that covers 95%) and maximum."""
    p95 = np.percentile(values, 95, method="inverted_cdf")
    return {"mean": float(values.mean()), "p95": int(p95), "max": int(values.max())}


def distance_table(side: int, distances: dict) -> str:
    """Format the distances of neighbors as a markdown table with a row per order."""
    kinds = ("horizontal", "vertical", "both")
    title = (
        f"Distance in the sequence of neighbors in a {side} x {side} map: mean / 95th percentile / maximum"
    )
    rows = [
        [
            name,
            *(" / ".join(f"{x:.4g}" for x in summarize_distances(values[kind]).values()) for kind in kinds),
        ]
        for name, values in distances.items()
    ]
    return f"{title}\n\n{markdown_table(['order', *kinds], rows)}"


def information_table(information: dict) -> str:
    """Format mutual information as markdown: a row for the distance in the image, and one per order."""
    side = information["side"]
    distances = [2**k for k in range(side**2) if 2**k < side**2]
    title = (
        f"Mutual information of two tokens, in bits, by their distance ({information['images']} images of "
        f"{information['data']}, {side} x {side} map, {information['groups']} groups of codes, "
        f"{information['entropy']:.2f} bits per position on average)"
    )
    rows = [
        [name, *(f"{values[d - 1]:.3f}" if d <= len(values) else "" for d in distances)]
        for name, values in {"in the image": information["image"], **information["lag"]}.items()
    ]
    return f"{title}\n\n{markdown_table(['distance', *map(str, distances)], rows)}"


def plot_orders(side: int, distances: dict, path: Path) -> None:
    """Plot every order as a path through the map, from dark to light."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, name in zip(axes.flat, ORDERS, strict=True):
        row, column = np.divmod(prediction_order(name, side), side)
        points = np.stack([column, row], axis=1)
        lines = LineCollection(np.stack([points[:-1], points[1:]], axis=1), cmap="plasma", capstyle="round")
        lines.set_array(np.arange(len(points) - 1))
        lines.set(linewidth=0.8 if name == "random" else 2.2)
        axis.add_collection(lines)
        axis.plot(*points[0], "o", color=lines.cmap(0.0), markersize=9)
        axis.plot(*points[-1], "s", color=lines.cmap(1.0), markersize=8, markeredgecolor="black")
        both = summarize_distances(distances[name]["both"])
        axis.set_title(f"{name}: mean {both['mean']:.3g}, p95 {both['p95']}")
        axis.set(xlim=(-0.7, side - 0.3), ylim=(side - 0.3, -0.7), aspect="equal", xticks=[], yticks=[])
    figure.get_layout_engine().set(hspace=0.06)
    figure.suptitle(
        f"Orders of a {side} x {side} map, from the first cell (circle, dark) to the last (square, light);\n"
        "distance in the sequence of neighbors in the image: mean and 95th percentile\n"
    )
    figure.savefig(path, dpi=100)


def plot_curves(side: int, distances: dict, information: dict | None, path: Path) -> None:
    """Plot the distances of image neighbors, and mutual information by distance if it was measured."""
    panels = 3 if information else 1
    figure = Figure(figsize=(5.5 * panels + 1.5, 5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    neighbors, *measured = axes[0]
    for name, style in ORDER_STYLES.items():
        values = np.sort(distances[name]["both"])
        ends = [*values, side * side]
        neighbors.step(
            ends, np.minimum(np.arange(1, len(ends) + 1) / len(values), 1), where="post", label=name, **style
        )
    neighbors.set(xlabel="distance in the sequence, at most", ylabel="share of neighbors", ylim=(0, 1.02))
    neighbors.set_title(f"where neighbors in a {side} x {side} map end up")
    _set_log2_axis(neighbors, side * side)
    if information:
        by_image, by_order = measured
        by_image.plot(
            np.arange(1, len(information["image"]) + 1), information["image"], "o-", color="C0", markersize=4
        )
        by_image.set(xlabel="Manhattan distance in the image", ylabel="mutual information, bits")
        map_side = information["side"]
        by_image.set_title(
            f"{information['images']} images of {information['data']}, {map_side} x {map_side} map"
        )
        for name, style in ORDER_STYLES.items():
            values = information["lag"][name][: 1 - map_side]
            by_order.plot(np.arange(1, len(values) + 1), values, **style)
        by_order.set(xlabel="distance in the sequence")
        by_order.set_title("the same pairs of tokens, by order")
        _set_log2_axis(by_order, map_side**2)
        top = max(axis.dataLim.y1 for axis in measured)
        for axis in measured:
            axis.set_ylim(min(0, *(axis.dataLim.y0 for axis in measured)), 1.05 * top)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    figure.legend(*neighbors.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=100)


def _set_log2_axis(axis: Axes, max_value: int) -> None:
    """Make an axis logarithmic from 1 to `max_value`, with ticks 1, 2, 4, ..."""
    ticks = 2 ** np.arange(int(np.log2(max_value)) + 1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlim(0.9, max_value)
