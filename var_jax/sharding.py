"""Device mesh, and sharding of parameters and activations: one table of axis names, FSDP by default."""

from collections.abc import Callable
from functools import wraps

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from var_jax.errors import ConfigError

TENSOR = "tensor"  # mesh axis over which heads, hidden channels of the MLP, and codes are sharded


def activation_spec(shape: tuple[int, ...], tensor_axis: int | None = None) -> P | None:
    """Return the PartitionSpec of an activation on the current mesh; None without a mesh.

    The leading axis is sharded over all mesh axes but TENSOR.  An axis whose size is not divisible by that of
    its mesh axes is replicated.

    Args:
      shape: of the activation.
      tensor_axis: axis to shard over TENSOR; None for none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    spec = [None] * len(shape)
    if shape[0] % (mesh.size // mesh.shape.get(TENSOR, 1)) == 0:
        spec[0] = tuple(name for name in mesh.axis_names if name != TENSOR)
    if tensor_axis is not None and TENSOR in mesh.axis_names and shape[tensor_axis] % mesh.shape[TENSOR] == 0:
        spec[tensor_axis] = TENSOR
    return P(*spec)


def constrain(x: jax.Array, tensor_axis: int | None = None) -> jax.Array:
    """Constrain an activation to the sharding of `activation_spec`; return it unchanged without a mesh."""
    spec = activation_spec(x.shape, tensor_axis)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def replicate(table: jax.Array) -> jax.Array:
    """Replicate a small parameter, so that looking up its rows moves no activation."""
    mesh = jax.sharding.get_abstract_mesh()
    return table if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(table, P())


def tensor_shards() -> int:
    """Return the size of the axis TENSOR of the current mesh; 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(TENSOR, 1)


def shard_map_batch(kernel: Callable, *arrays: jax.Array, tensor_axis: int | None = None) -> jax.Array:
    """Run a kernel that XLA cannot partition on each device's shard of arrays sharded as by `constrain`."""
    spec = activation_spec(arrays[0].shape, tensor_axis)
    if spec is None:
        return kernel(*arrays)
    return jax.shard_map(kernel, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)


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
    """Create a mesh of all devices; one of the sizes may be -1, for all remaining devices.

    Raises:
      ConfigError: if the product of the sizes is not the number of devices, or the torus of a TPU slice
        cannot be split into these sizes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and known > 0:
        sizes[sizes.index(-1)] = len(devices) // known
    requested = dict(zip(MESH_AXES, (data, fsdp, tensor), strict=True))
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh {requested} does not fit {len(devices)} devices: the product must be {len(devices)}, "
            "and at most one size may be -1"
        )
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:
        raise ConfigError(
            f"mesh {requested} does not fit the slice: a size must be a product of sides of its torus "
            f"({error})"
        ) from error


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raise ConfigError unless each microbatch can be split evenly over the devices."""
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if accumulate < 1 or batch % (shards * accumulate):
        raise ConfigError(
            f"train.batch={batch} must be a multiple of {shards * accumulate}: {shards} devices share a "
            f"batch (mesh axes {' and '.join(BATCH_AXES)}) and train.grad_accum_steps={accumulate} splits it"
        )


def partition_spec(names: tuple, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the PartitionSpec of an array with these logical axis names.

    An axis is replicated if the size of its mesh axis does not divide its own, or if an earlier axis uses
    that mesh axis.

    Raises:
      KeyError: on a name that is not in RULES.
    """
    used, spec = set(), []
    for name, size in zip(names, shape, strict=True):
        axis = None if name is None else RULES[name]
        if axis in used or (axis is not None and size % mesh.shape[axis]):
            axis = None
        used.add(axis)
        used.discard(None)
        spec.append(axis)
    return P(*spec)


def tree_shardings(boxed, mesh: Mesh):
    """Return the shardings of an abstract tree; leaves without logical axis names are replicated."""

    def sharding(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, P())

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def replicated_fraction(params) -> float:
    """Compute the fraction of the parameters (abstract, with shardings) that is replicated on all devices."""
    leaves = jax.tree.leaves(params)
    sizes = [leaf.size for leaf in leaves if leaf.sharding.shard_shape(leaf.shape) == leaf.shape]
    return sum(sizes) / sum(leaf.size for leaf in leaves)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over the mesh axes BATCH_AXES."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, P())


def global_batch(batch: dict, mesh: Mesh) -> dict:
    """Create global arrays on the devices from this process's part of a batch (numpy)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Wrap a function for `jit`, so that its activations are sharded over a mesh (see `constrain`)."""

    @wraps(function)
    def with_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return with_mesh
