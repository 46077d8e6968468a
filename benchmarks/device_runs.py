"""Stages `versions`, `train`, `throughput` and `kernels` of `device_check`: training runs and speed."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import profiler

from benchmarks import kernel_table, throughput
from benchmarks.device_parts import (
    REPOSITORY,
    TIMED_CALLS,
    CommandFailed,
    Options,
    Part,
    relative_error,
    run_command,
)
from var_jax.training.checkpoint import CHECKPOINT_DIR, has_checkpoint, load_params
from var_jax.training.metrics import read_metrics
from var_jax.training.profiling import EVENT
from var_jax.training.software import describe_software

RESUME_TOLERANCE = 0.1  # of the evaluation losses on GPUs, where sums are not deterministic
DIGITS_STAGES = ("tokenizer", "next_scale")  # of configs/digits.py
TRAIN_STEPS, TINY_TRAIN_STEPS = 100, 40  # of each stage; a quarter of them between checkpoints
MAX_BATCH, MIN_BATCH = 64, 8  # of the stage `throughput`: halved while memory is exhausted


# --- versions -------------------------------------------------------------------------------------


def versions_parts(options: Options) -> list[Part]:
    """List the descriptions of device and software."""
    return [
        Part(name="device", run=describe_device, seconds=0),
        Part(name="software", run=describe_software, seconds=0),
    ]


def describe_device() -> dict:
    """Describe the devices that JAX sees, and check a matrix product on the first one."""
    first = jax.local_devices()[0]
    try:
        stats = first.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # not every platform keeps count
        stats = {}
    ones = jnp.ones((256, 256))
    values = {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
        "memory_gib": round(stats["bytes_limit"] / 2**30, 1) if "bytes_limit" in stats else None,
        "cpu_cores": os.cpu_count(),
        "compile_cache": jax.config.jax_compilation_cache_dir,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        values["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {**values, "checks": {"a matrix product is right": bool((jnp.dot(ones, ones) == 256).all())}}


# --- train ----------------------------------------------------------------------------------------


def train_parts(options: Options) -> list[Part]:
    """List runs of both stages of the digits config: uninterrupted, killed and resumed, and sampling."""
    reference, resumed = options.out / "digits", options.out / "digits_killed"
    return [
        Part(name="both stages", run=partial(train_uninterrupted, options, reference), seconds=15),
        Part(name="killed and resumed", run=partial(train_killed, options, reference, resumed), seconds=25),
        Part(name="sample", run=partial(sample_digits, options, resumed), seconds=10),
    ]


def train_steps(options: Options) -> int:
    """Return the number of training steps of each stage."""
    return TINY_TRAIN_STEPS if options.tiny else TRAIN_STEPS


def training_command(options: Options, workdir: Path) -> list[str]:
    """Return the command that trains both stages of the digits config in `workdir`."""
    steps = train_steps(options)
    fields = {"data.dir": options.out / "data", "train.steps": steps, "train.log_every": 1}
    fields |= {"train.checkpoint_every": steps // 4}
    fields |= {"train.eval_every": steps, "train.preview_every": steps}
    fields |= {"train.batch": 16} if options.tiny else {}
    flags = [f"--config.{stage}.{name}={value}" for stage in DIGITS_STAGES for name, value in fields.items()]
    if options.tiny:  # a tokenizer of pixel patches compiles fast
        model = {"tokenizer.model.patch": 2, "tokenizer.model.num_phis": 0}
        model |= {"tokenizer.model.scales": (1, 2, 4), "tokenizer.model.num_codes": 32}
        model |= {"next_scale.model.depth": 1, "next_scale.model.width": 32}
        flags += [f"--config.{name}={value}" for name, value in model.items()]
    return [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={workdir}", *flags]


def read_log_lines(workdir: Path, stage: str, kind: str) -> list[dict]:
    """Read the log lines of a stage of one kind, `train` or `eval`."""
    return [line for line in read_metrics(workdir / stage / "metrics.jsonl") if line["kind"] == kind]


def train_uninterrupted(options: Options, workdir: Path) -> dict:
    """Train both stages to the end, and check that their losses fall."""
    run_command(options, training_command(options, workdir))
    values, checks = {}, {}
    for stage in DIGITS_STAGES:
        lines = read_log_lines(workdir, stage, "train")
        losses = [line["loss"] for line in lines]
        first, last = float(np.mean(losses[:10])), float(np.mean(losses[-10:]))
        rates = [line["images_per_s"] for line in lines if "images_per_s" in line]
        values |= {f"{stage}_loss": f"{first:.4g} -> {last:.4g}"}
        values |= {f"{stage}_images_per_s": float(np.median(rates))}
        checks[f"the loss of {stage} falls"] = len(losses) == train_steps(options) and last < first
    return {**values, "checks": checks}


def train_killed(options: Options, reference: Path, workdir: Path) -> dict:
    """Train again, kill the run after its first checkpoint, resume it, and compare it with the reference.

    Args:
      options: settings.
      reference: directory of the uninterrupted run.
      workdir: directory of the run to kill and resume.
    """
    command = training_command(options, workdir)
    with open(options.out / "killed.log", "w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            while not has_checkpoint(workdir / "tokenizer" / CHECKPOINT_DIR):
                if process.poll() is not None or options.seconds_left < 0:
                    raise RuntimeError(f"no checkpoint to kill after:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    killed_at = max(line["step"] for line in read_log_lines(workdir, "tokenizer", "train"))
    output = run_command(options, command)
    checks = {
        "it was killed in mid-run": process.returncode == -signal.SIGKILL
        and killed_at < train_steps(options),
        "it went on from a checkpoint": "tokenizer: " in output and resumes_midway(output),
    }
    values = {"killed_at_step": killed_at}
    for stage in DIGITS_STAGES:
        losses = [read_log_lines(run, stage, "eval")[-1]["loss"] for run in (reference, workdir)]
        params = [load_params(run / stage / CHECKPOINT_DIR)[0] for run in (reference, workdir)]
        errors = jax.tree.leaves(jax.tree.map(relative_difference, *params))
        values |= {f"{stage}_loss_difference": relative_error(losses[1], losses[0])}
        values |= {f"{stage}_parameter_difference": max(errors)}
        if options.platform == "gpu":  # atomics sum in any order
            checks[f"{stage} ends within {RESUME_TOLERANCE:.0%} of the unbroken run"] = (
                values[f"{stage}_loss_difference"] <= RESUME_TOLERANCE
            )
        else:
            checks[f"{stage} ends as the unbroken run, bit for bit"] = max(errors) == 0
    return {**values, "checks": checks}


def resumes_midway(output: str) -> bool:
    """Return True if the log says that the tokenizer's training starts after step 1."""
    steps = re.search(r"tokenizer: .*steps (\d+)\.\.", output)
    return steps is not None and int(steps[1]) > 1


def relative_difference(values, reference) -> float:
    """Compute the largest absolute difference, relative to the reference unless that is all zeros."""
    scale = float(np.abs(reference).max())
    return float(np.abs(np.asarray(values) - np.asarray(reference)).max()) / (scale or 1.0)


def sample_digits(options: Options, workdir: Path) -> dict:
    """Sample two digits of each class with a trained run, and check the file of samples."""
    out = options.out / "samples"
    command = [sys.executable, "sample.py", f"--workdir={workdir}", "--num_per_class=2", f"--out={out}"]
    run_command(options, command)
    with np.load(out / "samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    checks = {
        "20 images are written": images.shape == (20, 8, 8, 3) and images.dtype == np.uint8,
        "two of each class": np.bincount(labels, minlength=10).tolist() == [2] * 10,
        "they differ": len(np.unique(images.reshape(20, -1), axis=0)) > 10,
    }
    return {"images": len(images), "checks": checks}


# --- throughput -----------------------------------------------------------------------------------


def throughput_parts(options: Options) -> list[Part]:
    """List measurements of training from tokens, of sampling, and of the PyTorch yardstick.

    Each runs in a process of its own.
    """
    rates = {}  # (mode, depth) -> our batch and images/s, to compare the yardstick with

    def ours(mode: str, depth: int, seconds: float) -> Part:
        run = partial(measure_throughput, options, mode, depth, rates)
        return Part(name=f"{mode} d{depth}", run=run, seconds=seconds, is_check=False)

    def torch(mode: str, depth: int, kind: str, seconds: float) -> Part:
        run = partial(measure_pytorch, options, mode, depth, kind == "compiled", rates)
        return Part(name=f"{mode} d{depth}, PyTorch {kind}", run=run, seconds=seconds, is_check=False)

    if options.tiny:
        parts = [ours("train", 1, 0), torch("train", 1, "eager", 0), ours("sample", 1, 0)]
    else:
        parts = [
            ours("train", 16, 40),
            torch("train", 16, "eager", 25),
            ours("sample", 16, 200),
            torch("sample", 16, "eager", 25),
            torch("train", 16, "compiled", 80),
            ours("train", 30, 60),
            ours("sample", 30, 300),
        ]
    return [part for part in parts if options.against or "PyTorch" not in part.name]


def measure_throughput(options: Options, mode: str, depth: int, rates: dict) -> dict:
    """Measure speed and memory at the largest batch up to `MAX_BATCH` that fits in memory.

    Args:
      options: settings.
      mode: "train" or "sample".
      depth: of the transformer.
      rates: (mode, depth) -> batch and images/s; filled in here.
    """
    batch = 2 if options.tiny else MAX_BATCH
    command = [sys.executable, "-m", "benchmarks.throughput", mode, f"--depth={depth}"]
    command += ["--tiny", "--repeats=1"] if options.tiny else [f"--repeats={TIMED_CALLS}"]
    while True:
        try:
            output = run_command(options, [*command, f"--batch={batch}"])
            break
        except CommandFailed as error:
            if "RESOURCE_EXHAUSTED" not in error.output or batch <= MIN_BATCH:
                raise
            batch //= 2
    line = json.loads(output.strip().splitlines()[-1])
    comparable = line.get("without_decoder", line)["images_per_s"]
    rates[mode, depth] = batch, comparable
    values = {"batch": batch, "ms": 1e3 * line["seconds"], "images_per_s": line["images_per_s"]}
    if "without_decoder" in line:
        values["images_per_s_without_decoder"] = comparable
    values |= {"tflops": line["tflops"], "mfu": line.get("share_of_peak")}
    return values | {"memory_gib": line["peak_gib"], "compile_s": line["compile_s"]}


def measure_pytorch(options: Options, mode: str, depth: int, compiled: bool, rates: dict) -> dict:
    """Measure the yardstick at our batch, and our rate over its rate; see `measure_throughput`."""
    if (mode, depth) not in rates:
        raise RuntimeError(
            f"no rate of {mode} d{depth} to compare with: its measurement failed or did not run"
        )
    batch, rate = rates[mode, depth]
    line = throughput.run_yardstick(
        options.against,
        [mode, f"--depth={depth}", f"--batch={batch}", "--size=256", f"--repeats={TIMED_CALLS}"],
        dtype="float32" if options.platform == "cpu" else "bfloat16",
        compiled=compiled,
        timeout=max(options.seconds_left, 1),
    )
    values = {"batch": batch, "ms": 1e3 * line["seconds"], "images_per_s": line["images_per_s"]}
    values |= {"tflops": line.get("tflops"), "memory_gib": line.get("peak_gib")}
    return {**values, "ours_over_it": round(rate / line["images_per_s"], 3)}


# --- kernels --------------------------------------------------------------------------------------


def kernels_parts(options: Options) -> list[Part]:
    """List the kernel trace of a training step."""
    return [Part(name="training step", run=partial(trace_step, options), seconds=45, is_check=False)]


def trace_step(options: Options) -> dict:
    """Trace one training step of d16 at batch 64, from tokens, and tabulate its kernels."""
    depth, batch = (1, 2) if options.tiny else (16, MAX_BATCH)
    args = argparse.Namespace(
        what="train",
        depth=depth,
        batch=batch,
        size=256,
        dtype="auto",
        attention="auto",
        remat="auto",
        scan_layers="auto",
        tiny=options.tiny,
    )
    _, task = throughput.make_networks(args)
    state, batch_inputs = throughput.initial_state(task), throughput.random_tokens(task.config, batch)
    step = throughput.jit_step(task.train_on_tokens)
    key = jax.random.key(0)
    step = step.lower(state, *batch_inputs, key).compile()
    for _ in range(2):  # warm up
        state, metrics = step(state, *batch_inputs, key)
    jax.block_until_ready((state, metrics))
    folder = options.out / "trace"
    settings = profiler.ProfileOptions()
    settings.python_tracer_level = 0
    profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=settings)
    with profiler.StepTraceAnnotation(EVENT, step_num=1):
        jax.block_until_ready(step(state, *batch_inputs, key))
    profiler.stop_trace()
    (trace,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    hlo = step.as_text()
    (options.out / "training_step.hlo").write_text(hlo)
    table = kernel_table.tabulate_kernels(kernel_table.read_trace(trace), paths=kernel_table.op_names(hlo))
    return {
        "step": f"d{depth}, batch {batch}, {task.model.attention}, remat {task.model.remat}",
        "busy_ms": table.busy_ms,
        "span_ms": table.span_ms,
        "kernels": [dataclasses.asdict(kernel) for kernel in table.kernels[:60]],
        "markdown": kernel_table.as_markdown(table),
        "trace": str(trace),
        "checks": {"kernels have names": bool(table.kernels) and bool(table.kernels[0].name)},
    }
