"""Tables and picture of `experiments.self_correction`."""

from pathlib import Path

import numpy as np

from benchmarks.tables import markdown_table
from var_jax.images import image_grid, save_png

# Metric -> head of its column, format.
COLUMNS = {
    "loss": ("loss", ".2f"),
    "loss_replaced": ("loss, tokens replaced", ".2f"),
    "fid": ("FID", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "called_right": ("called right", ".1%"),
    "spread": ("spread", ".3f"),
    "nearest": ("nearest", ".3f"),
}
SAMPLES_PER_CLASS = 2  # in the picture


def variants_table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format mean and standard deviation over the seeds of each variant as a markdown table.

    Args:
      figures: variant -> seed -> metric -> value.
    """
    rows = []
    for variant, by_seed in figures.items():
        cells = [f"{variant} ({len(by_seed)})"]
        for name, (_, form) in COLUMNS.items():
            values = np.array([values[name] for values in by_seed.values()])
            deviation = [values.std(ddof=1)] if len(values) > 1 else []  # a single seed has none
            cells.append(" ± ".join(format(x, form) for x in (values.mean(), *deviation)))
        rows.append(cells)
    return markdown_table(["(seeds)", *(head for head, _ in COLUMNS.values())], rows)


def repair_table(errors: dict[str, list[float]]) -> str:
    """Format the errors of f_hat after each map as a markdown table."""
    heads = ["after map", *(str(k + 1) for k in range(len(next(iter(errors.values())))))]
    return markdown_table(heads, [[name, *(f"{x:.3f}" for x in row)] for name, row in errors.items()])


def draw_samples(runs: dict[str, Path], path: Path) -> None:
    """Draw the first samples of each class, a row of images for each run, with its name."""
    rows = []
    for run in runs.values():
        with np.load(run / "samples.npz") as samples:
            images, labels = samples["arr_0"], samples["arr_1"]
        first = [np.flatnonzero(labels == label)[:SAMPLES_PER_CLASS] for label in np.unique(labels)]
        rows.append(images[np.concatenate(first)])
    save_png(image_grid(np.concatenate(rows), columns=len(rows[0]), row_labels=list(runs)), path)
