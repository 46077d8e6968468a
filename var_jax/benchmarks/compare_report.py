"""Table and pictures of `benchmarks.compare`."""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from var_jax.sampling import pictures

# Heading, key, format, factor.
COLUMNS = (
    ("parameters, M", "parameters", ".2f", 1e-6),
    ("steps", "steps", ".0f", 1),
    ("training, TFLOP", "training_flops", ".1f", 1e-12),
    ("held-out, bits a pixel", "bits_per_pixel", ".3f", 1),
    ("at the end", "last_bits_per_pixel", ".3f", 1),
    ("called right", "called_right", ".1%", 1),
    ("Fréchet", "frechet", ".2f", 1),
    ("spread", "spread", ".0%", 1),
    ("steps an image", "sampling_steps", ".0f", 1),
    ("MFLOP an image", "sampling_flops", ".1f", 1e-6),
    ("ms an image", "sampling_seconds", ".2f", 1e3),
)
SAME = {"parameters", "steps", "training_flops", "sampling_steps", "sampling_flops"}  # for all seeds


def line(system: str, run: dict) -> str:
    """One run in words."""
    figures = (f"{head} {run[key] * factor:{form}}" for head, key, form, factor in COLUMNS)
    return f"{system}: " + ", ".join(figures)


def table(found: dict) -> str:
    """Markdown: a system a row, mean and standard deviation over its seeds; then the tokenizers."""
    rows = [f"| system | {' | '.join(head for head, *_ in COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for system, runs in found["systems"].items():
        rows.append(f"| {system} | {' | '.join(_cell(list(runs.values()), *column) for column in COLUMNS)} |")
    real = {"called_right": found["classifier_right"], "frechet": found["frechet_held_out"]}
    real["spread"] = found["spread_held_out"]
    cells = (f"{real[key]:{form}}" if key in real else "" for _, key, form, _ in COLUMNS)
    rows.append(f"| held-out images | {' | '.join(cells)} |")
    rows += ["", "| tokenizer | tokens an image | held-out PSNR, dB |", "| --- | --- | --- |"]
    names = {"maps": "all maps (VAR)", "map": "one map (next-token)"}
    for name, figures in found["tokenizers"].items():
        rows.append(f"| {names[name]} | {figures['tokens']} | {figures['psnr']:.2f} |")
    return "\n".join(rows)


def _cell(runs: list[dict], _, key: str, form: str, factor: float) -> str:
    values = np.array([run[key] for run in runs]) * factor
    if key in SAME or len(runs) == 1:
        return format(values[0], form)
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}"


def draw_losses(systems: dict[str, dict], path: Path) -> None:
    """Held-out bits a pixel over the training compute: a line a system, the mean of its seeds."""
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for system, runs in systems.items():
        curves = np.array([run["evaluations"] for run in runs.values()])  # [seeds, evaluations, 2]
        some = next(iter(runs.values()))
        compute = curves[0, :, 0] / some["steps"] * some["training_flops"] / 1e12
        low, mean, high = curves[..., 1].min(0), curves[..., 1].mean(0), curves[..., 1].max(0)
        style = "-" if system.startswith("VAR") else "--"
        (drawn,) = axis.plot(compute, mean, style, label=system)
        axis.fill_between(compute, low, high, color=drawn.get_color(), alpha=0.15)
    axis.set(xlabel="training compute, TFLOP", ylabel="held-out loss, bits a pixel")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="mean and range over the seeds", title_fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(systems: dict[str, dict], out: Path, path: Path, shown: int = 20) -> None:
    """Samples of the first seed of every system, a row each: as many of each class, class by class."""
    rows, names = [], []
    for system, runs in systems.items():
        with np.load(out / system.replace(", ", "-") / next(iter(runs)) / "samples.npz") as samples:
            images, per_class = samples["arr_0"], len(samples["arr_0"]) // (samples["arr_1"].max() + 1)
        classes = len(images) // per_class
        each = max(shown // classes, 1)
        some = images.reshape(classes, per_class, *images.shape[1:])[:shown, :each]
        rows.append(some.reshape(-1, *images.shape[1:]))
        names.append(system)
    picture = np.asarray(pictures.grid(np.concatenate(rows), columns=len(rows[0])))
    figure, axis = plt.subplots(figsize=(12, 0.58 * len(rows) + 0.2), layout="constrained")
    axis.imshow(picture)
    height = picture.shape[0] / len(rows)
    axis.set_yticks([height * (i + 0.5) for i in range(len(rows))], names)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)
