"""Ahead-of-time compilation for TPU slices and GPUs on a machine without them.

The TPU compiler is in libtpu (`pip install -e '.[tpu]'`), the GPU compiler in JAX's CUDA plugin
(`pip install -e '.[plan-gpu]'`).  Import this module before anything initializes a JAX backend.
"""

import os

# Set before JAX is imported, so that libtpu does not look for a TPU.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_MIN_LOG_LEVEL="3",
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides the CUDA plugin's warning that there is no driver

import dataclasses
import math
import re
import time
from collections.abc import Callable

import jax
from jax.experimental import topologies

from benchmarks.gpus import GPUS
from var_jax.cli import TRITON_PRODUCTS

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")  # initialize neither a TPU nor a GPU

# The two errors with which the TPU compiler refuses a program that does not fit in memory.
OUT_OF_MEMORY_ERRORS = (
    re.compile(r"Used ([\d.]+)G of [\d.]+G hbm"),
    re.compile(r"temporaries \(([\d.]+)G\) exceeds"),
)
GPU_OPTIONS = {TRITON_PRODUCTS: False}  # as the commands run (`cli.prefer_cublas`)
GPU_TOPOLOGY = re.compile(rf"({'|'.join(GPUS)}):([1-9]\d*)x([1-9]\d*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A program compiled for a chip, or refused by the compiler because it does not fit.

    Attributes:
      compile_s: seconds of compilation.
      gib: GiB on a device in total, including resident arrays that the program does not read; for a refused
        program, the total that the compiler reports.
      parts: GiB by kind; empty for a refused program.
      program: the executable; None for a refused program.
    """

    compile_s: float
    gib: float
    parts: dict[str, float]
    program: jax.stages.Compiled | None = None


def topology_devices(name: str) -> list[jax.Device]:
    """Return the devices of a TPU slice such as v5e:4x4, or of GPU nodes such as h100:1x8 (hosts x GPUs).

    Raises:
      ValueError: if the topology does not exist, or its compiler is not installed.
    """
    gpus = GPU_TOPOLOGY.fullmatch(name)
    try:
        if gpus:
            config = GPUS[gpus[1]].target_config
            shape = f"1x{gpus[2]}x{gpus[3]}"  # slices x hosts x GPUs
            desc = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=config)
        else:
            desc = topologies.get_topology_desc(name, platform="tpu")
    except RuntimeError as error:  # JAX without a compiler, or the compiler given a wrong name
        raise ValueError(
            f"--topology={name}: cannot be compiled for ({str(error).splitlines()[0]}). "
            "Slices are named like v5e:4x4, v5p:4x4x4, v6e:8x8, and need pip install -e '.[tpu]'; GPUs, as "
            f"hosts x GPUs, {', '.join(f'{gpu}:1x8' for gpu in GPUS)}, and need pip install -e '.[plan-gpu]'"
        ) from error
    return list(desc.devices)


def gib_per_device(tree) -> float:
    """Compute the GiB that a tree of abstract arrays with shardings takes on one device."""
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)]
    return sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, jax.tree.leaves(tree), strict=True)) / 2**30


def compile_program(function: Callable, *inputs, resident=()) -> CompiledProgram:
    """Compile a jitted function of abstract arrays with shardings.

    Args:
      function: jitted.
      inputs: its arguments, trees of `jax.ShapeDtypeStruct` with shardings.
      resident: other arrays that stay on the devices while it runs; leaves that are also inputs count once.

    Raises:
      jax.errors.JaxRuntimeError: if compilation fails for any reason but lack of memory.
    """
    distinct = {id(leaf): leaf for leaf in jax.tree.leaves((inputs, resident))}.values()
    on_device = gib_per_device(list(distinct))
    platform = next(iter(distinct)).sharding.mesh.devices.flat[0].platform
    lowered, start = function.lower(*inputs), time.perf_counter()
    try:
        program = lowered.compile(compiler_options=GPU_OPTIONS if platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        used = [float(match[1]) for pattern in OUT_OF_MEMORY_ERRORS if (match := pattern.search(str(error)))]
        if not used:
            raise
        return CompiledProgram(compile_s=time.perf_counter() - start, gib=used[0], parts={})
    memory, seconds = program.memory_analysis(), time.perf_counter() - start
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    parts = {name: size / 2**30 for name, size in parts.items()}
    # Arrays that the program does not read still take memory, such as the decoder during training.
    parts["unread"] = max(on_device - parts["arguments"], 0.0)
    return CompiledProgram(compile_s=seconds, gib=sum(parts.values()), parts=parts, program=program)
