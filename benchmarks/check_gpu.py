"""Compile for NVIDIA GPUs, with none at hand, what training, evaluation, previews and sampling run there.

    python -m benchmarks.check_gpu --topology=h100:1x1,h100:1x8

Small networks, both stages, in bfloat16; on one GPU and on the eight of a node.  It needs the CUDA plugin and
cuDNN of the extra `plan-gpu`, no driver and no GPU.  Nothing runs: speed, cuDNN's own verdict on a shape and
what autotuning chooses are not seen (docs/scaling.md).

Prints a line per program, and ends with code 1 and a traceback where one cannot be compiled.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from absl import flags, logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from benchmarks.compile_ahead import Compiled, compiled, topology_devices
from benchmarks.programs import sampling_program, training_programs
from benchmarks.workload import make_task, make_tokenizer_task
from configs import digits
from var_jax import cli
from var_jax.scales import SCALES_256, Scales
from var_jax.sharding import activation_spec, make_mesh, on_mesh
from var_jax.training.task import Task
from var_jax.transformer.attention import IMPLEMENTATIONS, attend, choose_attention, groups

TOPOLOGY = flags.DEFINE_list("topology", ["h100:1x1", "h100:1x8"], "GPUs, as in benchmarks.plan")
NOT_FOR_GPUS = ("splash",)
SPAWN = multiprocessing.get_context("spawn")
FORWARD, BACKWARD = r"__cudnn\$fmhaSoftmax\b", r"__cudnn\$fmhaSoftmaxBackward\b"


def small_config() -> ConfigDict:
    """Both stages: the least networks that use each kernel and loss that the published ones use."""
    config = digits.get_config()
    for stage in (config.tokenizer, config.next_scale):
        stage.train.update(dict(batch=16, dtype="bfloat16", ema_decay=0.99))
    # A map of 64 positions, the least that cuDNN's attention takes; images of 16 pixels, the least of VGG.
    config.tokenizer.model.update(dict(scales=(1, 8), num_codes=64, ch=32, ch_mult=(1, 1)))
    config.tokenizer.codebook.update(dict(kmeans_steps=1, ema_decay=0.99))
    config.next_scale.model.update(dict(depth=2, width=128, num_heads=2, drop_path=0.1))
    config.next_scale.sampling.update(dict(guidance=1.5, top_k=20, top_p=0.96))
    return config


def with_all_losses(stage: ConfigDict) -> ConfigDict:
    """A tokenizer stage with perceptual loss and discriminator, as the published recipe has them."""
    stage = stage.copy_and_resolve_references()
    stage.loss.perceptual = 1.0
    stage.adversarial.update(dict(weight=0.4, start_fraction=0.2, layers=1, channels=16))
    return stage


def count(pattern: str, result: Compiled) -> int:
    """Number of custom calls whose target matches in a compiled program."""
    return len(re.findall(rf'custom_call_target="{pattern}"', result.program.as_text()))


def report(topology: str, name: str, result: Compiled) -> None:
    print(f"{topology:10} {name:32} {result.gib:7.3f} GiB  compiled in {result.compile_s:.1f} s", flush=True)


def check_task(topology: str, label: str, task: Task, mesh: Mesh) -> dict[str, Compiled]:
    """Do what `train.py` does before its first step, then compile all that it runs."""
    with jax.set_mesh(mesh):  # a program lowered within, with no sharding of its own, is the GPU's
        flops = task.flops_per_image()
    assert flops > 0, f"{label}: {flops} FLOPs an image"
    programs, state, frozen = training_programs(task, mesh, from_tokens=False)
    results = {}
    for name, (function, inputs) in programs.items():
        results[name] = compiled(function, *inputs, resident=(state, frozen))
        report(topology, f"{label}: {name}", results[name])
    return results


def check_transformer(topology: str, config: ConfigDict, mesh: Mesh) -> None:
    """Compile the next_scale stage and its sampling; cuDNN's kernels must be in the programs."""
    task = make_task(config, mesh)
    assert task.model.attention == "cudnn", f"auto is {task.model.attention} on {topology}"
    results = check_task(topology, "next_scale", task, mesh)
    check_tokens(results["evaluation"])
    # Gathers and scatters of `fsdp`, or nothing to move.
    is_split = mesh.size > 1
    text = results["step"].program.as_text()
    assert ("all-gather" in text) == ("reduce-scatter" in text or "all-reduce" in text) == is_split
    for pattern in (FORWARD, BACKWARD):
        assert count(pattern, results["step"]) == 1, f"{pattern}: {count(pattern, results['step'])}"
    controls = task.options.controls(task.config.schedule, task.config.num_codes)
    for name, (function, inputs) in sampling_program(task, mesh, 2 * mesh.size, controls).items():
        result = compiled(function, *inputs)
        report(topology, name, result)
        assert count(FORWARD, result) == 1


def check_tokens(evaluation: Compiled) -> None:
    """Check that tokens come from a float32 encoder: in bfloat16 they are not the published ones."""
    lines = evaluation.program.as_text().splitlines()
    convolutions = [line for line in lines if 'custom_call_target="__cudnn$conv' in line]
    assert convolutions and not any("bf16[" in line for line in convolutions), "tokens in bfloat16"


def check_remat(topology: str, config: ConfigDict, mesh: Mesh) -> None:
    """Compile a step that keeps nothing: only there does cuDNN's forward kernel run twice."""
    config = config.copy_and_resolve_references()
    config.next_scale.transformer.remat = "full"
    programs, state, frozen = training_programs(make_task(config, mesh), mesh, from_tokens=True)
    function, inputs = programs["step"]
    result = compiled(function, *inputs, resident=(state, frozen))
    report(topology, "next_scale, remat full: step", result)
    assert count(FORWARD, result) == 2 and count(BACKWARD, result) == 1, "remat full"


def check_attention(topology: str, mesh: Mesh) -> None:
    """Compile every implementation that a GPU can run, forward and backward, at the published lengths."""
    mask = Scales(SCALES_256).mask
    shape = (2 * mesh.size, len(mask), 4, 64)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        spec = activation_spec(shape, tensor=2) or jax.sharding.PartitionSpec()
    qkv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)),) * 3
    for name in IMPLEMENTATIONS:
        if name in NOT_FOR_GPUS:
            continue
        choose_attention(name, mesh.devices.flat[0].platform, jnp.bfloat16, shape[-1], (mask,))
        attention = partial(attend, scale=0.1, mask=mask, name=name)
        result = compiled(jax.jit(jax.grad(on_mesh(_total(attention), mesh), argnums=(0, 1, 2))), *qkv)
        report(topology, f"attention {name}", result)
        kernels = len(groups(mask.sum(1))) - 1 if name == "cudnn" else 0  # the first needs a mask
        for pattern in (FORWARD, BACKWARD):
            assert count(pattern, result) == kernels, f"attention {name}: {count(pattern, result)} {pattern}"


def _total(attention: Callable) -> Callable:
    return lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()


def check(stage: str, topology: str) -> None:
    """Compile everything that a stage runs on one topology.

    Each in a process of its own: the compiler keeps one core busy.
    """
    logging.set_verbosity(logging.ERROR)
    mesh, config = make_mesh(devices=topology_devices(topology)), small_config()
    is_alone = mesh.size == 1  # kernels and losses are the same on many GPUs
    if stage == "tokenizer":
        own = with_all_losses(config.tokenizer) if is_alone else config.tokenizer
        check_task(topology, f"tokenizer{', all losses' * is_alone}", make_tokenizer_task(own), mesh)
        return
    if is_alone:
        check_attention(topology, mesh)
        check_remat(topology, config, mesh)
    check_transformer(topology, config, mesh)


def main(_):
    start = time.perf_counter()
    parts = zip(*itertools.product(("tokenizer", "next_scale"), TOPOLOGY.value), strict=True)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), SPAWN) as pool:
        list(pool.map(check, *parts))  # raises what a part has raised
    print(f"check_gpu: all compiled in {time.perf_counter() - start:.0f} s (jax {jax.__version__})")


if __name__ == "__main__":
    cli.run(main)
