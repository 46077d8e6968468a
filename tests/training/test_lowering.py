"""Lowering for TPU, without one, of every program of a run: Mosaic reports unsupported kernels there."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.programs import sampling_program, training_programs
from benchmarks.workload import make_task, make_tokenizer_task
from configs import tokenizer, var
from tests.helpers.tiny import tiny_config
from var_jax.sharding import make_mesh

SCALES_WITH_KERNEL = {"step", "evaluation", "preview samples", "sampling"}


def as_on_tpu(task):
    """Give a transformer task the attention kernel and the dtype of TPUs."""
    task.model = task.model.clone(attention="splash", dtype=jnp.bfloat16)
    return task


def tiny_transformer(mesh):
    return as_on_tpu(make_task(tiny_config("unused"), mesh))


def published(name):
    def make(mesh):
        config = var.get_config(name)
        config.train.dtype = "bfloat16"
        config.transformer.attention = "einsum"  # replaced by `as_on_tpu`
        return as_on_tpu(make_task(config, mesh))

    return make


def published_tokenizer(mesh):
    stage = tokenizer.get_config()
    stage.train.dtype = "bfloat16"
    return make_tokenizer_task(stage)


@pytest.mark.parametrize(
    ("make", "sizes", "with_kernel"),
    [
        (tiny_transformer, {"fsdp": 2, "tensor": 2}, {"step", "evaluation"}),  # no map of 64 positions
        (published("d16"), {"fsdp": 4}, SCALES_WITH_KERNEL),
        (published("d36"), {"data": 2, "fsdp": 2}, SCALES_WITH_KERNEL),
        (published_tokenizer, {"fsdp": 4}, set()),
    ],
    ids=["tiny", "d16", "d36", "tokenizer"],
)
def test_all_that_a_pod_runs_lowers_for_tpu(make, sizes, with_kernel):
    """Mosaic kernels outside `shard_map` are an error on several devices."""
    mesh = make_mesh(**sizes, devices=jax.devices()[:4])
    task = make(mesh)
    programs, _, _ = training_programs(task, mesh, from_tokens=False)
    names = {"step", "evaluation", "preview reconstructions"}
    if task.name == "next_scale":
        per_scale = task.options.per_scale(task.config.schedule, task.config.num_codes)
        programs |= sampling_program(task, mesh, 8, per_scale)
        names = {"step", "evaluation", "preview samples", "preview scales", "sampling"}
    assert set(programs) == names
    lowered = {
        name: program.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        for name, (program, args) in programs.items()
    }
    assert {name for name, text in lowered.items() if "tpu_custom_call" in text} == with_kernel
