"""Check an accelerator with one command: numerics, training and resuming, speed.

    python -m benchmarks.device_check --out=check
    python -m benchmarks.device_check --stages=goldens,attention --out=check
    python -m benchmarks.device_check --stages=throughput --minutes=8 \\
        --against=../shared/peer/torch_var.py --out=check

Stages, in this order:

  versions    software, devices, driver.
  goldens     comparison with outputs of the published code: in float32, tokens must be equal, and logits and
              gradients within tolerance; in the default precision, errors are only reported.
  train       both stages of the digits config, 100 steps each; killed and resumed; sampled.
  attention   each implementation that runs on this platform, and each rematerialization policy, against
              einsum in float32.
  throughput  training and sampling of d16 and d30 at batch 64; with --against, also the PyTorch yardstick.
  kernels     device time by kernel of one training step of d16.

A stage that fails does not stop the next ones.  Each stage prints one JSON line when it ends.  The tables
printed at the end are also written to OUT/device_check.md, and all values to OUT/device_check.json.  The exit
code is 0 if every check ran and holds.  --minutes limits the total time: speed is measured in the time that
the checks leave, most important parts first, and parts that did not run are listed.  On a CPU, or with
--tiny, sizes are tiny.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
from absl import logging

from benchmarks import device_numerics, device_runs
from benchmarks.device_parts import REPOSITORY, Options, run_parts, to_json_line
from benchmarks.goldens import golden_folder
from benchmarks.tables import markdown_table
from var_jax import cli
from var_jax.paths import local_path

STAGE_PARTS = {
    "versions": device_runs.versions_parts,
    "goldens": device_numerics.goldens_parts,
    "train": device_runs.train_parts,
    "attention": device_numerics.attention_parts,
    "throughput": device_runs.throughput_parts,
    "kernels": device_runs.kernels_parts,
}
MEASURING = ("throughput", "kernels")  # stages without checks; they use the time that the others leave
# Stages that run on the CPU, so that their child processes can use the device.
HOST_STAGES = ("train", "throughput")
# Stage -> folders that it writes.
STAGE_FOLDERS = {"train": ("digits", "digits_killed", "samples"), "kernels": ("trace",)}
KERNEL_SECONDS = 60.0  # reserved for the stage `kernels`
GRACE_SECONDS = 5.0  # a stage gets a deadline this much earlier than it is killed
# Without these, a CPU trace names no operations, and a GPU trace names CUDA graphs, not HLO instructions.
NAMED_KERNELS = "--xla_cpu_enable_xprof_traceme=true --xla_gpu_enable_command_buffer="
# Keys without a column.
NOT_IN_TABLES = ("part", "is_check", "checks", "error", "not_run", "markdown", "kernels")


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line; paths become absolute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory for results, runs and traces")
    parser.add_argument("--stages", default=",".join(STAGE_PARTS), help="stages to run, separated by commas")
    parser.add_argument("--minutes", type=float, default=6.0, help="limit of the total time")
    parser.add_argument("--goldens", default=golden_folder(), help="directory of the golden tensors")
    parser.add_argument("--against", help="path of the PyTorch yardstick")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; the default on a CPU")
    # Set for child processes.
    parser.add_argument("--stage", choices=list(STAGE_PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--platform", default="unknown", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    args.goldens = os.path.abspath(args.goldens)  # stages run in the repository's folder
    args.against = args.against and os.path.abspath(args.against)
    if unknown := sorted(set(args.stages) - set(STAGE_PARTS)):
        parser.error(f"--stages={','.join(unknown)}: must be some of {','.join(STAGE_PARTS)}")
    if not args.minutes > 0:
        parser.error(f"--minutes={args.minutes}: must be more than 0")
    if args.against and not Path(args.against).exists():
        parser.error(f"--against={args.against}: there is no such file")
    try:
        args.out = Path(local_path(args.out, "--out"))
    except ValueError as error:
        parser.error(str(error))
    return args


# --- a stage, in a process of its own -------------------------------------------------------------


def run_stage_here(args: argparse.Namespace) -> None:
    """Run the parts of a stage in this process, and append the record of each to OUT/STAGE.jsonl."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns about every item that is not read
    cli.enable_compilation_cache()
    if args.stage in HOST_STAGES:
        jax.config.update("jax_platforms", "cpu")
    options = Options(
        out=args.out,
        tiny=args.tiny,
        platform=args.platform,
        goldens=Path(args.goldens),
        against=args.against,
        deadline=args.deadline,
    )
    with open(args.out / f"{args.stage}.jsonl", "a") as file:

        def record(values: dict) -> None:
            file.write(to_json_line(values) + "\n")
            file.flush()

        run_parts(STAGE_PARTS[args.stage](options), options, record)


# --- all stages -----------------------------------------------------------------------------------


def run_stage(stage: str, args: argparse.Namespace, platform: str, limit: float) -> dict:
    """Run a stage in a process of its own, so that a crash or hang of the device ends only that process.

    Args:
      stage: name of the stage.
      args: command line of this process.
      platform: "cpu", "gpu", "tpu", or "unknown" before the stage `versions` has run.
      limit: seconds after which the process is killed.

    Returns:
      Record: stage, status (ok, failed, skipped or cut), seconds, parts; `error` if the process failed.
    """
    if stage == "goldens" and not (Path(args.goldens) / "vae.pth").exists():
        reason = f"no vae.pth among the golden tensors at {args.goldens} (set VAR_JAX_GOLDENS or --goldens)"
        return {"stage": stage, "status": "skipped", "seconds": 0, "parts": [], "error": reason}
    if limit <= 0:
        status = "cut" if stage in MEASURING else "failed"
        return {"stage": stage, "status": status, "seconds": 0, "parts": [], "error": "no time left"}
    environment = dict(os.environ)
    if stage == "kernels":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {NAMED_KERNELS}".strip()
    command = [sys.executable, "-m", "benchmarks.device_check", f"--stage={stage}"]
    command += [f"--out={args.out}", f"--deadline={time.time() + limit - GRACE_SECONDS}"]
    command += [f"--platform={platform}"]
    command += [f"--goldens={args.goldens}", *[f"--against={args.against}"] * bool(args.against)]
    command += ["--tiny"] * args.tiny
    results, log = args.out / f"{stage}.jsonl", args.out / f"{stage}.log"
    results.unlink(missing_ok=True)
    for folder in STAGE_FOLDERS.get(stage, ()):  # left by an earlier call
        shutil.rmtree(args.out / folder, ignore_errors=True)
    start = time.monotonic()
    failure = run_process(command, environment, log, limit)
    parts = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    record = {"stage": stage, "status": "ok", "seconds": round(time.monotonic() - start, 1), "parts": parts}
    if failure is not None:
        timed_out = failure.startswith("stopped")
        record["status"] = "cut" if timed_out and stage in MEASURING else "failed"
        record["error"] = f"{failure}; end of {log}:\n{log.read_text(errors='replace')[-2000:]}"
    if any(part_failed(part) for part in parts) or (not parts and failure is None):
        record["status"] = "failed"
    return record


def run_process(command: list[str], environment: dict, log: Path, limit: float) -> str | None:
    """Run a command, writing its output to a log; kill it and its children after `limit` seconds.

    Returns:
      None if it exited with code 0, else a description of how it ended.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s, its share of --minutes"
        finally:  # kill its children too, also on a keyboard interrupt
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}" if code else None


def part_failed(part: dict) -> bool:
    """Return True if a check does not hold or did not run, or if the part raised an error."""
    if "not_run" in part:
        return part["is_check"]
    return "error" in part or not all(part.get("checks", {}).values())


def stage_limit(stage: str, stages: list[str], left: float) -> float:
    """Compute the time limit of a stage: all that is left; `throughput` leaves time for `kernels`."""
    return left - KERNEL_SECONDS if stage == "throughput" and "kernels" in stages else left


def format_report(records: list[dict]) -> str:
    """Format the records of all stages as markdown, a section a stage."""
    texts = []
    for record in records:
        texts.append(f"### {record['stage']}: {record['status']}, {record['seconds']:.0f} s")
        texts += [text for text in (format_stage(record["parts"]), format_failures(record)) if text]
        texts += [part["markdown"] for part in record["parts"] if "markdown" in part]
    return "\n\n".join(texts)


def format_stage(parts: list[dict]) -> str:
    """Format the parts of a stage that ran as a markdown table.

    A row is a part; if there are more than 12 values, as in the stage `versions`, a row is a value.
    """
    ran = [part for part in parts if "not_run" not in part]
    names = list(dict.fromkeys(name for part in ran for name in part if name not in NOT_IN_TABLES))
    if not ran:
        return ""
    if len(names) > 12:
        rows = [[name, format_cell(part[name])] for part in ran for name in part if name not in NOT_IN_TABLES]
        return markdown_table(["", ""], rows)
    rows = [[part["part"], *(format_cell(part.get(name)) for name in names), verdict(part)] for part in ran]
    return markdown_table(["", *names, "checks"], rows)


def format_cell(value) -> str:
    """Format a value for a cell of a markdown table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("\n", " ").replace("|", "/")


def verdict(part: dict) -> str:
    """Return FAILED, ok, or measured for a part without checks."""
    if part_failed(part):
        return "FAILED"
    return "ok" if part.get("checks") else "measured"


def format_failures(record: dict) -> str:
    """Format the failures of a stage and the parts that did not run, with tracebacks, as a code block."""
    lines = [record["error"]] if "error" in record else []
    for part in record["parts"]:
        failed = [name for name, holds in part.get("checks", {}).items() if not holds]
        lines += [f"{part['part']}: does not hold: {name}" for name in failed]
        if "error" in part:
            lines.append(f"{part['part']}:\n{part['error'].rstrip()}")
        if "not_run" in part:
            lines.append(f"{part['part']}: not run, {part['not_run']}")
    return "```\n" + "\n".join(lines) + "\n```" if lines else ""


def main():
    args = parse_arguments()
    if args.stage:
        return run_stage_here(args)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    records, platform = [], "unknown"
    stages = [stage for stage in STAGE_PARTS if stage in ("versions", *args.stages)]  # `versions` always runs
    for stage in stages:
        record = run_stage(stage, args, platform, stage_limit(stage, stages, end - time.monotonic()))
        records.append(record)
        print(to_json_line(record), flush=True)
        if stage == "versions":
            platform = next((part["platform"] for part in record["parts"] if "platform" in part), "unknown")
            args.tiny = args.tiny or platform == "cpu"
        (args.out / "device_check.json").write_text(json.dumps(records, indent=1) + "\n")
        (args.out / "device_check.md").write_text(format_report(records) + "\n")
    print(f"\n{format_report(records)}")
    failed = [record["stage"] for record in records if record["status"] == "failed"]
    if failed:
        sys.exit(f"device_check: failed: {', '.join(failed)}; see {args.out}/device_check.md")
    print(f"\nall checks hold; {args.out}/device_check.md")


if __name__ == "__main__":
    # Exit through `finally` of run_process, which kills the running stage's process group.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("device_check: stopped by SIGTERM"))
    main()
