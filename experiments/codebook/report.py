"""Table and plot of `experiments.codebook`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tables import markdown_table


def summarize(runs: dict[str, list[list[dict]]], codes: int, num_scales: int) -> dict[str, dict]:
    """Compute mean and standard deviation over the seeds of the last evaluation, for each variant.

    Args:
      runs: variant -> one log per seed, each a list of lines.
      codes: size of the codebook.
      num_scales: number of maps.

    Returns:
      Variant -> metric -> [mean, deviation]; also `seeds`, the number of runs, and `most`, the largest number
      of codes that the held-out images could use at each map.
    """
    result = {}
    for variant, logs in runs.items():
        last = [[line for line in log if line["kind"] == "eval"][-1] for log in logs]
        names = ["l2", "psnr", "perplexity", "distinct", *(f"perplexity_{k}" for k in range(num_scales))]
        values = {name: np.array([line[name] for line in last]) for name in names}
        values["used"] = values["distinct"] / codes
        deviation = {name: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()}
        result[variant] = {name: [float(v.mean()), deviation[name]] for name, v in values.items()}
        result[variant]["seeds"] = len(logs)
        result[variant]["most"] = [last[0][f"most_{k}"] for k in range(num_scales)]
    return result


def variants_table(result: dict[str, dict], sides: tuple[int, ...]) -> str:
    """Format a markdown table with a row per variant."""
    most = next(iter(result.values()))["most"]
    heads = ["held-out PSNR, dB", "codes used"]
    heads += [f"{side}x{side} (most {n:.0f})" for side, n in zip(sides, most, strict=True)]
    rows = []
    names = [("psnr", ".2f"), ("used", ".0%"), *((f"perplexity_{k}", ".1f") for k in range(len(sides)))]
    for variant, values in result.items():
        parts = 1 if values["seeds"] == 1 else 2  # a single seed has no deviation
        cells = [" ± ".join(format(x, form) for x in values[name][:parts]) for name, form in names]
        rows.append([f"{variant} ({values['seeds']})", *cells])
    return markdown_table(["(seeds)", *heads], rows)


def plot_perplexity(runs: dict[str, list[list[dict]]], sides: tuple[int, ...], path: Path) -> None:
    """Plot the mean perplexity over the seeds against the step, a panel per map, a line per variant."""
    columns = (len(sides) + 1) // 2
    figure = Figure(figsize=(4 * columns + 2, 6.5), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True)
    for k, axis in zip(range(len(sides)), axes.flat, strict=False):
        for variant, logs in runs.items():
            lines = [[line for line in log if line["kind"] == "train"] for log in logs]
            steps = [line["step"] for line in lines[0]]
            mean = np.mean([[line[f"perplexity_{k}"] for line in log] for log in lines], axis=0)
            width = 2.5 if variant in ("baseline", "recipe") else 1
            axis.plot(steps, mean, label=variant, linewidth=width)
        axis.set(title=f"map {k}: {sides[k]}x{sides[k]}", yscale="log", xlabel="step", ylabel="perplexity")
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper")
    for axis in axes.flat[len(sides) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110)
