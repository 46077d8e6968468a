"""Where activations live on the mesh that is set: images over every axis but `tensor`.

Parameters have names for their axes instead, and a table for these (`training/sharding.py`).
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

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


def split(x: jax.Array, tensor: int | None = None) -> jax.Array:
    """Keeps an activation split so (see `activation_spec`); as it is without a mesh."""
    spec = activation_spec(x.shape, tensor)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def gathered(table: jax.Array) -> jax.Array:
    """A small parameter, whole on every device, to look rows up in without moving what asks for them."""
    mesh = jax.sharding.get_abstract_mesh()
    return table if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(table, P())


def tensor_shards() -> int:
    """Size of the mesh axis TENSOR of the mesh that is set; 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(TENSOR, 1)


def on_each_device(kernel: Callable, *arrays: jax.Array, tensor: int) -> jax.Array:
    """A kernel, which XLA cannot partition, of arrays split as `split` does, every device on its own part."""
    spec = activation_spec(arrays[0].shape, tensor)
    if spec is None:
        return kernel(*arrays)
    return jax.shard_map(kernel, in_specs=(spec,) * len(arrays), out_specs=spec, check_vma=False)(*arrays)
