"""Measure the scaling of the training step: images/s, step time, MFU and efficiency on 1, 2, 4, ... devices.

    python -m benchmarks.scaling --config=configs/var.py:d16 --config.train.batch=256 --out=scaling
    python -m benchmarks.scaling --config=configs/var.py:d16 --config.train.batch=256 \\
        --batch_per_device=32 --out=host8                              # one run per slice, ...
    python -m benchmarks.scaling --merge=host1,host4,host8 --out=all   # ... merged into one table and plot

Times the training step of a config's next_scale stage as `train.py` runs it: state sharded according to
config.train.mesh, and steps dispatched asynchronously.  Batches are random tokens, since speed does not
depend on them; input, encoder and checkpoints are not measured.  Weak scaling fixes the batch per device;
strong scaling fixes the global batch, config.train.batch; on the most devices both are the same step.
Efficiency is images/s per device, relative to that on the fewest devices.

All processes take part (same flags as train.py).  Process 0 prints a table and one JSON line, and writes
scaling.json and scaling.png under --out.  Every process needs devices in every mesh, so the numbers of
devices are multiples of the number of processes; for fewer devices, start fewer processes and --merge runs.
"""

import dataclasses
import json
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import config_flags

from benchmarks.scaling_report import MODES, add_efficiency, add_rates, format_table, merge_runs, plot_scaling
from benchmarks.workload import (
    NUM_CLASSES,
    SCHEDULE_STEPS,
    abstract_tokenizer_params,
    make_task,
    next_scale_stage,
)
from var_jax import cli
from var_jax.errors import config_errors
from var_jax.paths import local_path
from var_jax.sharding import batch_sharding, check_batch, make_mesh, replicated
from var_jax.training.hardware import peak_flops
from var_jax.training.jit_steps import jit_train_step
from var_jax.training.state import count_parameters, create_state
from var_jax.training.transformer_task import NextScaleTask

FLAGS = flags.FLAGS
WARM_UP = 2  # untimed steps
CPU_NOTE = "CPU devices share the same cores: efficiencies mean nothing here"


@dataclasses.dataclass(frozen=True)
class Point:
    """A measurement: scaling mode, number of devices, and the global batch."""

    mode: str
    devices: int
    batch: int


def default_counts(devices: int, processes: int) -> list[int]:
    """Return the default numbers of devices: 1, 2, 4, ... and all devices of each process."""
    each = devices // processes
    return [processes * n for n in sorted({1 << i for i in range(each.bit_length())} | {each})]


def plan_points(counts: list[int], modes: list[str], batch: int, batch_per_device: int | None) -> list[Point]:
    """List the points to measure.

    Args:
      counts: numbers of devices.
      modes: among MODES.
      batch: global batch of strong scaling.
      batch_per_device: of weak scaling; None: that of strong scaling on the most devices.
    """
    each = batch_per_device or max(batch // max(counts), 1)
    batches = {"weak": lambda n: n * each, "strong": lambda n: batch}
    return [Point(mode, n, batches[mode](n)) for mode in modes for n in sorted(counts)]


def select_devices(count: int) -> list[jax.Device]:
    """Select `count` devices, the same number of each process.

    Raises:
      ValueError: if there are fewer devices, or the number of processes does not divide `count`.
    """
    processes, available = jax.process_count(), jax.device_count()
    if not 0 < count <= available or count % processes:
        raise ValueError(
            f"--devices={count}: must be at most the {available} available devices and a multiple of the "
            f"{processes} processes, which all need devices; for fewer, start fewer processes and --merge"
        )
    return [
        device
        for i in range(processes)
        for device in jax.local_devices(process_index=i)[: count // processes]
    ]


def random_inputs(task: NextScaleTask, batch: int, mesh: Mesh) -> tuple[dict, dict]:
    """Create random inputs of `train_step`: the quantizer's parameters, and a global batch of tokens."""
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_tokenizer_params(task.tokenizer))["quantizer"]
    random_array = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)
    tokens = rng.integers(0, task.config.num_codes, (batch, task.config.schedule.length), np.int32)
    labels = rng.integers(0, NUM_CLASSES, batch, np.int32)

    def shard(array):  # every process generates the whole array, and keeps its shards
        return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])

    frozen = {
        "tokenizer": {"quantizer": jax.device_put(jax.tree.map(random_array, shapes), replicated(mesh))}
    }
    return frozen, {"tokens": shard(tokens), "label": shard(labels)}


def time_step(task: NextScaleTask, mesh: Mesh, steps: int) -> dict[str, float]:
    """Compile the training step and measure its time.

    Args:
      task: with its batch.
      mesh: of the devices.
      steps: number of timed steps.

    Returns:
      compile_s, and the median `seconds` between steps.
    """
    cfg = task.stage.train
    make_state, abstract = create_state(task.init, task.optimizer, cfg.ema_decay > 0, jax.random.key(2), mesh)
    step = jit_train_step(task, cfg, SCHEDULE_STEPS, mesh, abstract)
    state, inputs, key = make_state(), random_inputs(task, cfg.batch, mesh), jax.random.key(3)
    start = time.perf_counter()
    step = step.lower(state, *inputs, key).compile()
    compile_s = time.perf_counter() - start
    previous, ticks = None, []
    for _ in range(WARM_UP + steps):
        state, metrics = step(state, *inputs, key)
        jax.block_until_ready(previous)  # while the device computes this step
        previous = metrics
        ticks.append(time.perf_counter())
    jax.block_until_ready(previous)
    ticks.append(time.perf_counter())
    return {"compile_s": compile_s, "seconds": float(np.median(np.diff(ticks)[WARM_UP:]))}


def measure_points(tasks: dict[Point, NextScaleTask], meshes: dict[int, Mesh], steps: int) -> list[dict]:
    """Measure each point, one row each; `seconds` is None if the step does not fit in memory."""
    rows, timed = [], {}
    for point, task in tasks.items():
        setup = (point.devices, point.batch)  # one may belong to both modes
        if setup not in timed:
            try:
                timed[setup] = time_step(task, meshes[point.devices], steps)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                timed[setup] = {"compile_s": None, "seconds": None}
        settings = {"attention": task.model.attention, "remat": task.model.remat}
        settings |= {"processes": jax.process_count(), "steps": steps}
        rows.append(dataclasses.asdict(point) | settings | timed[setup])
    return rows


def parse_request() -> tuple[dict[Point, NextScaleTask], dict[int, Mesh]]:
    """Build the task of each point to measure, and the mesh of each number of devices, from the flags.

    Raises:
      ValueError: if devices, mesh and batch do not fit each other, or the config is invalid.
    """
    cfg = next_scale_stage(FLAGS.config).train
    counts = default_counts(jax.device_count(), jax.process_count())
    if FLAGS.devices is not None:
        counts = sorted(set(cli.numbers("devices", int)))
    meshes = {n: make_mesh(**cfg.mesh, devices=select_devices(n)) for n in counts}
    tasks = {}
    for point in plan_points(counts, FLAGS.modes, cfg.batch, FLAGS.batch_per_device):
        check_batch(point.batch, meshes[point.devices], cfg.grad_accum_steps)
        tasks[point] = make_task(FLAGS.config, meshes[point.devices], point.batch)
    return tasks, meshes


def measure_run(tasks: dict[Point, NextScaleTask], meshes: dict[int, Mesh]) -> dict:
    """Measure all points; return the run as it is written to scaling.json."""
    device = jax.local_devices()[0]
    rows = measure_points(tasks, meshes, FLAGS.steps)
    task = next(iter(tasks.values()))
    rows = add_rates(rows, task.flops_per_image(), peak_flops(device))
    return {
        "config": config_flags.get_config_filename(FLAGS["config"]),
        "device": device.device_kind,
        "dtype": jnp.dtype(task.model.dtype).name,
        "parameters": count_parameters(jax.eval_shape(lambda: task.init(jax.random.key(0))[0])),
        "note": CPU_NOTE if device.platform == "cpu" else "",
        "rows": add_efficiency(rows),
    }


def main(_):
    if bool(FLAGS.config) == bool(FLAGS.merge):
        raise app.UsageError("give either --config to measure, or --merge to combine earlier runs")
    out = cli.local_folder("out")
    cli.initialize_distributed()
    with config_errors():
        if FLAGS.merge:
            folders = [local_path(folder, "--merge") for folder in FLAGS.merge]
            run = merge_runs([json.loads((folder / "scaling.json").read_text()) for folder in folders])
        else:
            tasks, meshes = parse_request()
    if not FLAGS.merge:
        with cli.abort_on_error():
            run = measure_run(tasks, meshes)
    if jax.process_index() == 0:
        write_results(run, out)


def write_results(run: dict, out: Path) -> None:
    """Print a run, and write its JSON and plot."""
    print(format_table(run))
    print(json.dumps({"what": "scaling", **run}))
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps(run, indent=1) + "\n")
    plot_scaling(run, out / "scaling.png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Config to measure, e.g. configs/var.py:d16")
    flags.DEFINE_list("devices", None, "Numbers of devices; default: 1, 2, 4, ... and all, of each process")
    flags.DEFINE_multi_enum("modes", list(MODES), MODES, "Scaling modes; repeat the flag for both")
    flags.DEFINE_integer(
        "batch_per_device", None, "Batch of weak scaling; default: from config.train.batch", lower_bound=1
    )
    flags.DEFINE_integer("steps", 10, "Timed steps per point", lower_bound=1)
    flags.DEFINE_list("merge", None, "Directories of earlier runs to combine, in place of measuring")
    flags.DEFINE_string("out", None, "Directory of scaling.json and scaling.png", required=True)
    cli.define_host_flags()
    cli.run(main)
