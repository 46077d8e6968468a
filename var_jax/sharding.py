"""The mesh, and where parameters and activations live on it: one table of axis names, FSDP by default."""

from collections.abc import Callable
from functools import wraps

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from var_jax.errors import ConfigError

TENSOR = "tensor"  # mesh axis that heads, channels inside the MLP, and codes are split over


def activation_spec(shape: tuple[int, ...], tensor: int | None = None) -> P | None:
    """Leading axis over the images' mesh axes, axis number `tensor` over TENSOR; None without a mesh.

    An axis that its mesh axes do not divide is kept whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    spec = [None] * len(shape)
    images = tuple(name for name in mesh.axis_names if name != TENSOR)
    if shape[0] % (mesh.size // mesh.shape.get(TENSOR, 1)) == 0:
        spec[0] = images
    if tensor is not None and TENSOR in mesh.axis_names and shape[tensor] % mesh.shape[TENSOR] == 0:
        spec[tensor] = TENSOR
    return P(*spec)


def constrain(x: jax.Array, tensor: int | None = None) -> jax.Array:
    """Keeps an activation split so (see `activation_spec`); as it is without a mesh."""
    spec = activation_spec(x.shape, tensor)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def replicate(table: jax.Array) -> jax.Array:
    """A small parameter, whole on every device, to look rows up in without moving what asks for them."""
    mesh = jax.sharding.get_abstract_mesh()
    return table if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(table, P())


def tensor_shards() -> int:
    """Size of the mesh axis TENSOR of the mesh that is set; 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(TENSOR, 1)


def shard_map_batch(kernel: Callable, *arrays: jax.Array, tensor: int) -> jax.Array:
    """A kernel, which XLA cannot partition, of arrays split as `split` does, every device on its own part."""
    spec = activation_spec(arrays[0].shape, tensor)
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
            f"batch (mesh axes {' and '.join(BATCH_AXES)}) and train.grad_accum_steps={accumulate} splits it"
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


def replicated_fraction(params) -> float:
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
    """A function for `jit` whose activations are split over a mesh (see `var_jax/sharding.py`)."""

    @wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
