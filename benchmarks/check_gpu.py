"""Compile the GPU programs of training, evaluation, previews and sampling ahead of time, without a GPU.

    python -m benchmarks.check_gpu --topology=h100:1x1,h100:1x8

Compiles small networks in bfloat16: the transformer for one GPU and for the eight of a node, the tokenizer
with all losses for the last topology.  Needs the CUDA
plugin and cuDNN of the extra `plan-gpu`, but neither a driver nor a GPU.  Nothing runs, so it shows neither
speed, nor whether cuDNN supports a shape on the card, nor what autotuning chooses (docs/scaling.md).

Prints a line per program; exits with code 1 and a traceback if one does not compile.
"""

import concurrent.futures
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

from benchmarks.compile_ahead import CompiledProgram, compile_program, topology_devices
from benchmarks.programs import sampling_program, training_programs
from benchmarks.workload import make_task, make_tokenizer_task
from configs import digits
from var_jax import cli
from var_jax.scales import SCALES_256, Scales
from var_jax.sharding import activation_spec, make_mesh, on_mesh
from var_jax.training.task import Task
from var_jax.transformer.attention import IMPLEMENTATIONS, attend, choose_attention, groups

TOPOLOGY = flags.DEFINE_list(
    "topology", ["h100:1x1", "h100:1x8"], "GPUs as HOSTSxGPUS, e.g. h100:1x8; see benchmarks.plan"
)
NOT_FOR_GPUS = ("splash",)
QUICK = "--xla_gpu_autotune_level=0"  # compiles no candidates of kernels, which only a GPU can compare
PALLAS = r"__gpu\$xla\.gpu\.triton"
PALLAS_CALLS = 3  # of attention=triton: forward, gradients of the queries, gradients of keys and values
SPAWN = multiprocessing.get_context("spawn")
FORWARD, BACKWARD = r"__cudnn\$fmha(?:ScaleBias)?Softmax\b", r"__cudnn\$fmha(?:ScaleBias)?SoftmaxBackward\b"


def small_config() -> ConfigDict:
    """Return a config of both stages with the smallest networks that use every published kernel and loss."""
    config = digits.get_config()
    for stage in (config.tokenizer, config.next_scale):
        stage.train.update(dict(batch=16, dtype="bfloat16", ema_decay=0.99))
    # 64 positions are the fewest that cuDNN's attention accepts; 16 pixels are the fewest that VGG accepts.
    config.tokenizer.model.update(dict(scales=(1, 8), num_codes=64, ch=32, ch_mult=(1, 1)))
    config.tokenizer.codebook.update(dict(kmeans_steps=1, ema_decay=0.99))
    config.next_scale.model.update(dict(depth=2, width=128, num_heads=2, drop_path=0.1))
    config.next_scale.sampling.update(dict(guidance=1.5, top_k=20, top_p=0.96))
    return config


def with_all_losses(stage: ConfigDict) -> ConfigDict:
    """Copy a tokenizer stage, with the perceptual loss and discriminator of the published recipe."""
    stage = stage.copy_and_resolve_references()
    stage.loss.perceptual = 1.0
    stage.adversarial.update(dict(weight=0.4, start_fraction=0.2, layers=1, channels=16))
    return stage


def count_custom_calls(pattern: str, result: CompiledProgram) -> int:
    """Count the custom calls of a compiled program whose target matches a regular expression."""
    return len(re.findall(rf'custom_call_target="{pattern}"', result.program.as_text()))


def print_program(topology: str, name: str, result: CompiledProgram) -> None:
    """Print a program's memory and compile time on one line."""
    print(f"{topology:10} {name:32} {result.gib:7.3f} GiB  compiled in {result.compile_s:.1f} s", flush=True)


def check_task(topology: str, label: str, task: Task, mesh: Mesh) -> dict[str, CompiledProgram]:
    """Count a task's FLOPs as `train.py` does before its first step, then compile all of its programs."""
    with jax.set_mesh(mesh):  # lowers programs without shardings of their own for the GPU
        flops = task.flops_per_image()
    assert flops > 0, f"{label}: {flops} FLOPs an image"
    programs, state, frozen = training_programs(task, mesh, from_tokens=False)
    results = {}
    for name, (function, inputs) in programs.items():
        results[name] = compile_program(function, *inputs, resident=(state, frozen))
        print_program(topology, f"{label}: {name}", results[name])
    return results


def check_next_scale(topology: str, config: ConfigDict, mesh: Mesh) -> None:
    """Compile the next_scale stage and its sampling, and check that the programs call attention kernels."""
    task = make_task(config, mesh)
    assert task.model.attention == "triton", f"auto is {task.model.attention} on {topology}"
    results = check_task(topology, "next_scale", task, mesh)
    check_tokens(results["evaluation"])
    # `fsdp` gathers parameters and scatters gradients; one device has nothing to exchange.
    is_sharded = mesh.size > 1
    text = results["step"].program.as_text()
    assert ("all-gather" in text) == ("reduce-scatter" in text or "all-reduce" in text) == is_sharded
    assert not task.model.scan_layers, f"auto scans the layers on {topology}"
    depth = task.config.depth
    count = count_custom_calls(PALLAS, results["step"])
    assert count == PALLAS_CALLS * depth, f"{count} calls of Pallas kernels in {depth} layers"
    if not is_sharded:  # with gathered parameters, XLA leaves GELU out of these small products
        count = text.count("BIAS_GELU_AUX")
        assert count == depth, f"cuBLAS applies GELU in {count} of {depth} layers"
    per_scale = task.options.per_scale(task.config.schedule, task.config.num_codes)
    for name, (function, inputs) in sampling_program(task, mesh, 2 * mesh.size, per_scale).items():
        result = compile_program(function, *inputs)
        print_program(topology, name, result)
        count = count_custom_calls(FORWARD, result)  # for the second of two maps
        assert count == depth, f"{count} calls of cuDNN's attention in {depth} layers"
        thresholds = count_custom_calls(PALLAS, result)
        assert thresholds == len(task.config.steps), f"{thresholds} kernels find thresholds of the logits"
        moved = moved_weights(task.config.width, result)
        assert not moved, f"a step of generation does not read weights in place, but from {moved}"


def moved_weights(width: int, result: CompiledProgram) -> list[str]:
    """List the results of copies, slices and transposes that have the shape of a layer's weight."""
    kernels = {(width, n * width) for n in (1, 3, 4)} | {(4 * width, width)}
    results = re.findall(
        r"= (\w+\[([\d,]+)\])\S* (?:copy|dynamic-slice|slice|transpose)\(", result.program.as_text()
    )
    shape = lambda sizes: tuple(int(n) for n in sizes.split(",") if n != "1")
    return [array for array, sizes in results if shape(sizes) in kernels | {k[::-1] for k in kernels}]


def check_tokens(evaluation: CompiledProgram) -> None:
    """Check that the encoder's convolutions are float32: a bfloat16 encoder gives other tokens."""
    lines = evaluation.program.as_text().splitlines()
    convolutions = [line for line in lines if 'custom_call_target="__cudnn$conv' in line]
    assert convolutions and not any("bf16[" in line for line in convolutions), "tokens in bfloat16"


def check_full_remat(topology: str, config: ConfigDict, mesh: Mesh) -> None:
    """Compile a step with remat "full", the only policy under which attention's forward kernel runs twice."""
    config = config.copy_and_resolve_references()
    config.next_scale.transformer.remat = "full"
    programs, state, frozen = training_programs(make_task(config, mesh), mesh, from_tokens=True)
    function, inputs = programs["step"]
    result = compile_program(function, *inputs, resident=(state, frozen))
    print_program(topology, "next_scale, remat full: step", result)
    depth = config.next_scale.model.depth
    count = count_custom_calls(PALLAS, result)
    assert count == (PALLAS_CALLS + 1) * depth, f"remat full: {count} kernels in {depth} layers"


def check_attention_kernels(topology: str, mesh: Mesh) -> None:
    """Compile every attention that a GPU can run, forward and backward, at the published length."""
    mask = Scales(SCALES_256).mask
    shape = (2 * mesh.size, len(mask), 4, 64)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        spec = activation_spec(shape, tensor_axis=2) or jax.sharding.PartitionSpec()
    qkv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)),) * 3
    for name in IMPLEMENTATIONS:
        if name in NOT_FOR_GPUS:
            continue
        choose_attention(name, mesh.devices.flat[0].platform, jnp.bfloat16, shape[-1], (mask,))
        attention = partial(attend, scale=0.1, mask=mask, name=name)
        gradients = jax.jit(jax.grad(on_mesh(_sum_of_outputs(attention), mesh), argnums=(0, 1, 2)))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it for the kind of GPU
            result = compile_program(gradients, *qkv)
        print_program(topology, f"attention {name}", result)
        cudnn = len(groups(mask.sum(1))) if name == "cudnn" else 0
        expected = {FORWARD: cudnn, BACKWARD: cudnn, PALLAS: PALLAS_CALLS if name == "triton" else 0}
        counts = {pattern: count_custom_calls(pattern, result) for pattern in expected}
        assert counts == expected, f"attention {name}: {counts}"


def _sum_of_outputs(attention: Callable) -> Callable:
    return lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()


def check_stage(stage: str, topology: str) -> None:
    """Compile everything that a stage runs on one topology; called in a process of its own."""
    logging.set_verbosity(logging.ERROR)
    mesh, config = make_mesh(devices=topology_devices(topology)), small_config()
    if stage == "tokenizer":
        check_task(topology, stage, make_tokenizer_task(with_all_losses(config.tokenizer)), mesh)
        return
    if mesh.size == 1:  # kernels are the same on many GPUs
        check_attention_kernels(topology, mesh)
        check_full_remat(topology, config, mesh)
    check_next_scale(topology, config, mesh)


def main(_):
    if QUICK.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    start = time.perf_counter()
    topologies = TOPOLOGY.value
    stages = ["tokenizer"] + ["next_scale"] * len(topologies)
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), SPAWN) as pool:
        list(pool.map(check_stage, stages, [topologies[-1], *topologies]))  # re-raises the error of a process
    print(f"check_gpu: all compiled in {time.perf_counter() - start:.0f} s (jax {jax.__version__})")


if __name__ == "__main__":
    cli.run(main, caches_programs=False)
