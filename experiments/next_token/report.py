"""Tables and plots of `experiments.next_token`."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.tables import format_over_seeds, markdown_table
from var_jax.images import image_grid, save_png

# Heading, key, format, factor.
QUALITY_COLUMNS = (
    ("least held-out, bits a pixel", "bits_per_pixel", ".3f", 1),
    ("at the end", "last_bits_per_pixel", ".3f", 1),
    ("called right", "called_right", ".1%", 1),
    ("Fréchet", "frechet", ".2f", 1),
    ("spread", "spread", ".0%", 1),
    ("nearest", "nearest", ".0%", 1),
)
RUN_COLUMNS = (
    ("parameters, M", "parameters", ".2f", 1e-6),
    ("steps", "steps", ".0f", 1),
    ("training, TFLOP", "training_flops", ".1f", 1e-12),
    *QUALITY_COLUMNS,
    ("steps an image", "sampling_steps", ".0f", 1),
    ("MFLOP an image", "sampling_flops", ".1f", 1e-6),
    ("ms an image", "sampling_seconds", ".2f", 1e3),
)
TOKENIZER_COLUMNS = (("tokens", "tokens", ".0f", 1), ("PSNR, dB", "psnr", ".2f", 1))
TOKENIZER_USERS = {"maps": "VAR", "map": "next-token"}
NOTE = """\
Bits a pixel are of the tokens of two tokenizers: next-token of one map, VAR of all its maps. Least: of all
evaluations, so that the held-out images chose it."""
SAME_FOR_ALL_SEEDS = {"parameters", "steps", "training_flops", "sampling_steps", "sampling_flops"}


def format_run(system: str, run: dict) -> str:
    """Format all figures of a run on one line."""
    figures = (f"{head} {run[key] * factor:{form}}" for head, key, form, factor in RUN_COLUMNS)
    return f"{system}: " + ", ".join(figures)


def format_comparison(result: dict) -> str:
    """Format markdown tables of systems (mean and deviation over the seeds) and of tokenizers."""
    systems = [
        [system, *(_run_cell(list(runs.values()), *column) for column in RUN_COLUMNS)]
        for system, runs in result["systems"].items()
    ]
    columns = [*TOKENIZER_COLUMNS, *(column for column in RUN_COLUMNS if column[1] in result["held_out"])]
    images = {"as they are": result["held_out"]}
    images |= {
        f"through the tokenizer of {TOKENIZER_USERS[name]}": figures
        for name, figures in result["tokenizers"].items()
    }
    tokenizers = [
        [
            name,
            *(
                f"{figures[key] * factor:{form}}" if key in figures else ""
                for _, key, form, factor in columns
            ),
        ]
        for name, figures in images.items()
    ]
    return "\n\n".join(
        (
            markdown_table(["system", *(head for head, *_ in RUN_COLUMNS)], systems),
            NOTE,
            markdown_table(["held-out images", *(head for head, *_ in columns)], tokenizers),
        )
    )


def _run_cell(runs: list[dict], _, key: str, form: str, factor: float) -> str:
    return format_over_seeds(
        [run[key] * factor for run in (runs[:1] if key in SAME_FOR_ALL_SEEDS else runs)], form
    )


def plot_losses(systems: dict[str, dict], path: Path) -> None:
    """Plot held-out bits per pixel over training compute: a panel per tokenizer, a line per system."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for system, runs in systems.items():
        axis = axes[int(system.startswith("VAR"))]
        curves = np.array([run["evaluations"] for run in runs.values()])  # [seeds, evaluations, 2]
        run = next(iter(runs.values()))
        compute = curves[0, :, 0] / run["steps"] * run["training_flops"] / 1e12
        low, mean, high = curves[..., 1].min(0), curves[..., 1].mean(0), curves[..., 1].max(0)
        (curve,) = axis.plot(compute, mean, label=system)
        axis.fill_between(compute, low, high, color=curve.get_color(), alpha=0.15)
    for axis, title in zip(axes, ("next-token: tokens of one map", "VAR: tokens of all maps"), strict=True):
        axis.set(title=title, xlabel="training compute, TFLOP", ylabel="held-out loss, bits a pixel")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, title="mean and range over the seeds", title_fontsize=8)
    figure.savefig(path, dpi=110)


def plot_samples(systems: dict[str, Path], path: Path, shown: int = 20) -> None:
    """Plot samples of a run of every system: a row per system, class by class.

    Args:
      systems: system -> directory of the run.
      path: of the PNG to write.
      shown: number of samples of each system.
    """
    rows, names = [], []
    for system, directory in systems.items():
        with np.load(directory / "samples.npz") as samples:
            images = samples["arr_0"][np.argsort(samples["arr_1"], kind="stable")]
            per_class = len(images) // (samples["arr_1"].max() + 1)
        classes = len(images) // per_class
        num_per_class = max(shown // classes, 1)
        selected = images.reshape(classes, per_class, *images.shape[1:])[:shown, :num_per_class]
        rows.append(selected.reshape(-1, *images.shape[1:]))
        names.append(system)
    save_png(image_grid(np.concatenate(rows), columns=len(rows[0]), row_labels=names), path)
