"""Tables and plot of `experiments.inpainting`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.tables import format_over_seeds, markdown_table
from experiments.inpainting import partial_images

# Heading, key, format.
TASK_COLUMNS = (
    ("known part seen", "seen", ".0%"),
    ("called right", "right", ".1%"),
    ("told the class", "right_told", ".1%"),
    ("PSNR known, dB", "psnr_known", ".2f"),
    ("PSNR unknown, dB", "psnr_unknown", ".2f"),
)
TASKS = {
    "top": "The upper half from the lower",
    "left": "The left half from the right",
    "centre": "The center from the rim",
}
UNKNOWN_COLOR = (150, 170, 215)  # color of the unknown part in the plot
IMAGE_SIZE, GAP = 48, 6  # pixels of an image in the plot, and between images


def format_accuracy(system: str, figures: dict) -> str:
    """Format how often the classifier recognizes a run's images, by task, on one line."""
    parts = (
        f"{task} {result['right']:.1%}, told {result['right_told']:.1%}" for task, result in figures.items()
    )
    return f"{system}: called right: " + "; ".join(parts)


def format_tasks(result: dict) -> str:
    """Format a markdown table per task, with a row per system: mean and standard deviation over its seeds."""
    parts = []
    for task, title in TASKS.items():
        parts.append(f"{title} ({result['images']} held-out images, {result['draws']} draws of each):")
        rows = {name: [run[task] for run in runs.values()] for name, runs in result["systems"].items()}
        rows |= {name: [figures] for name, figures in result["bounds"][task].items()}
        rows["held-out images"] = [{"right": result["classifier_right"]}]
        rows["the most frequent class"] = [{"right": result["chance"]}]
        cells = [
            [name, *(_task_cell(runs, *column) for column in TASK_COLUMNS)] for name, runs in rows.items()
        ]
        parts.append(markdown_table(["system", *(head for head, *_ in TASK_COLUMNS)], cells))
    return "\n\n".join(parts)


def _task_cell(runs: list[dict], _, key: str, form: str) -> str:
    if key not in runs[0]:
        return ""
    return format_over_seeds([run[key] for run in (runs[:1] if key == "seen" else runs)], form)


def plot_images(pictures: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Plot the truth, the known part, and each system's images side by side, a row per image, task by task.

    Args:
      pictures: task -> name -> uint8 [n, H, W, 3]; the truth first.
      path: of the PNG to write.
    """
    names = ["truth", "known", *list(next(iter(pictures.values())))[1:]]
    num_images, side = next(iter(pictures.values()))["truth"].shape[:2]
    scale, step = IMAGE_SIZE // side or 1, (IMAGE_SIZE // side or 1) * side + GAP
    height = (num_images * step + 2 * GAP) * len(pictures)
    canvas, outlines, middles = np.full((height, len(names) * step, 3), 255, np.uint8), [], []
    for t, (task, by_name) in enumerate(pictures.items()):
        top, mask = t * (num_images * step + 2 * GAP), partial_images.unknown_masks(side)[task]
        known = np.where(mask[..., None], np.uint8(UNKNOWN_COLOR), by_name["truth"])
        for column, images in enumerate([by_name["truth"], known, *list(by_name.values())[1:]]):
            for row, image in enumerate(images):
                y, x = top + row * step, column * step
                canvas[y : y + side * scale, x : x + side * scale] = image.repeat(scale, 0).repeat(scale, 1)
                outlines.append((x, y, mask) if column > 1 else None)
        middles.append(top + (num_images * step - GAP) / 2)
    figure = Figure(figsize=(canvas.shape[1] / 70, height / 70))
    axis = figure.add_axes([0, 0, 1, 1])
    axis.imshow(canvas, interpolation="none")
    for x, y, mask in filter(None, outlines):
        axis.add_patch(_outline(x, y, mask, scale))
    axis.set_yticks(middles, [TASKS[task].replace(" from", "\nfrom") for task in pictures])
    centers = (np.arange(len(names)) + 0.5) * step - GAP / 2
    labels = [name.replace(", learned_1d", "").replace("; ", ";\n") for name in names]
    axis.set_xticks(centers, labels, fontsize=8, rotation=90)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def _outline(x: int, y: int, mask: np.ndarray, scale: int) -> Rectangle:
    """Outline the unknown part of an image whose corner is at (x, y)."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    size = [(indices[-1] - indices[0] + 1) * scale for indices in (columns, rows)]
    corner = (x + columns[0] * scale - 0.5, y + rows[0] * scale - 0.5)
    return Rectangle(corner, *size, fill=False, edgecolor=np.divide(UNKNOWN_COLOR, 255), linewidth=1.2)
