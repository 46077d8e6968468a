"""Tables and plots of `experiments.alignment`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tables import format_over_seeds, markdown_table
from var_jax.images import image_grid, save_png

REAL = "real: half against half"
# Heading, key, format, factor.
COLUMNS = (
    ("FID", "fid", ".2f", 1),
    ("precision", "precision", ".3f", 1),
    ("recall", "recall", ".3f", 1),
    ("called right", "accuracy", ".1%", 1),
    ("authentic", "authenticity", ".1%", 1),
    ("held-out loss", "held_out_loss", ".2f", 1),
    ("MFLOP an image", "sampling_flops", ".1f", 1e-6),
)


def system_name(name: str, guidance: float) -> str:
    """Return the name of a transformer, sampled with a strength of guidance, in tables."""
    return f"{name}, guidance {guidance:g}"


def means(result: dict, system: str, key: str) -> float:
    """Return the mean of a score over the seeds."""
    return float(np.mean([rows[system][key] for rows in result.values()]))


def best_guidance(result: dict, strengths: list[float]) -> float:
    """Return the strength with the lowest mean FID before alignment."""
    return min(strengths, key=lambda strength: means(result, system_name("before", strength), "fid"))


def format_table(result: dict) -> str:
    """Format a markdown table of all systems: mean and deviation over the seeds.

    Args:
      result: seed -> system -> scores.
    """
    rows = []
    for system in next(iter(result.values())):
        cells = []
        for _, key, form, factor in COLUMNS:
            values = [scores[system][key] * factor for scores in result.values() if key in scores[system]]
            values = values[:1] if key == "sampling_flops" else values
            cells.append(format_over_seeds(values, form) if values else "")
        rows.append([system, *cells])
    return markdown_table(["system", *(head for head, *_ in COLUMNS)], rows)


def plot_scores(result: dict, strengths: list[float], path: Path) -> None:
    """Plot scores over guidance before alignment, and those of the aligned transformer as a line."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, (title, key, *_) in zip(figure.subplots(1, 4), COLUMNS[:4], strict=True):
        values = np.array(
            [[rows[system_name("before", s)][key] for s in strengths] for rows in result.values()]
        )
        aligned = [rows[system_name("aligned", 0.0)][key] for rows in result.values()]
        axis.plot(strengths, values.mean(0), "o-", label="before")
        axis.fill_between(strengths, values.min(0), values.max(0), alpha=0.15)
        axis.axhline(np.mean(aligned), color="C1", label="aligned, guidance 0")
        axis.axhspan(min(aligned), max(aligned), color="C1", alpha=0.15)
        axis.set(title=title, xlabel="guidance")
    axis.legend()
    figure.savefig(path, dpi=110)


def plot_samples(images: dict[str, np.ndarray], guidance: float, path: Path) -> None:
    """Plot samples of one seed: before without and with guidance, and aligned, a row each.

    Args:
      images: system -> uint8 [N, H, W, 3], the classes in turn.
      guidance: strength of the guided row.
      path: of the PNG to write.
    """
    points = (("before", 0.0), ("before", guidance), ("aligned", 0.0))
    systems = list(dict.fromkeys(system_name(*point) for point in points))
    shown = min(20, len(images[systems[0]]))
    rows = np.concatenate([images[system][:shown] for system in systems])
    save_png(image_grid(rows, columns=shown, row_labels=systems), path)
