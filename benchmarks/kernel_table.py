"""Tabulate device time by kernel from a trace of `jax.profiler`.

    python -m benchmarks.kernel_table WORKDIR/next_scale/profile/process_0/plugins/profile/*/perfetto_trace.json.gz

Reads `perfetto_trace.json.gz` (`train.py --profile`, or `start_trace(create_perfetto_trace=True)`) and prints
a markdown table: kernel, milliseconds, calls and share of the device's busy time, and the HLO instruction that
launched it.  Time inside a loop counts for the operations of its body, not for the loop.  A CPU trace names
operations only with XLA_FLAGS=--xla_cpu_enable_xprof_traceme=true.
"""  # noqa: E501

import argparse
import collections
import dataclasses
import gzip
import json
import os
import re
import sys

from benchmarks.tables import markdown_table

COMMAND_BUFFER = "command_buffer"  # prefix of the HLO name of every kernel of a CUDA graph in a GPU trace
ROUNDING = 2e-3  # microseconds; traces have three decimals
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Device time of one kernel.

    Attributes:
      name: kernel on a GPU; HLO instruction on a CPU or TPU.
      ms: milliseconds per step.
      calls: launches per step.
      share: of the busy time, 0 to 1.
      hlo_ops: HLO instructions that launched it, by decreasing total time.
      op_name: path of the first of them in the JAX program; empty if the program's text is not given.
    """

    name: str
    ms: float
    calls: float
    share: float
    hlo_ops: tuple[str, ...]
    op_name: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTable:
    """Kernels of a trace, by decreasing total time.

    Attributes:
      kernels: one row per name.
      busy_ms: sum over all timelines of all devices, per step.
      span_ms: from the first start to the last end, per step.
    """

    kernels: list[Kernel]
    busy_ms: float
    span_ms: float


def read_trace(path: str | os.PathLike) -> list[dict]:
    """Read the events of a gzipped trace in Chrome's JSON format.

    Raises:
      ValueError: if the file is not such a trace.
    """
    try:
        with gzip.open(path) as file:
            return json.load(file)["traceEvents"]
    except (gzip.BadGzipFile, EOFError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a perfetto_trace.json.gz of jax.profiler ({error})") from error


def op_names(hlo: str) -> dict[str, str]:
    """Map each HLO instruction of `compiled.as_text()` to its path in the JAX program."""
    return dict(_INSTRUCTION.findall(hlo))


def tabulate_kernels(events: list[dict], steps: int = 1, paths: dict[str, str] | None = None) -> KernelTable:
    """Sum device time by kernel.

    Args:
      events: of a trace (`read_trace`).
      steps: number of steps in the trace, by which times and calls are divided.
      paths: HLO instruction -> path in the JAX program (`op_names`).

    Raises:
      ValueError: if the trace has no device operations.
    """
    paths = paths or {}
    instructions = {re.sub(r"[.-]", "_", name): name for name in paths}  # names of GPU kernels
    time, calls = collections.Counter(), collections.Counter()
    by_op = collections.defaultdict(collections.Counter)
    ends, starts = [], []
    for timeline in _device_timelines(events):
        for event, self_time in _self_times(timeline):
            name = event["name"]
            op = event.get("args", {}).get("hlo_op", name)
            if op.startswith(COMMAND_BUFFER):
                op = instructions.get(name, op)
            time[name] += self_time
            calls[name] += 1
            by_op[name][op] += self_time
            starts.append(event["ts"])
            ends.append(event["ts"] + event["dur"])
    if not time:
        raise ValueError(
            "the trace has no operation of a device; on a CPU set "
            "XLA_FLAGS=--xla_cpu_enable_xprof_traceme=true before the program starts"
        )
    busy = sum(time.values())
    kernels = []
    for name, microseconds in time.most_common():
        ops = tuple(op for op, _ in by_op[name].most_common())
        kernels.append(
            Kernel(
                name=name,
                ms=microseconds / 1e3 / steps,
                calls=calls[name] / steps,
                share=microseconds / busy if busy else 0.0,
                hlo_ops=ops,
                op_name=paths.get(ops[0], ""),
            )
        )
    span = (max(ends) - min(starts)) / 1e3 / steps
    return KernelTable(kernels=kernels, busy_ms=busy / 1e3 / steps, span_ms=span)


def _device_timelines(events: list[dict]) -> list[list[dict]]:
    """Return the events of each track of operations: GPU streams, "XLA Ops" of a TPU, or CPU threads."""
    names = {"process_name": {}, "thread_name": {}}
    for event in events:
        if event.get("ph") == "M" and event["name"] in names:
            names[event["name"]][event.get("pid"), event.get("tid")] = event["args"]["name"]
    processes = {pid: name for (pid, _), name in names["process_name"].items()}
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}
    timelines = collections.defaultdict(list)
    for event in events:
        if event.get("ph") != "X" or "dur" not in event:
            continue
        track = event["pid"], event["tid"]
        if event["pid"] in devices:
            thread = names["thread_name"].get(track, "")
            if thread.startswith("Stream") or thread == "XLA Ops":
                timelines[track].append(event)
        elif not devices and "hlo_op" in event.get("args", {}):
            timelines[track].append(event)
    return list(timelines.values())


def _self_times(timeline: list[dict]) -> list[tuple[dict, float]]:
    """Return each event of a track with its self time: its microseconds less those of nested events."""
    times = []  # [event, microseconds]
    inside = []  # entries of `times` that may contain the next event, innermost last
    for event in sorted(timeline, key=lambda e: (e["ts"], -e["dur"])):
        while inside and _end(inside[-1][0]) <= event["ts"]:
            inside.pop()
        if inside and _end(event) <= _end(inside[-1][0]) + ROUNDING:
            inside[-1][1] -= event["dur"]
        times.append([event, event["dur"]])
        inside.append(times[-1])
    return [(event, max(microseconds, 0.0)) for event, microseconds in times]


def _end(event: dict) -> float:
    """Return the end time of an event in microseconds."""
    return event["ts"] + event["dur"]


def as_markdown(table: KernelTable, rows: int = 40) -> str:
    """Format the first `rows` kernels as a markdown table."""
    cells = []
    for kernel in table.kernels[:rows]:
        others = f" and {len(kernel.hlo_ops) - 1} more" if len(kernel.hlo_ops) > 1 else ""
        op = kernel.hlo_ops[0] + others + (f": {kernel.op_name}" if kernel.op_name else "")
        cells.append([f"`{kernel.name}`", f"{kernel.ms:.3f}", f"{kernel.calls:g}", f"{kernel.share:.1%}", op])
    return markdown_table(["kernel", "ms", "calls", "share", "HLO instruction"], cells)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", help="perfetto_trace.json.gz")
    parser.add_argument("--steps", type=int, default=1, help="steps in the trace; times are per step")
    parser.add_argument("--rows", type=int, default=40, help="kernels to print")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: must be at least 1")
    try:
        table = tabulate_kernels(read_trace(args.trace), args.steps)
    except (OSError, ValueError) as error:
        sys.exit(f"kernel_table: {error}")
    print(as_markdown(table, args.rows))
    print(
        f"\nbusy {table.busy_ms:.2f} ms a step, {table.span_ms:.2f} ms from the first start to the last end"
    )


if __name__ == "__main__":
    main()
