"""Compilation for TPU slices and GPUs that are not there.

The TPU's compiler is in libtpu (`pip install -e '.[tpu]'`), the GPU's in JAX's CUDA plugin
(`pip install -e '.[plan-gpu]'`).  Import this module before anything else starts JAX.
"""

import os

# Before JAX starts: libtpu must look for no TPU.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_MIN_LOG_LEVEL="3",
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the CUDA plugin warns that there is no driver

import dataclasses
import math
import re
import time
from collections.abc import Callable

import jax
from jax.experimental import topologies

from benchmarks.gpus import GPUS

if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")  # no TPU is started, and no driver of a GPU is asked for

# What the TPU's compiler says of a program that does not fit, in its two ways.
OVER = (re.compile(r"Used ([\d.]+)G of [\d.]+G hbm"), re.compile(r"temporaries \(([\d.]+)G\) exceeds"))
# Triton's products are tuned on the card; cuBLAS's take as much memory, and compile in a third of the time.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
GPU_TOPOLOGY = re.compile(rf"({'|'.join(GPUS)}):([1-9]\d*)x([1-9]\d*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A program compiled for a chip.

    Attributes:
      compile_s: seconds.
      gib: GiB on a device in all, what lies there unread included; the total that the compiler names where
        it refuses the program.
      parts: GiB by kind; none where it refuses the program.
      program: None where it refuses the program.
    """

    compile_s: float
    gib: float
    parts: dict[str, float]
    program: jax.stages.Compiled | None = None


def topology_devices(name: str) -> list[jax.Device]:
    """Devices of a TPU slice such as v5e:4x4, or of GPU nodes such as h100:1x8 (hosts x GPUs).

    Raises:
      ValueError: where there is no such topology, or no compiler for it.
    """
    gpus = GPU_TOPOLOGY.fullmatch(name)
    try:
        if gpus:
            config = GPUS[gpus[1]].target_config
            shape = f"1x{gpus[2]}x{gpus[3]}"  # slices x hosts x GPUs
            desc = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=config)
        else:
            desc = topologies.get_topology_desc(name, platform="tpu")
    except (
        RuntimeError
    ) as error:  # of JAX where a compiler is missing, of the compiler where the name is wrong
        raise ValueError(
            f"--topology={name}: cannot be compiled for ({str(error).splitlines()[0]}). "
            "Slices are named like v5e:4x4, v5p:4x4x4, v6e:8x8, and need pip install -e '.[tpu]'; GPUs, as "
            f"hosts x GPUs, {', '.join(f'{gpu}:1x8' for gpu in GPUS)}, and need pip install -e '.[plan-gpu]'"
        ) from error
    return list(desc.devices)


def gib(tree) -> float:
    """Of an abstract tree on one device."""
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)]
    return sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, jax.tree.leaves(tree), strict=True)) / 2**30


def compiled(function: Callable, *inputs, resident=()) -> Compiled:
    """Compile a jitted function of abstract arrays with shardings.

    Args:
      function: jitted.
      inputs: its arguments.
      resident: what lies on the devices besides while it runs; leaves that are inputs too count once.

    Raises:
      jax.errors.JaxRuntimeError: where the program is wrong, other than too large for the chip.
    """
    distinct = {id(leaf): leaf for leaf in jax.tree.leaves((inputs, resident))}.values()
    on_device = gib(list(distinct))
    platform = next(iter(distinct)).sharding.mesh.devices.flat[0].platform
    lowered, start = function.lower(*inputs), time.perf_counter()
    try:
        program = lowered.compile(compiler_options=GPU_OPTIONS if platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        used = [float(match[1]) for pattern in OVER if (match := pattern.search(str(error)))]
        if not used:
            raise
        return Compiled(compile_s=time.perf_counter() - start, gib=used[0], parts={})
    memory, seconds = program.memory_analysis(), time.perf_counter() - start
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    parts = {name: size / 2**30 for name, size in parts.items()}
    # What this program does not look at lies there all the same, as the decoder does in training.
    parts["unread"] = max(on_device - parts["arguments"], 0.0)
    return Compiled(compile_s=seconds, gib=sum(parts.values()), parts=parts, program=program)
