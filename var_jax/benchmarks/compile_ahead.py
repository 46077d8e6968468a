"""Compiling for TPU slices with no TPU at hand, by the compiler in libtpu (`pip install -e '.[plan]'`).

Import it before anything else starts JAX.
"""

import os

# Before JAX is there: libtpu must look for no TPU, and JAX must not start one.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_MIN_LOG_LEVEL="3",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import math
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from var_jax.benchmarks.subject import tokenizer_shapes
from var_jax.training.sharding import batch_sharding, replicated
from var_jax.training.state import create_state
from var_jax.training.transformer_task import NextScaleTask

# What the compiler says of a program that does not fit, in its two ways.
OVER = (re.compile(r"Used ([\d.]+)G of [\d.]+G hbm"), re.compile(r"temporaries \(([\d.]+)G\) exceeds"))


@dataclasses.dataclass
class Compiled:
    """What came of compiling: seconds, whether it fits, GiB a chip in all and by kind, the program."""

    compile_s: float
    fits: bool
    gib: float
    parts: dict[str, float]
    program: jax.stages.Compiled | None = None


def slice_of(name: str) -> list[jax.Device]:
    """The chips of a slice such as v5e:4x4.

    Raises:
      ValueError: where there is no such slice, or no compiler for it.
    """
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # of whatever kind libtpu, or its absence, makes it
        raise ValueError(
            f"--topology={name}: cannot be compiled for ({str(error).splitlines()[0]}). "
            "Slices are named like v5e:4x4, v5p:4x4x4, v6e:8x8; the compiler comes with "
            "pip install -e '.[plan]'"
        ) from error


def gib(tree) -> float:
    """Of an abstract tree on one device."""
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)]
    return sum(n * leaf.dtype.itemsize for n, leaf in zip(sizes, jax.tree.leaves(tree), strict=True)) / 2**30


def whole(tree, mesh: Mesh):
    """The shapes of a tree, on every device."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), tree
    )


def compiled(program, *inputs, **static) -> Compiled:
    """Compiles; a program that does not fit the chip's memory is told apart from one that is wrong."""
    lowered, start = program.lower(*inputs, **static), time.perf_counter()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = [float(found[1]) for pattern in OVER if (found := pattern.search(str(error)))]
        if not used:
            raise
        return Compiled(time.perf_counter() - start, False, used[0], {})
    memory, seconds = done.memory_analysis(), time.perf_counter() - start
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    parts = {name: size / 2**30 for name, size in parts.items()}
    # Inputs that this program does not look at lie there all the same, as the decoder does in training.
    parts["unread"] = max(gib(inputs) - parts["arguments"], 0.0)
    return Compiled(seconds, True, sum(parts.values()), parts, done)


def train_inputs(task: NextScaleTask, mesh: Mesh, from_tokens: bool) -> tuple:
    """State, frozen, batch and key of a training step, as shapes with shardings."""
    cfg, side = task.stage.train, task.image_size
    _, state = create_state(task.init, task.optimizer, cfg.ema > 0, jax.random.key(0), mesh)
    row = ((task.config.schedule.length,), jnp.int32) if from_tokens else ((side, side, 3), jnp.uint8)
    put = lambda shape, dtype: jax.ShapeDtypeStruct((cfg.batch, *shape), dtype, sharding=batch_sharding(mesh))  # noqa: E731
    batch = {"tokens" if from_tokens else "image": put(*row), "label": put((), jnp.int32)}
    frozen = {"tokenizer": nn.meta.unbox(tokenizer_shapes(task.tokenizer))}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return state, whole(frozen, mesh), batch, whole(key, mesh)
