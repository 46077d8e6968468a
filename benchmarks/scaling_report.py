"""What the runs of the scaling benchmark amount to: efficiency, one table of several runs, a picture.

A run is a dict as scaling.py writes it: what was measured where, and `rows`, one for each point.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

MODES = ("weak", "strong")
SAME = ("config", "device", "dtype", "parameters", "note")  # of runs that may stand in one table


def with_rates(rows: list[dict], flops_per_image: float, peak: float | None) -> list[dict]:
    """Adds images_per_s, TFLOP/s a device and its share of the device's peak (MFU; None where unknown)."""
    result = []
    for row in rows:
        rate = row["batch"] / row["seconds"] if row["seconds"] else None
        flops = rate and rate * flops_per_image / row["devices"]
        rates = {"images_per_s": rate, "tflops_per_device": flops and flops / 1e12}
        result.append(row | rates | {"mfu": flops / peak if flops and peak else None})
    return result


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Adds efficiency: images/s a device, over that of the same mode on the fewest devices that did it."""
    result = []
    for row in rows:
        base = ideal_base([other for other in rows if other["mode"] == row["mode"]])
        each = row["images_per_s"] and row["images_per_s"] / row["devices"]
        result.append(row | {"efficiency": each / base if each else None})
    return result


def ideal_base(rows: list[dict]) -> float | None:
    """Images/s of a device on the fewest devices whose time is known."""
    known = [row for row in rows if row["images_per_s"]]
    first = min(known, key=lambda row: row["devices"], default=None)
    return first and first["images_per_s"] / first["devices"]


def merge(runs: list[dict]) -> dict:
    """Runs of the same thing on different numbers of devices -> one.

    Raises:
      ValueError: naming the field, where they are not of the same thing; or two of the same point.
    """
    for field in SAME:
        if len(result := {str(run[field]) for run in runs}) > 1:
            raise ValueError(f"--merge: runs differ in {field}: {', '.join(sorted(result))}")
    rows = [row for run in runs for row in run["rows"]]
    rows.sort(key=lambda row: (MODES.index(row["mode"]), row["devices"]))
    share = {"weak": lambda row: row["batch"] / row["devices"], "strong": lambda row: row["batch"]}
    for mode, fixed in share.items():
        mine = [row for row in rows if row["mode"] == mode]
        if len(result := {fixed(row) for row in mine}) > 1:
            what = "images a device (give --batch_per_device)" if mode == "weak" else "global batch"
            raise ValueError(f"--merge: {mode} scaling needs the same {what}, got {sorted(result)}")
        if len({row["devices"] for row in mine}) < len(mine):
            raise ValueError(f"--merge: two runs have {mode} scaling on the same number of devices")
    return {**runs[0], "rows": with_efficiency(rows)}


def table(run: dict) -> str:
    """The rows for the eye."""
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


def draw(run: dict, path: Path) -> None:
    """Two panels over the number of devices: images/s beside the ideal, and efficiency."""
    figure = Figure(figsize=(9, 4.2))
    speed, efficiency = figure.subplots(1, 2)
    for mode, colour in zip(MODES, ("C0", "C1"), strict=True):
        rows = [row for row in run["rows"] if row["mode"] == mode and row["images_per_s"]]
        if not rows:
            continue
        counts = np.array([row["devices"] for row in rows])
        speed.plot(counts, [row["images_per_s"] for row in rows], "o-", color=colour, label=mode)
        speed.plot(counts, counts * ideal_base(rows), "--", color=colour, linewidth=1, label=f"{mode}, ideal")
        efficiency.plot(counts, [row["efficiency"] for row in rows], "o-", color=colour, label=mode)
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
