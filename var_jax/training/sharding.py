"""Where arrays live: one mesh, one table from logical axis names to mesh axes.

Mesh axes: `data` (replicas), `fsdp` (parameters split, gathered for use), `tensor` (matrix products
split).  Batches are split over `data` and `fsdp`.
"""

from collections.abc import Callable
from functools import wraps

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from var_jax.errors import ConfigError
from var_jax.partition import TENSOR

BATCH_AXES = ("data", "fsdp")
MESH_AXES = (*BATCH_AXES, TENSOR)

RULES = {
    "layers": None,
    "embed": "fsdp",
    "heads": TENSOR,
    "mlp": TENSOR,
    "codes": TENSOR,
    "code_dim": None,
    "conv_height": None,
    "conv_width": None,
    "conv_in": None,
    "conv_out": "fsdp",
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of all devices; one of the sizes may be -1: what is left.

    Raises:
      ConfigError: where the sizes do not multiply to the number of devices, or the torus of a TPU slice does
        not have them.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = len(devices) // known
    asked = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {asked} does not fit {len(devices)} devices: the product must be {len(devices)}, "
            "and at most one size may be -1"
        )
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:
        raise ConfigError(
            f"mesh {asked} does not fit the slice: a size must be a product of sides of its torus ({error})"
        ) from error


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ConfigError unless every device gets equally many images of every microbatch."""
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if accumulate < 1 or batch % (shards * accumulate):
        raise ConfigError(
            f"train.batch={batch} must be a multiple of {shards * accumulate}: {shards} devices share a "
            f"batch (mesh axes {' and '.join(BATCH_AXES)}) and train.accumulate={accumulate} splits it"
        )


def partition_spec(names: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Logical axis names of an array -> its PartitionSpec.

    An axis that the mesh axis does not divide, or whose mesh axis an earlier axis has taken, is kept
    whole.

    Raises:
      KeyError: on a name that the table lacks.
    """
    taken, spec = set(), []
    for name, size in zip(names, shape, strict=True):
        axis = None if name is None else RULES[name]
        if axis in taken or (axis is not None and size % mesh.shape[axis]):
            axis = None
        taken.add(axis)
        taken.discard(None)
        spec.append(axis)
    return P(*spec)


def tree_shardings(boxed, mesh: Mesh):
    """Shardings of an abstract tree whose parameters carry logical names; the rest is replicated."""

    def sharding(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, P())

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def whole_share(params) -> float:
    """Share of the parameters (abstract, with shardings) that every device holds whole."""
    leaves = jax.tree.leaves(params)
    whole = [leaf.size for leaf in leaves if leaf.sharding.shard_shape(leaf.shape) == leaf.shape]
    return sum(whole) / sum(leaf.size for leaf in leaves)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over all devices that share a batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def global_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's part of a batch (numpy) -> global arrays on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """A function for `jit` whose activations are split over a mesh (see `var_jax/partition.py`)."""

    @wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
