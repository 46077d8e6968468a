"""What fits on a TPU slice and how fast it can be at best: compiled for the slice with no TPU at hand.

    python -m var_jax.benchmarks.plan --config=configs/var.py:d30 --topology=v5e:8x8,v5p:4x4x4 \\
        --config.train.batch=1024 --out=plan.json
    python -m var_jax.benchmarks.plan --config=configs/var.py:d16 --topology=v5e:2x4 --what=sample --batch=64

Compiles the step that `train.py` runs (from images, or from tokens with --from_tokens), or the program that
`sample.py` runs, with the compiler of the TPU (`pip install -e '.[plan]'`).  Memory and whether it fits are
the compiler's.  Parts of the memory, FLOPs, bytes between chips and the bounds are worked out on paper
(`benchmarks/roofline.py`): a bound is what the chip could do at best, not a forecast.  `suggested` are the
mesh with the least bound that holds the state (of several, that with the least traffic), and the fastest
remat policy that fits there by estimate.

Prints a table, and writes all of it as JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, config_flags

from var_jax.benchmarks.cloud import launch_command
from var_jax.benchmarks.compile_ahead import Compiled, compiled, gib, slice_of, train_inputs, whole
from var_jax.benchmarks.roofline import Step, best_mesh, bound
from var_jax.benchmarks.subject import STEPS, make_task, next_scale_stage, tokenizer_shapes
from var_jax.sampling.generate import generate, image_keys
from var_jax.sampling.precision import in_compute_dtype
from var_jax.training.chips import chip
from var_jax.training.memory import SHARE, remat_that_fits
from var_jax.training.sharding import check_batch, make_mesh, on_mesh
from var_jax.training.step import train_program
from var_jax.training.task import program_flops
from var_jax.training.transformer_task import NextScaleTask
from var_jax.transformer.flops import generation_flops
from var_jax.transformer.remat import WITH_SCORES, kept_bytes

FLAGS = flags.FLAGS


def plan_train(config: ConfigDict, mesh: Mesh, from_tokens: bool) -> dict:
    """Compiles the training step on a mesh; fields of a row of the table."""
    task = make_task(config, mesh)
    cfg, inputs = task.stage.train, train_inputs(task, mesh, from_tokens)
    check_batch(cfg.batch, mesh, cfg.accumulate)
    found = compiled(train_program(task, cfg, STEPS, mesh, inputs[0]), *inputs)
    encoder = 0.0 if from_tokens else encoder_flops(task)
    step = Step.of(cfg, mesh, task.model.remat, task.model.dtype, encoder)
    data_sheet, state = chip(mesh.devices.flat[0]), inputs[0]
    kept = kept_bytes(task.config, step.remat, step.itemsize, scores=task.model.attention in WITH_SCORES)
    return {
        "batch": cfg.batch,
        "attention": task.model.attention,
        "remat": step.remat,
        "parameters_gib": gib(state.params),
        "optimiser_gib": gib(state.opt_state) + (gib(state.ema) if step.ema else 0.0),
        "tokenizer_gib": gib(inputs[1]),
        "activations_gib": step.batch / step.accumulate / step.devices * kept / 2**30,
        **_fit(found, data_sheet.memory),
        **bound(task.config, step, data_sheet),
        "suggested": suggestion(task, step, mesh),
        "program": found.program,
    }


def suggestion(task: NextScaleTask, step: Step, mesh: Mesh) -> str:
    """Mesh and remat policy that look best by estimate."""
    stage = ConfigDict({**task.stage, "transformer": {"remat": "auto"}})
    data_sheet = chip(mesh.devices.flat[0])

    def remat_on(sizes: dict[str, int]) -> str:
        there = make_mesh(**sizes, devices=mesh.devices.flatten())
        return remat_that_fits(stage, task.config, there, task.model.attention, task.model.dtype)

    sizes, remat = best_mesh(task.config, step, data_sheet, SHARE * data_sheet.memory / 2, remat_on)
    return f"{in_words(sizes)}, remat {remat}"


def encoder_flops(task: NextScaleTask) -> float:
    """Of one image into tokens."""
    side, params = task.image_size, nn.meta.unbox(tokenizer_shapes(task.tokenizer))
    encode = lambda params, images: task.tokenizer.apply({"params": params}, images, method="encode")  # noqa: E731
    return program_flops(encode, params, jnp.zeros((1, side, side, 3)))


def plan_sample(config: ConfigDict, mesh: Mesh, batch: int) -> dict:
    """Compiles the generation of a batch, every device with all parameters; fields of a row of the table."""
    task, devices = make_task(config, mesh), mesh.size
    if batch % devices:
        raise ValueError(f"--batch={batch} must be a multiple of the {devices} chips")
    cast = partial(in_compute_dtype, dtype=task.model.dtype)
    params = whole(jax.eval_shape(lambda: cast(nn.meta.unbox(task.init(jax.random.key(0))[0]))), mesh)
    tokenizer = whole(jax.eval_shape(cast, nn.meta.unbox(tokenizer_shapes(task.tokenizer))), mesh)
    split = NamedSharding(mesh, P(mesh.axis_names))
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=split)
    keys = jax.eval_shape(lambda: image_keys(0, jnp.arange(batch)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split)
    controls = task.options.controls(task.config.schedule, task.config.num_codes)
    draw = on_mesh(lambda *inputs: generate(task.tokenizer, task.model, *inputs, controls), mesh)
    found = compiled(jax.jit(draw), tokenizer, params, labels, keys)
    data_sheet = chip(mesh.devices.flat[0])
    flops = generation_flops(task.config, controls.guided)
    compute_s = batch * flops / (devices * data_sheet.flops)
    weights_s = (
        gib(params) * 2**30 * len(task.config.scales) / data_sheet.bandwidth
    )  # all are read at each scale
    step_s = max(compute_s, weights_s)
    return {
        "batch": batch,
        "attention": task.model.attention,
        "parameters_gib": gib(params),
        "tokenizer_gib": gib(tokenizer),
        **_fit(found, data_sheet.memory),
        "compute_s": compute_s,
        "memory_s": weights_s,
        "step_s": step_s,
        "images_per_s": batch / step_s,
        "model_tflops": batch * flops / 1e12,
        "program": found.program,
    }


def _fit(found: Compiled, memory: float) -> dict:
    return {
        "fits": found.fits,
        "gib": found.gib,
        "room_gib": memory / 2**30 - found.gib,
        "compile_s": found.compile_s,
        **{f"{name}_gib": size for name, size in found.parts.items()},
    }


def in_words(mesh: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one chip"


def table(rows: list[dict]) -> str:
    """The rows for people."""
    lines = []
    for row in rows:
        fits = "fits" if row["fits"] else "DOES NOT FIT"
        room = f"{row['room_gib']:.2f} GiB {'left' if row['fits'] else 'over'}".replace("-", "")
        lines.append(
            f"{row['topology']:12} {row['what']} batch {row['batch']}, {row['mesh']}, {row['attention']}"
            + (f", remat {row['remat']}" if "remat" in row else "")
        )
        lines.append(f"    {fits}: {row['gib']:.2f} GiB a chip, {room}; compiled in {row['compile_s']:.0f} s")
        parts = {name: row[f"{name}_gib"] for name in PARTS if f"{name}_gib" in row}
        lines.append("    GiB: " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items()))
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


PARTS = (
    "parameters",
    "optimiser",
    "tokenizer",
    "activations",
    "arguments",
    "unread",
    "outputs",
    "temporaries",
    "program",
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.ERROR)
    config, rows = FLAGS.config, []
    try:
        stage = next_scale_stage(config)
        if stage.train.dtype == "auto":
            stage.train.dtype = "bfloat16"
        for name, mesh in [
            (name, make_mesh(**stage.train.mesh, devices=slice_of(name))) for name in FLAGS.topology
        ]:
            if FLAGS.what == "train":
                row = plan_train(config, mesh, FLAGS.from_tokens)
            else:
                row = plan_sample(config, mesh, FLAGS.batch)
            program = row.pop("program")
            if FLAGS.hlo and program:  # some of libtpu's programs for v5p cannot be written
                Path(f"{FLAGS.hlo}{name.replace(':', '_')}.txt").write_text(program.as_text())
            here = {"topology": name, "what": FLAGS.what, "mesh": in_words(dict(mesh.shape))}
            rows.append(here | row | {"launch": launch_command(name, mesh.size)})
            print(table(rows[-1:]), flush=True)
    except ValueError as error:  # the message names the flag or field
        sys.exit(f"plan: {error}")
    name = config_flags.get_config_filename(FLAGS["config"])
    print(json.dumps({"what": "plan", "config": name, "rows": rows}))
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps({"config": name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="What to plan, e.g. configs/var.py:d16")
    flags.DEFINE_list("topology", ["v5e:4x4"], "Slices, e.g. v5e:8x8,v5p:4x4x4")
    flags.DEFINE_enum("what", "train", ["train", "sample"], "The training step, or the drawing of a batch")
    flags.DEFINE_bool("from_tokens", False, "train: from a token cache in place of images")
    flags.DEFINE_integer("batch", 128, "sample: images at once over all chips", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write")
    flags.DEFINE_string("hlo", None, "Start of the names of files for the compiled programs' text")
    flags.mark_flag_as_required("config")
    app.run(main)
