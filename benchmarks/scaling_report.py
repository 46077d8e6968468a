"""Reports of the scaling benchmark: rates and efficiency, merged runs, table and plot.

A run is the dict that scaling.py writes: `config`, `device`, `dtype`, `parameters`, `note`, and `rows`, one
per point.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

MODES = ("weak", "strong")
MUST_MATCH = ("config", "device", "dtype", "parameters", "note")  # fields in which merged runs must agree


def add_rates(rows: list[dict], flops_per_image: float, peak: float | None) -> list[dict]:
    """Add images_per_s, tflops_per_device and mfu (None if the device's peak is unknown) to rows."""
    result = []
    for row in rows:
        rate = row["batch"] / row["seconds"] if row["seconds"] else None
        flops = rate and rate * flops_per_image / row["devices"]
        rates = {"images_per_s": rate, "tflops_per_device": flops and flops / 1e12}
        result.append(row | rates | {"mfu": flops / peak if flops and peak else None})
    return result


def add_efficiency(rows: list[dict]) -> list[dict]:
    """Add efficiency to rows: images/s per device, relative to the fewest devices of the same mode."""
    result = []
    for row in rows:
        base = base_rate([other for other in rows if other["mode"] == row["mode"]])
        rate = row["images_per_s"] and row["images_per_s"] / row["devices"]
        result.append(row | {"efficiency": rate / base if rate else None})
    return result


def base_rate(rows: list[dict]) -> float | None:
    """Compute images/s per device on the fewest devices whose time is known; None if there are none."""
    known = [row for row in rows if row["images_per_s"]]
    first = min(known, key=lambda row: row["devices"], default=None)
    return first and first["images_per_s"] / first["devices"]


def merge_runs(runs: list[dict]) -> dict:
    """Merge runs of one workload on different numbers of devices into one run.

    Raises:
      ValueError: if the runs differ in a field of `MUST_MATCH` or in batch, or if two measure the same point.
    """
    for field in MUST_MATCH:
        if len(values := {str(run[field]) for run in runs}) > 1:
            raise ValueError(f"--merge: runs differ in {field}: {', '.join(sorted(values))}")
    rows = [row for run in runs for row in run["rows"]]
    rows.sort(key=lambda row: (MODES.index(row["mode"]), row["devices"]))
    fixed_batches = {"weak": lambda row: row["batch"] / row["devices"], "strong": lambda row: row["batch"]}
    for mode, fixed_batch in fixed_batches.items():
        mode_rows = [row for row in rows if row["mode"] == mode]
        if len(batches := {fixed_batch(row) for row in mode_rows}) > 1:
            fixed = "images per device (give --batch_per_device)" if mode == "weak" else "global batch"
            raise ValueError(f"--merge: {mode} scaling needs the same {fixed}, got {sorted(batches)}")
        if len({row["devices"] for row in mode_rows}) < len(mode_rows):
            raise ValueError(f"--merge: two runs have {mode} scaling on the same number of devices")
    return {**runs[0], "rows": add_efficiency(rows)}


def format_table(run: dict) -> str:
    """Format the rows of a run as aligned text."""
    titles = [
        "mode",
        "devices",
        "batch",
        "seconds",
        "images/s",
        "a device",
        "TFLOP/s each",
        "MFU",
        "efficiency",
    ]
    lines = [titles]
    for row in run["rows"]:
        line = [row["mode"], str(row["devices"]), str(row["batch"])]
        if row["seconds"] is None:
            lines.append((*line, "out of memory", *[""] * 5))
            continue
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "unknown"
        line += [f"{row['seconds']:.4g}", f"{row['images_per_s']:.4g}"]
        line += [f"{row['images_per_s'] / row['devices']:.4g}", f"{row['tflops_per_device']:.3g}"]
        lines.append((*line, mfu, f"{row['efficiency']:.1%}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed = ["  ".join(word.rjust(w) for word, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*printed, *[run["note"]] * bool(run["note"])])


def plot_scaling(run: dict, path: Path) -> None:
    """Plot images/s with the ideal, and efficiency, over the number of devices."""
    figure = Figure(figsize=(9, 4.2))
    speed, efficiency = figure.subplots(1, 2)
    for mode, color in zip(MODES, ("C0", "C1"), strict=True):
        rows = [row for row in run["rows"] if row["mode"] == mode and row["images_per_s"]]
        if not rows:
            continue
        counts = np.array([row["devices"] for row in rows])
        speed.plot(counts, [row["images_per_s"] for row in rows], "o-", color=color, label=mode)
        speed.plot(counts, counts * base_rate(rows), "--", color=color, linewidth=1, label=f"{mode}, ideal")
        efficiency.plot(counts, [row["efficiency"] for row in rows], "o-", color=color, label=mode)
    ticks = sorted({row["devices"] for row in run["rows"]})
    for axis in (speed, efficiency):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set_xlabel("devices")
        axis.grid(alpha=0.3)
        axis.legend()
    speed.set(ylabel="images/s", yscale="log")
    efficiency.axhline(1, color="grey", linewidth=1, linestyle="--")
    efficiency.set(ylabel="efficiency", ylim=(0, None))
    title = f"{run['config']}, {run['device']}, {run['dtype']}"
    figure.suptitle(f"{title}\n{run['note']}" if run["note"] else title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
