"""How the training step scales over devices: images/s, step time, MFU and efficiency on 1, 2, 4, ... of them.

    python -m benchmarks.scaling --config=configs/var.py:d16 --config.train.batch=256 --out=scaling
    python -m benchmarks.scaling --config=configs/var.py:d16 --config.train.batch=256 \\
        --batch_per_device=32 --out=host8                              # one run a slice, ...
    python -m benchmarks.scaling --merge=host1,host4,host8 --out=all   # ... and their pictures in one

Times the step of the stage next_scale of a config as `train.py` runs it (state sharded as config.train.mesh
says, next step handed over while the device works), on random tokens: speed does not depend on them, and
input, encoder, checkpoints are not measured.  Weak scaling keeps the batch of a device; strong scaling keeps
the global batch, config.train.batch; on the most devices both are the same step.  Efficiency is images/s a
device, over that on the fewest devices.

All processes take part (flags as of train.py), process 0 prints a table and one JSON line, and writes
scaling.json and scaling.png under --out.  Every process has to have devices in every mesh, so the numbers of
devices are multiples of the number of processes; for fewer, start fewer processes and --merge the runs.
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

from benchmarks.scaling_report import MODES, draw, merge, table, with_efficiency, with_rates
from benchmarks.workload import CLASSES, STEPS, make_task, next_scale_stage, tokenizer_shapes
from var_jax import cli
from var_jax.errors import config_errors
from var_jax.paths import local_path
from var_jax.sharding import batch_sharding, check_batch, make_mesh, replicated
from var_jax.training.hardware import peak_flops
from var_jax.training.jit_steps import jit_train_step
from var_jax.training.state import count_parameters, create_state
from var_jax.training.transformer_task import NextScaleTask

FLAGS = flags.FLAGS
WARM_UP = 2  # steps before those that are timed
FAKE = "CPU devices share the same cores: efficiencies mean nothing here"


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing to measure: a number of devices and the global batch on them."""

    mode: str
    devices: int
    batch: int


def default_counts(devices: int, processes: int) -> list[int]:
    """Every process with 1, 2, 4, ... of its devices, and all."""
    each = devices // processes
    return [processes * n for n in sorted({1 << i for i in range(each.bit_length())} | {each})]


def plan(counts: list[int], modes: list[str], batch: int, batch_per_device: int | None) -> list[Point]:
    """What to measure.

    Args:
      counts: numbers of devices.
      modes: of MODES.
      batch: global batch of strong scaling.
      batch_per_device: of weak scaling; None for what it is in strong scaling on the most devices.
    """
    each = batch_per_device or max(batch // max(counts), 1)
    batches = {"weak": lambda n: n * each, "strong": lambda n: batch}
    return [Point(mode, n, batches[mode](n)) for mode in modes for n in sorted(counts)]


def subset(count: int) -> list[jax.Device]:
    """So many devices, equally many of each process.

    Raises:
      ValueError: where that cannot be.
    """
    processes, there = jax.process_count(), jax.device_count()
    if not 0 < count <= there or count % processes:
        raise ValueError(
            f"--devices={count}: must be at most the {there} devices there are, and a multiple of the "
            f"{processes} processes, which all need devices; for fewer, start fewer processes and --merge"
        )
    return [
        device
        for i in range(processes)
        for device in jax.local_devices(process_index=i)[: count // processes]
    ]


def random_inputs(task: NextScaleTask, batch: int, mesh: Mesh) -> tuple[dict, dict]:
    """What `train_step` reads beside the state: the quantizer's parameters, and a global batch of tokens."""
    rng = np.random.default_rng(0)
    shapes = nn.meta.unbox(tokenizer_shapes(task.tokenizer))["quantizer"]
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)  # noqa: E731
    tokens = rng.integers(0, task.config.num_codes, (batch, task.config.schedule.length), np.int32)
    labels = rng.integers(0, CLASSES, batch, np.int32)

    def split(array):  # every process has drawn all of it, and keeps its part
        return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda part: array[part])

    frozen = {"tokenizer": {"quantizer": jax.device_put(jax.tree.map(draw, shapes), replicated(mesh))}}
    return frozen, {"tokens": split(tokens), "label": split(labels)}


def time_step(task: NextScaleTask, mesh: Mesh, steps: int) -> dict[str, float]:
    """Compiles the training step and takes its time.

    Returns:
      compile_s, and the median of `seconds` from step to step.
    """
    cfg = task.stage.train
    make_state, abstract = create_state(task.init, task.optimizer, cfg.ema_decay > 0, jax.random.key(2), mesh)
    step = jit_train_step(task, cfg, STEPS, mesh, abstract)
    state, inputs, key = make_state(), random_inputs(task, cfg.batch, mesh), jax.random.key(3)
    start = time.perf_counter()
    step = step.lower(state, *inputs, key).compile()
    compile_s, before, ticks = time.perf_counter() - start, None, []
    for _ in range(WARM_UP + steps):
        state, metrics = step(state, *inputs, key)
        jax.block_until_ready(before)  # of the step before, while the device works on this one
        before = metrics
        ticks.append(time.perf_counter())
    jax.block_until_ready(before)
    ticks.append(time.perf_counter())
    return {"compile_s": compile_s, "seconds": float(np.median(np.diff(ticks)[WARM_UP:]))}


def measure(tasks: dict[Point, NextScaleTask], meshes: dict[int, Mesh], steps: int) -> list[dict]:
    """A row for each point; where a step does not fit the memory, without its time."""
    rows, timed = [], {}
    for point, task in tasks.items():
        same = (point.devices, point.batch)
        if same not in timed:
            try:
                timed[same] = time_step(task, meshes[point.devices], steps)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                timed[same] = {"compile_s": None, "seconds": None}
        how = {"attention": task.model.attention, "remat": task.model.remat}
        how |= {"processes": jax.process_count(), "steps": steps}
        rows.append(dataclasses.asdict(point) | how | timed[same])
    return rows


def asked() -> tuple[dict[Point, NextScaleTask], dict[int, Mesh]]:
    """What the flags ask for: the task of each point, and the mesh of each number of devices.

    Raises:
      ValueError: where devices, mesh and batch do not fit each other, or the config makes no model.
    """
    cfg = next_scale_stage(FLAGS.config).train
    counts = default_counts(jax.device_count(), jax.process_count())
    if FLAGS.devices is not None:
        counts = sorted(set(cli.numbers("devices", int)))
    meshes = {n: make_mesh(**cfg.mesh, devices=subset(n)) for n in counts}
    tasks = {}
    for point in plan(counts, FLAGS.modes, cfg.batch, FLAGS.batch_per_device):
        check_batch(point.batch, meshes[point.devices], cfg.grad_accum_steps)
        tasks[point] = make_task(FLAGS.config, meshes[point.devices], point.batch)
    return tasks, meshes


def measured(tasks: dict[Point, NextScaleTask], meshes: dict[int, Mesh]) -> dict:
    """The run, as it is written."""
    device, rows = jax.local_devices()[0], measure(tasks, meshes, FLAGS.steps)
    task = next(iter(tasks.values()))
    rows = with_rates(rows, task.flops_per_image(), peak_flops(device))
    return {
        "config": config_flags.get_config_filename(FLAGS["config"]),
        "device": device.device_kind,
        "dtype": jnp.dtype(task.model.dtype).name,
        "parameters": count_parameters(jax.eval_shape(lambda: task.init(jax.random.key(0))[0])),
        "note": FAKE if device.platform == "cpu" else "",
        "rows": with_efficiency(rows),
    }


def main(_):
    if bool(FLAGS.config) == bool(FLAGS.merge):
        raise app.UsageError("give --config of what to measure, or --merge of what was")
    out = cli.local_folder("out")
    cli.join_hosts()
    with config_errors():
        if FLAGS.merge:
            folders = [local_path(folder, "--merge") for folder in FLAGS.merge]
            run = merge([json.loads((folder / "scaling.json").read_text()) for folder in folders])
        else:
            job = asked()
    if not FLAGS.merge:
        with cli.failing_at_once():
            run = measured(*job)
    if jax.process_index() == 0:
        report(run, out)


def report(run: dict, out: Path) -> None:
    """Prints and writes a run."""
    print(table(run))
    print(json.dumps({"what": "scaling", **run}))
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps(run, indent=1) + "\n")
    draw(run, out / "scaling.png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="What to measure, e.g. configs/var.py:d16")
    flags.DEFINE_list("devices", None, "Numbers of devices; by default 1, 2, 4, ... of each process, and all")
    flags.DEFINE_multi_enum("modes", list(MODES), MODES, "Of scaling; give it twice for both")
    flags.DEFINE_integer(
        "batch_per_device", None, "Of weak scaling; by default of config.train.batch", lower_bound=1
    )
    flags.DEFINE_integer("steps", 10, "Timed at each point", lower_bound=1)
    flags.DEFINE_list("merge", None, "Directories of earlier runs to put into one, in place of measuring")
    flags.DEFINE_string("out", None, "Where scaling.json and scaling.png go", required=True)
    cli.define_host_flags()
    cli.run(main)
