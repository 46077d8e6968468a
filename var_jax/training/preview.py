"""Previews: jitted programs that shard images over the mesh in chunks, and writing of the pictures."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from var_jax.data.sources import Source
from var_jax.data.transforms import ToPixels
from var_jax.images import denormalize_to_uint8, save_png
from var_jax.paths import storage_errors
from var_jax.sampling.sampler import device_put_global
from var_jax.sharding import BATCH_AXES, batch_sharding, constrain, on_mesh, replicated
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.training.hosts import succeeded_everywhere
from var_jax.training.metrics import plot_curves


def preview_program(function: Callable, mesh: Mesh) -> Callable:
    """Jit a function of (parameters, frozen, *rows) on a mesh, with replicated results."""
    return jax.jit(on_mesh(function, mesh), out_shardings=replicated(mesh))


def chunk_size(num_rows: int, max_each: int, mesh: Mesh) -> int:
    """Return the number of rows to compute at once, at most `max_each` per device that shares a batch."""
    devices = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    return min(max_each, -(-num_rows // devices)) * devices


def row_shapes(rows: int, shape: tuple[int, ...], dtype, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape and sharding of a batch of rows, an argument of a preview program."""
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))


def run_in_chunks(
    program: tuple[Callable, tuple], params: dict, frozen: dict, *rows: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Run a preview program on any number of rows.

    The last chunk is padded with copies of the last row, so that every call has the shapes of the program.

    Args:
      program: entry of `Task.preview_programs`, the function compiled or not.
      params, frozen: arrays on the mesh.
      *rows: host arrays [N, ...], equal on all processes.

    Returns:
      The leaves of the results, host arrays [N, ...].
    """
    function, (_, _, *shapes) = program
    count, size = len(rows[0]), shapes[0].shape[0]
    chunks = []
    for start in range(0, count, size):
        indices = np.minimum(np.arange(start, start + size), count - 1)
        batch = (device_put_global(x[indices], shape.sharding) for x, shape in zip(rows, shapes, strict=True))
        results = jax.tree.leaves(function(params, frozen, *batch))
        chunks.append([np.asarray(leaf)[: count - start] for leaf in results])
    return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))


def decode_step_by_step(tokenizer: Tokenizer, params: dict, tokens: jax.Array) -> jax.Array:
    """Decode the sum of the first 1, 2, ..., n maps, one sum at a time to save memory.

    Args:
      tokenizer: tokenizer network.
      params: its parameters.
      tokens: tokens of n maps, int32 [B, L].

    Returns:
      uint8 [B, n, H, W, 3].
    """

    def decode(f_hat):
        images = tokenizer.apply({"params": params}, constrain(f_hat), method="decode_features")
        return denormalize_to_uint8(images)

    sums = jnp.stack(Quantizer.create(params["quantizer"], tokenizer.config).partial_sums(tokens))
    return jnp.moveaxis(jax.lax.map(decode, sums), 0, 1)


def run_or_warn(work: Callable[[], dict], warning: str) -> dict:
    """Do work that training can go on without; if memory runs out on any process, warn and return {} on all.

    Args:
      work: returns pictures or numbers by name.
      warning: what is missing then, and of which step.
    """
    result, failure = {}, None
    try:
        result = work()
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failure = str(error) or "MemoryError"
    if not succeeded_everywhere(failure is None):
        reason = failure or "another host ran out of memory"
        logging.warning("%s; training goes on. %s", warning, reason)
        return {}
    return result


def save_previews(pictures: dict, workdir: epath.Path, directory: epath.Path, name: str, step: int) -> None:
    """Write pictures and metric curves; on a storage error, warn.

    Args:
      pictures: PIL images by name.
      workdir: directory of the run, for the latest pictures and curves.
      directory: directory of the stage, for the pictures of every step.
      name: name of the stage.
      step: step of the preview.
    """
    try:
        for title, picture in pictures.items():
            save_png(picture, directory / "previews" / f"{title}_{step:07d}.png")
            save_png(picture, workdir / f"{title}.png")
        plot_curves(directory, workdir / f"curves_{name}.png", name)
    except storage_errors() as error:
        logging.warning(
            "%s: the pictures of step %d could not be written; training goes on. %s", name, step, error
        )


def example_images(source: Source, transform: ToPixels | None, count: int = 32) -> np.ndarray | None:
    """Load the first images of a source, uint8 [count, H, W, 3]; None without a transform, on tokens."""
    if transform is None:
        return None
    return np.stack([transform(source[i])["image"] for i in range(min(count, source.num_records))])


def example_conditions(source: Source, count: int = 10, among: int = 1000) -> np.ndarray | None:
    """Return the first distinct captions or embeddings of a source, a row each; None with labels.

    Args:
      source: training data.
      count: maximum number of rows.
      among: maximum number of images to look at.
    """
    if not source.condition_shape:
        return None
    distinct: dict[bytes, np.ndarray] = {}
    for i in range(min(among, source.num_records)):
        condition = source[i]["condition"]
        if condition.any():
            distinct.setdefault(condition.tobytes(), condition)
        if len(distinct) == count:
            break
    return np.stack(list(distinct.values())) if distinct else None
