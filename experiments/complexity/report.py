"""Fitted exponents, tables and plot of `experiments.complexity`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import markdown_table

KINDS = ("paper", "counted", "seconds")
# A color per scheme; solid lines and filled markers without a cache.
SYSTEM_STYLES = {
    "next-token, no cache": dict(color="C3", marker="o", linestyle="-"),
    "next-token, KV cache": dict(color="C3", marker="s", linestyle="--", markerfacecolor="white"),
    "next-scale, no cache": dict(color="C0", marker="o", linestyle="-"),
    "next-scale, KV cache": dict(color="C0", marker="s", linestyle="--", markerfacecolor="white"),
}


def fit_exponent(sides: list[int], values: list[float], last: int) -> float | None:
    """Fit p of values ~ n^p by least squares in logarithms over the `last` largest n; None for fewer than 2.

    Args:
      sides: n, increasing.
      values: positive, one per size.
      last: maximum number of sizes.
    """
    if len(sides) < 2:
        return None
    return float(np.polyfit(np.log(sides[-last:]), np.log(values[-last:]), 1)[0])


def _series(points: list[dict], system: str, kind: str) -> tuple[list[int], list[float]]:
    """Return the sizes at which a system was measured, and the values of a kind there."""
    pairs = [(point["side"], point[kind]) for point in points if point["system"] == system]
    known = [(side, value) for side, value in pairs if value is not None]
    return [side for side, _ in known], [value for _, value in known]


def fit_exponents(points: list[dict], theory: dict[str, int], last: int) -> dict[str, dict]:
    """Fit the exponents of all systems.

    Args:
      points: measurements, from `measure_systems`.
      theory: system -> theoretical exponent.
      last: number of the largest sizes to fit.

    Returns:
      System -> `theory`, the exponent fitted to each of `KINDS`, and the `sides` of each fit.
    """
    result = {}
    for system, exponent in theory.items():
        series = {kind: _series(points, system, kind) for kind in KINDS}
        fits = {kind: fit_exponent(*series[kind], last) for kind in KINDS}
        result[system] = {"theory": exponent, **fits, "sides": {k: series[k][0][-last:] for k in KINDS}}
    return result


def _format_short(value: float | None) -> str:
    """Format three significant digits, or all digits before the point of a large number."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_tables(result: dict) -> str:
    """Format markdown tables of FLOPs and seconds, a row per size, and of exponents, a row per system."""
    systems = list(result["exponents"])
    by_key = {(point["system"], point["side"]): point for point in result["points"]}
    sides = sorted({side for _, side in by_key})
    settings = (
        f"Width {result['width']}, depth {result['depth']}, {result['codes']} codes of {result['code_dim']} "
    )
    settings += f"channels, batch 1; {result['device']}, float32, jax {result['jax']}."

    def flops(system: str, side: int) -> str:
        point = by_key[system, side]
        return f"{_format_short(point['counted'] / 1e9)} ({_format_short(point['paper'] / 1e9)})"

    work = [[str(side), *(flops(system, side) for system in systems)] for side in sides]
    times = []
    for side in sides:
        pair = [by_key[systems[i], side] for i in (0, -1)]  # one of each scheme
        steps = [f"{point['steps']:,} of {point['positions']:,}" for point in pair]
        times.append(
            [
                str(side),
                *steps,
                *(_format_short(by_key[system, side]["seconds"]) for system in systems),
            ]
        )
    fits = []
    for system, fit in result["exponents"].items():
        cells = ["none" if fit[kind] is None else f"{fit[kind]:.2f}" for kind in KINDS]
        used = ", ".join(map(str, fit["sides"]["seconds"]))
        fits.append([system, str(fit["theory"]), *cells, used])
    last = ", ".join(map(str, sides[-result["fitted_to"] :]))
    return "\n\n".join(
        [
            settings,
            "GFLOPs of an image, as XLA counts them (in brackets: on paper)",
            markdown_table(["n", *systems], work),
            "Steps, of how many positions in all, and seconds of an image",
            markdown_table(
                ["n", "steps, next-token", "steps, next-scale", *(f"{s}, s" for s in systems)], times
            ),
            f"Fitted exponents of n (of FLOPs: over n = {last})",
            markdown_table(["", "theory", "on paper", "counted", "seconds", "seconds over n ="], fits),
        ]
    )


def plot_costs(result: dict, path: Path) -> None:
    """Plot FLOPs and seconds of an image over n, log-log, with guides n^6 and n^4."""
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    axes = figure.subplots(1, 2)
    sides = sorted({point["side"] for point in result["points"]})
    titles = {"counted": "FLOPs of an image, as XLA counts them", "seconds": "seconds of an image, measured"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for system, fit in result["exponents"].items():
            slope = "too few sizes" if fit[kind] is None else f"$n^{{{fit[kind]:.2f}}}$"
            label = f"{system}: {slope}" + (f" (theory {fit['theory']})" if kind == "counted" else "")
            axis.plot(
                *_series(result["points"], system, kind), label=label, markersize=6, **SYSTEM_STYLES[system]
            )
        _plot_guides(axis, result["points"], kind)
        axis.set(xscale="log", yscale="log", xlabel="n, side of the token map (tokens)", title=title)
        axis.set_ylabel({"counted": "FLOPs", "seconds": "seconds"}[kind])
        axis.set_xticks(sides, [str(side) for side in sides], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", fontsize=9, title=f"fitted over the last {result['fitted_to']} sizes")
    settings = f"width {result['width']}, depth {result['depth']}, batch 1, {result['device']}"
    figure.suptitle(f"One image of n x n tokens: {settings}", fontsize=11)
    figure.savefig(path, dpi=100)


def _plot_guides(axis: Axes, points: list[dict], kind: str) -> None:
    """Plot guides n^6 and n^4 next to the largest sizes of the systems without a cache."""
    for system, power, offset in (("next-token, no cache", 6, 4.0), ("next-scale, no cache", 4, 0.25)):
        sides, values = _series(points, system, kind)
        if len(sides) < 2:
            continue
        n = np.array(sides[-3:], float)
        guide = offset * values[-1] * (n / n[-1]) ** power
        axis.plot(n, guide, color="0.45", linestyle=":", linewidth=1.6)
        horizontal, vertical = ("right", "bottom") if offset > 1 else ("left", "top")
        label = (n[1], guide[1])
        axis.annotate(f"$n^{power}$", label, ha=horizontal, va=vertical, color="0.3", fontsize=11)
