"""Check of an accelerator with one command: right numbers, training that resumes, speed.

    python -m benchmarks.device_check --out=check
    python -m benchmarks.device_check --stages=goldens,attention --out=check
    python -m benchmarks.device_check --stages=throughput --minutes=8 \\
        --against=../shared/peer/torch_var.py --out=check

Stages, in this order:

  versions    software, devices, driver.
  goldens     outputs of the published code: in float32 tokens are equal, logits and gradients within
              tolerance; in the default precision the shares of equal tokens and the errors are stated.
  train       the digits config, both stages, 100 steps each; killed and resumed; sampled.
  attention   each implementation that runs here, and each rematerialization policy, against einsum in
              float32.
  throughput  training and sampling of d16 and d30, batch 64; the PyTorch yardstick with --against.
  kernels     device time by kernel of one training step of d16.

A stage that fails does not stop the next ones.  Each prints one JSON line as it ends; at the end follow the
tables, which are also in OUT/device_check.md, with all values in OUT/device_check.json.  The exit code is 0
if every check was made and holds.  --minutes bounds the whole: speed is measured in the time that the checks
leave, most important parts first, and what was not run is named.  On a CPU, or with --tiny, sizes are tiny.
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

from benchmarks import device_numerics, device_runs
from benchmarks.device_parts import REPOSITORY, Options, as_json, run_parts
from benchmarks.tables import markdown
from var_jax import cli
from var_jax.paths import local_path

STAGES = {
    "versions": device_runs.versions_parts,
    "goldens": device_numerics.goldens_parts,
    "train": device_runs.train_parts,
    "attention": device_numerics.attention_parts,
    "throughput": device_runs.throughput_parts,
    "kernels": device_runs.kernels_parts,
}
MEASURING = ("throughput", "kernels")  # stages that take what time the others leave
HOST_STAGES = ("train", "throughput")  # stages whose own process leaves the device to those that it starts
MADE = {"train": ("digits", "digits_killed", "samples"), "kernels": ("trace",)}  # folders of a stage
KERNEL_SECONDS = 60.0  # kept for the stage kernels
GRACE = 5.0  # a stage ends by itself so many seconds before it would be stopped
# Without these a trace names no operation of a CPU, and on a GPU the CUDA graph for the HLO instruction.
NAMED_KERNELS = "--xla_cpu_enable_xprof_traceme=true --xla_gpu_enable_command_buffer="
HIDDEN = ("part", "is_check", "checks", "error", "not_run", "markdown", "kernels")  # not in a stage's table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    goldens = os.environ.get("VAR_JAX_GOLDENS", str(REPOSITORY.parent / "shared" / "goldens"))
    parser.add_argument("--out", required=True, help="directory for results, runs and traces")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, separated by commas")
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything")
    parser.add_argument("--goldens", default=goldens, help="directory of the golden tensors")
    parser.add_argument("--against", help="path of the PyTorch yardstick")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as always on a CPU")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)  # of a child process
    parser.add_argument("--platform", default="unknown", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    args.goldens = os.path.abspath(args.goldens)  # stages run in the repository
    args.against = args.against and os.path.abspath(args.against)
    if unknown := sorted(set(args.stages) - set(STAGES)):
        parser.error(f"--stages={','.join(unknown)}: must be some of {','.join(STAGES)}")
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
    """Runs the parts of a stage and appends each to OUT/STAGE.jsonl as it ends."""
    cli.keep_compiled_programs()
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
            file.write(as_json(values) + "\n")
            file.flush()

        run_parts(STAGES[args.stage](options), options, record)


# --- all stages -----------------------------------------------------------------------------------


def run_stage(stage: str, args: argparse.Namespace, platform: str, limit: float) -> dict:
    """Run a stage in a process of its own, which a crash or hang of the device ends alone.

    Returns:
      stage, status (ok, failed, skipped or cut), seconds, parts, and `error` if the process itself failed.
    """
    if stage == "goldens" and not (Path(args.goldens) / "vae.npz").exists():
        reason = f"no golden tensors at {args.goldens} (set VAR_JAX_GOLDENS or --goldens)"
        return {"stage": stage, "status": "skipped", "seconds": 0, "parts": [], "error": reason}
    if limit <= 0:
        status = "cut" if stage in MEASURING else "failed"
        return {"stage": stage, "status": status, "seconds": 0, "parts": [], "error": "no time left"}
    environment = dict(os.environ)
    if stage == "kernels":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {NAMED_KERNELS}".strip()
    command = [sys.executable, "-m", "benchmarks.device_check", f"--stage={stage}"]
    command += [f"--out={args.out}", f"--deadline={time.time() + limit - GRACE}"]
    command += [f"--platform={platform}"]
    command += [f"--goldens={args.goldens}", *[f"--against={args.against}"] * bool(args.against)]
    command += ["--tiny"] * args.tiny
    results, log = args.out / f"{stage}.jsonl", args.out / f"{stage}.log"
    results.unlink(missing_ok=True)
    for folder in MADE.get(stage, ()):  # by an earlier call
        shutil.rmtree(args.out / folder, ignore_errors=True)
    start = time.monotonic()
    failure = watch_process(command, environment, log, limit)
    parts = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    record = {"stage": stage, "status": "ok", "seconds": round(time.monotonic() - start, 1), "parts": parts}
    if failure is not None:
        timed_out = failure.startswith("stopped")
        record["status"] = "cut" if timed_out and stage in MEASURING else "failed"
        record["error"] = f"{failure}; end of {log}:\n{log.read_text(errors='replace')[-2000:]}"
    if any(part_failed(part) for part in parts) or (not parts and failure is None):
        record["status"] = "failed"
    return record


def watch_process(command: list[str], environment: dict, log: Path, limit: float) -> str | None:
    """Run a command to its end, or to a limit in seconds; output goes into a log.

    Returns:
      None if it ended with code 0; else how it ended.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s, its share of --minutes"
        finally:  # with what it started, and on a keyboard interrupt too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}" if code else None


def part_failed(part: dict) -> bool:
    """Whether a check does not hold, was not made, or a part ended with an error."""
    if "not_run" in part:
        return part["is_check"]
    return "error" in part or not all(part.get("checks", {}).values())


def seconds_for(stage: str, stages: list[str], left: float) -> float:
    """Limit of a stage: a check may take what is left, speed leaves time to trace kernels."""
    return left - KERNEL_SECONDS if stage == "throughput" and "kernels" in stages else left


def tables(records: list[dict]) -> str:
    """Markdown of a run: the versions, then a table a stage."""
    texts = []
    for record in records:
        texts.append(f"### {record['stage']}: {record['status']}, {record['seconds']:.0f} s")
        texts += [text for text in (stage_table(record["parts"]), failures(record)) if text]
        texts += [part["markdown"] for part in record["parts"] if "markdown" in part]
    return "\n\n".join(texts)


def stage_table(parts: list[dict]) -> str:
    """Markdown of the parts that ran; of the stage versions, whose values are many, a row a value."""
    ran = [part for part in parts if "not_run" not in part]
    names = list(dict.fromkeys(name for part in ran for name in part if name not in HIDDEN))
    if not ran:
        return ""
    if len(names) > 12:
        rows = [[name, as_cell(part[name])] for part in ran for name in part if name not in HIDDEN]
        return markdown(["", ""], rows)
    rows = [[part["part"], *(as_cell(part.get(name)) for name in names), verdict(part)] for part in ran]
    return markdown(["", *names, "checks"], rows)


def as_cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("\n", " ").replace("|", "/")


def verdict(part: dict) -> str:
    if part_failed(part):
        return "FAILED"
    return "ok" if part.get("checks") else "measured"


def failures(record: dict) -> str:
    """What failed and what was not run, one line each, with tracebacks."""
    lines = [record["error"]] if "error" in record else []
    for part in record["parts"]:
        broken = [name for name, holds in part.get("checks", {}).items() if not holds]
        lines += [f"{part['part']}: does not hold: {name}" for name in broken]
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
    end, records, platform = time.monotonic() + 60 * args.minutes, [], "unknown"
    stages = [stage for stage in STAGES if stage in ("versions", *args.stages)]  # always the versions
    for stage in stages:
        record = run_stage(stage, args, platform, seconds_for(stage, stages, end - time.monotonic()))
        records.append(record)
        print(as_json(record), flush=True)
        if stage == "versions":
            platform = next((part["platform"] for part in record["parts"] if "platform" in part), "unknown")
            args.tiny = args.tiny or platform == "cpu"
        (args.out / "device_check.json").write_text(json.dumps(records, indent=1) + "\n")
        (args.out / "device_check.md").write_text(tables(records) + "\n")
    print(f"\n{tables(records)}")
    failed = [record["stage"] for record in records if record["status"] == "failed"]
    if failed:
        sys.exit(f"device_check: failed: {', '.join(failed)}; see {args.out}/device_check.md")
    print(f"\nall checks hold; {args.out}/device_check.md")


if __name__ == "__main__":
    # So that the stage that runs, a process group of its own, ends too and leaves the device.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("device_check: stopped by SIGTERM"))
    main()
