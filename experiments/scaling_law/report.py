"""Fits, tables and plot of `experiments.scaling_law`, with the published fits.

A run is a dict of `experiments.scaling_law.run.read_run`.  In fits, N is in billions of parameters and C in
PFlop (10^15), as in the published ones.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.figure import Figure

from benchmarks.tables import markdown_table
from experiments.scaling_law.power_law import PowerLaw, bootstrap, fit_power_law, frontier
from var_jax.training.metrics import finite_or_none

QUANTITIES = {
    "loss_last": "loss, last map",
    "loss": "loss, all maps",
    "error_last": "token error, last map",
    "error": "token error, all maps",
}
# a and b of Tian et al. 2024, section 4.2, on ImageNet 256px; for the loss minus 4.5 (last map) or 5 (all).
PUBLISHED = {
    "N": {
        "loss_last": (2.0, -0.23),
        "loss": (2.5, -0.20),
        "error_last": (490, -0.016),
        "error": (650, -0.010),
    },
    "C": {"loss_last": (2.2e-5, -0.13), "loss": (1.5e-5, -0.16)},
}
PUBLISHED_RANGE = {"N": (0.0185, 2.0)}  # of the 12 published models
# Compute of training the smallest for 200 and the largest for 350 epochs: 6 N L FLOPs per image of L = 680.
PUBLISHED_RANGE["C"] = tuple(
    6 * n * 1e9 * 680 * 1.281e6 * epochs / 1e15
    for n, epochs in zip(PUBLISHED_RANGE["N"], (200, 350), strict=True)
)
NUM_LAW_PARAMETERS = 3  # a, b and c
UNITS = {"N": 1e9, "C": 1e15}
# Share of each run that the frontier ignores: at first, runs of all sizes learn only the codes' frequencies.
EARLY_SHARE = 0.1
COLORS = {"loss_last": "C1", "loss": "C0", "error_last": "C1", "error": "C0"}


def best_so_far(run: dict, quantity: str) -> np.ndarray:
    """Compute the lowest value up to each evaluation, since long runs overfit small data sets."""
    return np.minimum.accumulate(run[quantity])


def training_compute(run: dict) -> np.ndarray:
    """Compute the training FLOPs up to each evaluation (a multiply-add is two)."""
    return np.array(run["step"], float) * run["batch"] * run["flops_per_image"]


def fit_points(runs: list[dict], against: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the points x and y of a fit: the ends of all runs against N, or their frontier against C."""
    if against == "N":
        x = np.array([run["N"] for run in runs]) / UNITS["N"]
        return x, np.array([best_so_far(run, quantity)[-1] for run in runs])
    late = [np.array(run["step"]) >= EARLY_SHARE * run["step"][-1] for run in runs]
    x = np.concatenate([training_compute(run)[i] for run, i in zip(runs, late, strict=True)]) / UNITS["C"]
    y = np.concatenate([best_so_far(run, quantity)[i] for run, i in zip(runs, late, strict=True)])
    indices = frontier(x, y)
    return x[indices], y[indices]


def fit_runs(runs: list[dict], draws: int = 500) -> dict:
    """Fit power laws to all quantities.

    Args:
      runs: from `read_run`.
      draws: number of draws of the bootstrap.

    Returns:
      `runs`, `published`, `draws`, and `fits`: N or C -> quantity -> None if the frontier has too few points,
      else a, b, c, pearson, the number of `points`, `b_alone` (the exponent for c = 0), and `interval`, ends
      of the 95% intervals of a, b and c.  `interval` is None if there are no more sizes than the law has
      parameters, or if most draws of runs cannot be fitted.

    Raises:
      ValueError: if there are fewer sizes than the law has parameters.
    """
    if (num_sizes := len({run["N"] for run in runs})) < NUM_LAW_PARAMETERS:
        raise ValueError(
            f"too few sizes: L = (a N)^b + c needs {NUM_LAW_PARAMETERS} or more, got {num_sizes}"
        )
    fits = {
        against: {name: _fit_quantity(runs, against, name, draws) for name in QUANTITIES} for against in UNITS
    }
    return {"runs": runs, "fits": finite_or_none(fits), "published": PUBLISHED, "draws": draws}


def _fit_quantity(runs: list[dict], against: str, quantity: str, draws: int) -> dict | None:
    def fit_draw(indices):
        return fit_power_law(*fit_points([runs[i] for i in indices], against, quantity))

    x, y = fit_points(runs, against, quantity)
    if len(x) < NUM_LAW_PARAMETERS:
        return None
    law, alone, interval = fit_power_law(x, y), fit_power_law(x, y, floor=False), None
    if len({run["N"] for run in runs}) > NUM_LAW_PARAMETERS:
        with contextlib.suppress(ValueError):  # most draws have too short a frontier
            interval = bootstrap(fit_draw, len(runs), draws)
    result = {name: getattr(law, name) for name in ("a", "b", "c", "pearson")}
    return result | {"points": len(x), "b_alone": alone.b, "interval": interval}


def format_fits(result: dict) -> str:
    """Format markdown tables of the runs and of the fits with the published ones, and notes on both."""
    heads, lines = ["depth", "width", "seed", "N", "PFlop", "steps", "best at", *QUANTITIES.values()], []
    for run in result["runs"]:
        best = run["step"][int(np.argmin(run["loss"]))]
        cells = [
            run["depth"],
            run["width"],
            run["seed"],
            f"{run['N']:,}",
            f"{training_compute(run)[-1] / 1e15:.3g}",
        ]
        cells += [run["step"][-1], best, *(f"{best_so_far(run, name)[-1]:.4f}" for name in QUANTITIES)]
        lines.append([str(cell) for cell in cells])
    sizes = markdown_table(heads, lines)
    heads = ["of", "against", "points", "fit", "b, 95%", "c, 95%", "Pearson", "b where c = 0", "published"]
    lines = []
    for against, fits in result["fits"].items():
        for name, fit in fits.items():
            if fit is None:
                lines.append([QUANTITIES[name], against, "too few", *[""] * (len(heads) - 3)])
                continue
            law = f"({_format_number(fit['a'])} {against})^{fit['b']:.3f} + {fit['c']:.3f}"
            ends = [_format_interval(fit["interval"], letter) for letter in "bc"]
            published = PUBLISHED[against].get(name)
            published = f"({published[0]:g} {against})^{published[1]:g}" if published else ""
            numbers = [_format_number(fit["pearson"], ".4f"), f"{fit['b_alone']:.3f}", published]
            lines.append([QUANTITIES[name], against, str(fit["points"]), law, *ends, *numbers])
    return f"{sizes}\n\n{markdown_table(heads, lines)}\n\n{READING_NOTES}"


READING_NOTES = """\
N: parameters of the blocks, adaLN among them, in billions in the fits. C: matrix FLOPs of training,
forward and backward, in PFlop. Loss in nats a token, held out. Every value is the lowest reached so far,
since a run that overfits rises again; held-out data thus also chose where to stop (*best at*: the step,
by the loss over all maps).

Against N: each run at its end. Against C: the frontier, the lowest that any run reached with so much
compute, without the first tenth of each run, at most 10 points a decade.

Least squares of the logarithm, c >= 0. Intervals: bootstrap draws of whole runs; they know nothing of
other data, tokenizers or recipes. A draw that lacks a size has a worse frontier where that size was
best: against C the intervals lie to one side. Pearson: log(L - c) with log x.

Published: ImageNet, 12 models of 18.5M to 2.0B; cross-entropy less 4.5 (last map) or 5 (all), error as it
is; Pearson about -0.998 and -0.99.
"""


def _format_number(value: float | None, form: str = ".3g") -> str:
    return "unknown" if value is None else format(value, form)


def _format_interval(interval: dict | None, letter: str) -> str:
    if interval is None:
        return "unknown"
    return " to ".join(_format_number(end, ".3f") for end in interval[letter])


def as_power_law(result: dict | None) -> PowerLaw:
    """Convert a fit of `fit_runs` to a law; missing values become NaN."""
    return PowerLaw(
        *(math.nan if (result or {}).get(name) is None else result[name] for name in "abc"), math.nan
    )


def plot_laws(result: dict, path: Path) -> None:
    """Plot losses and errors against N and C with their fits, and reducible losses and the published laws."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    _plot_sizes(axes[0, 0], result, ("loss_last", "loss"), "held-out loss, nats a token")
    _plot_sizes(axes[1, 0], result, ("error_last", "error"), "held-out token error rate")
    _plot_curves(axes[0, 1], result, "loss")
    _plot_curves(axes[1, 1], result, "error")
    _plot_reducible(axes[0, 2], result, "N", "parameters N, billions")
    _plot_reducible(axes[1, 2], result, "C", "training compute C, PFlop")
    figure.savefig(path, dpi=80)


def _plot_sizes(axis, result: dict, names: tuple[str, str], title: str) -> None:
    """Plot quantities of the ends of all runs against N, with their fits."""
    for name in names:
        x, y = fit_points(result["runs"], "N", name)
        law, fine = as_power_law(result["fits"]["N"][name]), np.geomspace(x.min() / 1.3, x.max() * 1.3, 100)
        axis.plot(x, y, "o", color=COLORS[name])
        text = f"{QUANTITIES[name]}: ({law.a:.3g} N)$^{{{law.b:.2f}}}$ + {law.c:.2f}"
        axis.plot(fine, law(fine), color=COLORS[name], label=text)
    axis.set(xscale="log", yscale="log", xlabel="parameters N, billions", title=f"{title}, against size")
    _finish_axis(axis)


def _plot_curves(axis, result: dict, name: str) -> None:
    """Plot a quantity of every run against C, with the frontier and its fit."""
    depths = sorted({run["depth"] for run in result["runs"]})
    colors = dict(zip(depths, colormaps["viridis"](np.linspace(0, 0.9, len(depths))), strict=True))
    for run in result["runs"]:
        label = f"depth {run['depth']}" if run["seed"] == result["runs"][0]["seed"] else None
        x = training_compute(run) / UNITS["C"]
        axis.plot(x, run[name], color=colors[run["depth"]], linewidth=0.9, label=label)
    x, y = fit_points(result["runs"], "C", name)
    law = as_power_law(result["fits"]["C"][name])
    axis.plot(x, y, "o", color="C3", markersize=4, label="frontier")
    text = f"({law.a:.3g} C)$^{{{law.b:.2f}}}$ + {law.c:.2f}"
    axis.plot(x, law(x), color="C3", linewidth=2.5, alpha=0.6, label=text)
    title = f"{QUANTITIES[name]}: every run, and the frontier"
    axis.set(xscale="log", yscale="log", xlabel="training compute C, PFlop", title=title)
    _finish_axis(axis)


def _plot_reducible(axis, result: dict, against: str, label: str) -> None:
    """Plot reducible losses against N or C, with the published laws."""
    for name in ("loss_last", "loss"):
        x, y = fit_points(result["runs"], against, name)
        law, color = as_power_law(result["fits"][against][name]), COLORS[name]
        axis.plot(x, y - law.c, "o", color=color, markersize=4)
        axis.plot(x, law.reducible(x), color=color, label=f"here, {QUANTITIES[name]}: exponent {law.b:.2f}")
        a, b = PUBLISHED[against][name]
        x = np.array(PUBLISHED_RANGE[against])
        text = f"published on ImageNet, {QUANTITIES[name].split(', ')[1]}: {b:g}"
        axis.plot(x, (a * x) ** b, "--", color=color, label=text)
    title = "loss minus its irreducible part, against " + ("size" if against == "N" else "compute")
    axis.set(xscale="log", yscale="log", xlabel=label, title=title)
    low, high = axis.get_ylim()
    axis.set_ylim(low / 3, high)  # room for the legend
    _finish_axis(axis, loc="lower left")


def _finish_axis(axis, loc: str = "best") -> None:
    """Add grid and legend, and plain numbers to a loss axis whose range is too small for powers of ten."""
    low, high = axis.get_ylim()
    if high / low < 30:
        axis.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_ylim(low, high)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc=loc)
