"""Least times of a training step on paper: products, memory and links at the rates of the data sheet.

A bound, not a forecast: nothing reaches all of it.  The same formulas choose a mesh.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.errors import ConfigError
from var_jax.sharding import TENSOR
from var_jax.training.hardware import Chip
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import matrix_parameters, training_flops
from var_jax.transformer.remat import saved_activation_bytes

# Share of the forward pass's products that a policy works out again; of the MLP's first layer, 8 of 24 D^2.
AGAIN = {"none": 0.0, "mlp": 0.0, "flat_qkv": 1 / 3, "full": 1.0}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on a mesh.

    Attributes:
      batch: images over all devices.
      accumulate: parts that they are worked through in.
      data, fsdp, tensor: sizes of the mesh axes.
      remat: policy.
      itemsize: bytes of a number in the products.
      ema: whether there is a moving average.
      other_flops: of an image beside the transformer's, e.g. to encode it.
    """

    batch: int
    accumulate: int
    data: int
    fsdp: int
    tensor: int
    remat: str
    itemsize: int
    ema: bool
    other_flops: float

    @classmethod
    def of(cls, train: ConfigDict, mesh: Mesh, remat: str, dtype, other_flops: float) -> "Step":
        """Of a config's `train` section."""
        sizes = {axis: mesh.shape[axis] for axis in ("data", "fsdp", TENSOR)}
        itemsize = jnp.dtype(dtype).itemsize
        return cls(
            train.batch,
            train.grad_accum_steps,
            **sizes,
            remat=remat,
            itemsize=itemsize,
            ema=train.ema_decay > 0,
            other_flops=other_flops,
        )

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


def link_bytes(cfg: NextScaleConfig, step: Step) -> float:
    """Bytes that a device receives from others in a step.

    In every part of the batch: over `fsdp`, parameters are gathered for the forward and for the backward
    pass, and gradients are scattered; over `data`, gradients are summed.  Over `tensor`, activations are
    summed twice in a block's forward pass, and twice in its backward pass.
    """
    parameters = step.itemsize * matrix_parameters(cfg) / step.tensor
    gathered = 3 * step.accumulate * parameters * (step.fsdp - 1) / step.fsdp
    summed = 2 * step.accumulate * parameters / step.fsdp * (step.data - 1) / step.data
    images = step.batch / (step.data * step.fsdp)
    activations = step.itemsize * images * cfg.schedule.length * cfg.width
    return gathered + summed + 8 * cfg.depth * activations * (step.tensor - 1) / step.tensor


def memory_bytes(cfg: NextScaleConfig, step: Step) -> float:
    """Bytes that a device's memory moves at least.

    Weights for the forward pass and twice for the backward pass, in every part of the batch; the optimiser's
    state read and written; what the blocks keep, written and read.
    """
    parameters = matrix_parameters(cfg) / step.tensor
    weights = 3 * step.accumulate * step.itemsize * parameters
    state = 4 * 2 * (3 + step.ema) * parameters / step.fsdp
    images = step.batch / step.devices
    return weights + state + 2 * images * saved_activation_bytes(cfg, step.remat, step.itemsize, scores=False)


def bound(cfg: NextScaleConfig, step: Step, chip: Chip) -> dict[str, float]:
    """Least seconds of each resource, of the step (the largest of them), and the rates that follow.

    Returns:
      compute_s, memory_s, link_s, step_s, images_per_s, mfu, link_gb (that a device receives), model_tflops.
    """
    model = training_flops(cfg)  # a third of it is the forward pass
    done = model * (1 + AGAIN[step.remat] / 3) + step.other_flops
    times = {
        "compute_s": step.batch * done / (step.devices * chip.flops),
        "memory_s": memory_bytes(cfg, step) / chip.bandwidth,
        "link_s": link_bytes(cfg, step) / chip.link,
    }
    step_s = max(times.values())
    return times | {
        "step_s": step_s,
        "images_per_s": step.batch / step_s,
        "mfu": step.batch * model / (step_s * step.devices * chip.flops),
        "link_gb": link_bytes(cfg, step) / 1e9,
        "model_tflops": step.batch * model / 1e12,
    }


def best_mesh(
    cfg: NextScaleConfig, step: Step, chip: Chip, state_room: float, remat_on: Callable[[dict], str]
) -> tuple[dict[str, int], str]:
    """The mesh with the least bound, and its policy; of several that with the fewest bytes between devices.

    Only sizes of `fsdp` that divide the width split all matrices.  Without `tensor`, which pays only where a
    batch has fewer images than there are devices.

    Args:
      cfg: the model.
      step: its batch; mesh and policy are not looked at.
      chip: the device.
      state_room: bytes that the state may take; where it takes more on every mesh, the largest `fsdp` counts.
      remat_on: sizes of a mesh -> policy there; ConfigError where the devices do not form such a mesh.
    """
    choices = []
    splits = [n for n in range(1, step.devices + 1) if step.devices % n == 0 and cfg.width % n == 0]
    possible = {}
    for fsdp in splits:
        sizes = {"data": step.devices // fsdp, "fsdp": fsdp, "tensor": 1}
        with contextlib.suppress(ConfigError):  # sizes that the torus of the slice does not have
            possible[fsdp] = sizes, remat_on(sizes)
    for fsdp, (sizes, remat) in possible.items():
        state = 4 * (4 + step.ema) * matrix_parameters(cfg) / fsdp
        if state <= state_room or fsdp == max(possible):
            result = bound(cfg, dataclasses.replace(step, **sizes, remat=remat), chip)
            choices.append((result["step_s"], result["link_gb"], fsdp, sizes, remat))
    return min(choices, key=lambda choice: choice[:3])[3:]
