"""Plan memory and speed on a TPU slice or on GPUs by ahead-of-time compilation, without the hardware.

    python -m benchmarks.plan --config=configs/var.py:d30 --topology=v5e:8x8,v5p:4x4x4 \\
        --config.train.batch=1024 --out=plan.json
    python -m benchmarks.plan --config=configs/var.py:d16 --topology=h100:1x8,h200:2x8,a100:1x8
    python -m benchmarks.plan --config=configs/tokenizer.py --topology=v5e:4x4
    python -m benchmarks.plan --config=configs/var.py:d16 --topology=v5e:2x4 --what=sample --batch=64

Compiles the programs of the config's last stage: with --what=train the training step (from images, or from
tokens with --from_tokens), evaluation and previews; with --what=sample the program of `sample.py`.  The TPU
compiler comes with `pip install -e '.[tpu]'`, the GPU compiler with `pip install -e '.[plan-gpu]'`.

Memory is the compiler's count, plus the training state and the frozen networks, which stay on the chip; a row
fits if its largest program does.  Parts of the memory, FLOPs, bytes between chips and the time bounds are
computed analytically (`benchmarks/roofline.py`).  A bound is what the chip could do at best, not a forecast.
`suggested` is the mesh with the lowest bound that holds the state (of several, the one with the least
traffic), and the fastest remat policy that fits there by estimate.

Prints a table, and one JSON line with all values; --out writes them to a file.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from benchmarks.cloud import launch_command
from benchmarks.compile_ahead import CompiledProgram, compile_program, gib_per_device, topology_devices
from benchmarks.programs import abstract_frozen, sampling_program, training_programs
from benchmarks.roofline import Step, best_mesh, bound
from benchmarks.workload import NEXT_SCALE_TASKS, make_task, make_tokenizer_task
from var_jax import cli
from var_jax.errors import config_errors
from var_jax.paths import local_path
from var_jax.sharding import check_batch, make_mesh
from var_jax.stages import stages_of
from var_jax.training.hardware import (
    USABLE_MEMORY_FRACTION,
    chip,
    memory_bytes,
    remat_that_fits,
    rows_per_image,
)
from var_jax.training.task import Task, program_flops
from var_jax.training.tokenizer_task import TokenizerTask
from var_jax.training.transformer_task import NextScaleTask
from var_jax.transformer.flops import generation_flops, training_flops
from var_jax.transformer.remat import WITH_SCORES, saved_activation_bytes

FLAGS = flags.FLAGS
PROGRAMS = ("step", "evaluation", "preview")


def make_planned_task(config: ConfigDict, mesh: Mesh) -> Task:
    """Build the task of a config's last stage on a mesh; dtype `auto` becomes bfloat16.

    Raises:
      ValueError: on a stage that cannot be planned, or a batch that the mesh does not divide.
    """
    stage = stages_of(config)[-1]
    if stage.task not in ("tokenizer", *NEXT_SCALE_TASKS):
        raise ValueError(
            f"--config must end with a stage tokenizer, {' or '.join(NEXT_SCALE_TASKS)}, got {stage.task}; "
            "--config.stages=NAME chooses one"
        )
    check_batch(stage.train.batch, mesh, stage.train.grad_accum_steps)
    if stage.train.dtype == "auto":
        stage.train.dtype = "bfloat16"
    return make_tokenizer_task(stage) if stage.task == "tokenizer" else make_task(config, mesh)


def plan_train(task: Task, mesh: Mesh, from_tokens: bool, names: list[str]) -> tuple[dict, dict]:
    """Compile the training step, evaluation and previews of a task on a mesh.

    Args:
      task: of the stage to plan.
      mesh: of the devices to compile for.
      from_tokens: True for a step from stored tokens in place of images.
      names: programs to compile, among PROGRAMS.

    Returns:
      Fields of a row of the table, and the compiled programs by name.
    """
    programs, state, frozen = training_programs(task, mesh, from_tokens)
    results = {
        name: compile_program(function, *inputs, resident=(state, frozen))
        for name, (function, inputs) in programs.items()
        if name.split()[0] in names
    }
    row = {
        "batch": task.stage.train.batch,
        "parameters_gib": gib_per_device(state.params),
        "optimiser_gib": gib_per_device((state.opt_state, state.extra))
        + (gib_per_device(state.ema) if state.ema else 0.0),
        "frozen_gib": gib_per_device(frozen),
        **fit_fields(results, memory_bytes(mesh.devices.flat[0])),
    }
    bounds = _tokenizer_bound if isinstance(task, TokenizerTask) else _transformer_bound
    return row | bounds(task, mesh, from_tokens), results


def _transformer_bound(task: NextScaleTask, mesh: Mesh, from_tokens: bool) -> dict:
    """Compute the analytic fields of a transformer's row."""
    other = task.flops_per_image() - training_flops(task.config)  # of the negatives and the reference
    other += 0.0 if from_tokens else task_encoder_flops(task)
    step = Step.from_config(task.stage.train, mesh, task.model.remat, task.model.dtype, other)
    kept = saved_activation_bytes(
        task.config, step.remat, step.itemsize, scores=task.model.attention in WITH_SCORES
    )
    return {
        "attention": task.model.attention,
        "remat": step.remat,
        "activations_gib": rows_per_image(task.stage)
        * (step.batch / step.accumulate / step.devices * kept / 2**30),
        **bound(task.config, step, chip(mesh.devices.flat[0])),
        "suggested": suggest_mesh(task, step, mesh),
    }


def _tokenizer_bound(task: TokenizerTask, mesh: Mesh, from_tokens: bool) -> dict:
    """Compute the analytic fields of a tokenizer's row, from the FLOPs of its matrix products alone."""
    batch, flops = task.stage.train.batch, task.flops_per_image()
    seconds = batch * flops / (mesh.size * chip(mesh.devices.flat[0]).flops)
    return {
        "compute_s": seconds,
        "step_s": seconds,
        "images_per_s": batch / seconds,
        "model_tflops": batch * flops / 1e12,
    }


def suggest_mesh(task: NextScaleTask, step: Step, mesh: Mesh) -> str:
    """Describe the estimated best mesh and remat policy."""
    stage = ConfigDict({**task.stage, "transformer": {"remat": "auto"}})
    data_sheet = chip(mesh.devices.flat[0])

    def remat_on(sizes: dict[str, int]) -> str:
        resized = make_mesh(**sizes, devices=mesh.devices.flatten())
        return remat_that_fits(
            stage, task.config, resized, task.model.attention, task.model.dtype, task.model.scan_layers
        )

    sizes, remat = best_mesh(
        task.config, step, data_sheet, USABLE_MEMORY_FRACTION * data_sheet.memory / 2, remat_on
    )
    return f"{describe_mesh(sizes)}, remat {remat}"


def task_encoder_flops(task: NextScaleTask) -> float:
    """Compute the FLOPs with which a task's training step encodes one image into tokens."""
    side, params = task.image_size, abstract_frozen(task)["tokenizer"]
    encode = lambda params, images: task.tokenizer.apply({"params": params}, images, method="encode")
    return program_flops(encode, params, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def plan_sample(task: NextScaleTask, mesh: Mesh, batch: int) -> tuple[dict, dict]:
    """Compile the generation of a batch, with parameters replicated on all devices; see `plan_train`."""
    per_scale = task.options.per_scale(task.config.schedule, task.config.num_codes)
    programs = sampling_program(task, mesh, batch, per_scale)
    results = {name: compile_program(function, *inputs) for name, (function, inputs) in programs.items()}
    tokenizer, params = programs["sampling"][1][:2]
    data_sheet = chip(mesh.devices.flat[0])
    flops = generation_flops(task.config, per_scale.num_guided_scales)
    compute_s = batch * flops / (mesh.size * data_sheet.flops)
    # Each scale reads all parameters.
    weights_s = gib_per_device(params) * 2**30 * len(task.config.scales) / data_sheet.bandwidth
    step_s = max(compute_s, weights_s)
    row = {
        "batch": batch,
        "attention": task.model.attention,
        "parameters_gib": gib_per_device(params),
        "frozen_gib": gib_per_device(tokenizer),
        **fit_fields(results, memory_bytes(mesh.devices.flat[0])),
        "compute_s": compute_s,
        "memory_s": weights_s,
        "step_s": step_s,
        "images_per_s": batch / step_s,
        "model_tflops": batch * flops / 1e12,
    }
    return row, results


def fit_fields(results: dict[str, CompiledProgram], memory: float) -> dict:
    """Compute the memory fields of a row: whether all programs fit, and the largest of them.

    Args:
      results: compiled programs by name.
      memory: bytes of a device.
    """
    programs = {
        name: {
            "fits": result.program is not None and result.gib <= memory / 2**30,
            "gib": result.gib,
            "compile_s": result.compile_s,
            **{f"{part}_gib": size for part, size in result.parts.items()},
        }
        for name, result in results.items()
    }
    largest = max(programs, key=lambda name: programs[name]["gib"])
    return {
        "fits": all(program["fits"] for program in programs.values()),
        "gib": programs[largest]["gib"],
        "largest": largest,
        "room_gib": memory / 2**30 - programs[largest]["gib"],
        "compile_s": sum(program["compile_s"] for program in programs.values()),
        "programs": programs,
    }


def describe_mesh(mesh: dict[str, int]) -> str:
    """Format the mesh axes that are larger than 1, such as `data 2 x fsdp 8`."""
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one chip"


def format_rows(rows: list[dict]) -> str:
    """Format rows as text."""
    lines = []
    for row in rows:
        settings = ", ".join(
            [row["mesh"]]
            + ([row["attention"]] if "attention" in row else [])
            + ([f"remat {row['remat']}"] if "remat" in row else [])
        )
        lines.append(f"{row['topology']:12} {row['what']} batch {row['batch']}, {settings}")
        fits = "fits" if row["fits"] else "DOES NOT FIT"
        room = f"{abs(row['room_gib']):.2f} GiB {'left' if row['room_gib'] >= 0 else 'over'}"
        lines.append(
            f"    {fits}: {row['gib']:.2f} GiB a chip ({row['largest']}), {room}; "
            f"compiled in {row['compile_s']:.0f} s"
        )
        parts = {name: row[f"{name}_gib"] for name in ESTIMATED_PARTS if f"{name}_gib" in row}
        lines.append("    GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items()))
        for name, program in row["programs"].items():
            parts = {part: program[f"{part}_gib"] for part in COMPILED_PARTS if f"{part}_gib" in program}
            sizes = ", ".join(f"{part} {size:.2f}" for part, size in parts.items())
            lines.append(f"    {name}: {program['gib']:.2f} GiB" + (f" = {sizes}" if sizes else ", too many"))
        times = {name: row[f"{name}_s"] for name in ("compute", "memory", "link") if f"{name}_s" in row}
        limits = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items())
        mfu = f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
        lines.append(
            f"    bound: {limits} -> {row['images_per_s']:.0f} images/s{mfu}; {row['model_tflops']:.1f} TFLOP"
        )
        if "suggested" in row:
            lines.append(f"    {row['link_gb']:.2f} GB between chips; suggested: {row['suggested']}")
        if row["fits"] and row["launch"]:
            lines.append(f"    {row['launch']}")
    return "\n".join(lines)


ESTIMATED_PARTS = ("parameters", "optimiser", "frozen", "activations")  # from shapes
COMPILED_PARTS = ("arguments", "unread", "outputs", "temporaries", "program")  # as the compiler counts them


def parse_request(config: ConfigDict, topologies: list[str]) -> list[tuple[str, Task, Mesh]]:
    """Build the task and mesh of each topology that the flags name.

    Returns:
      Topology, task and mesh, for each.

    Raises:
      ValueError: naming the flag or field that is wrong.
    """
    if FLAGS.from_tokens and stages_of(config)[-1].task == "tokenizer":
        raise ValueError("--from_tokens: a tokenizer is trained on images")
    if unknown := set(FLAGS.programs) - set(PROGRAMS):
        raise ValueError(f"--programs must be among {', '.join(PROGRAMS)}; got {', '.join(sorted(unknown))}")
    plans = []
    for name in topologies:
        mesh = make_mesh(**stages_of(config)[-1].train.mesh, devices=topology_devices(name))
        task = make_planned_task(config, mesh)
        if FLAGS.what == "sample":
            if isinstance(task, TokenizerTask):
                raise ValueError("--what=sample: the last stage of the config must be next_scale")
            if FLAGS.batch % mesh.size:
                raise ValueError(f"--batch={FLAGS.batch} must be a multiple of the {mesh.size} chips")
        plans.append((name, task, mesh))
    return plans


def main(_):
    with config_errors():
        out = FLAGS.out and local_path(FLAGS.out, "--out")
        plans = parse_request(FLAGS.config, FLAGS.topology)
    rows = []
    for name, task, mesh in plans:
        if FLAGS.what == "train":
            row, results = plan_train(task, mesh, FLAGS.from_tokens, FLAGS.programs)
        else:
            row, results = plan_sample(task, mesh, FLAGS.batch)
        for program, result in results.items():
            if FLAGS.hlo and result.program:  # libtpu cannot print some programs for v5p
                path = f"{FLAGS.hlo}{name.replace(':', '_')}_{program.replace(' ', '_')}.txt"
                Path(path).write_text(result.program.as_text())
        request = {
            "topology": name,
            "what": FLAGS.what,
            "task": task.name,
            "mesh": describe_mesh(dict(mesh.shape)),
        }
        rows.append(request | row | {"launch": launch_command(name, mesh.size)})
        print(format_rows(rows[-1:]), flush=True)
    name = config_flags.get_config_filename(FLAGS["config"])
    print(json.dumps({"what": "plan", "config": name, "rows": rows}))
    if out:
        out.write_text(json.dumps({"config": name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Config to plan, e.g. configs/var.py:d16")
    flags.DEFINE_list("topology", ["v5e:4x4"], "TPU slices, e.g. v5e:8x8,v5p:4x4x4, or GPUs, e.g. h100:2x8")
    flags.DEFINE_enum("what", "train", ["train", "sample"], "Programs of train.py or of sample.py")
    flags.DEFINE_list("programs", list(PROGRAMS), "train: which programs to compile")
    flags.DEFINE_bool("from_tokens", False, "train: step from a token cache in place of images")
    flags.DEFINE_integer("batch", 128, "sample: batch over all chips", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write")
    flags.DEFINE_string("hlo", None, "Prefix of the files to which the compiled programs are written as text")
    flags.mark_flag_as_required("config")
    cli.run(main, caches_programs=False)
