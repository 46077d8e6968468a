"""Roofline bounds of a training step: compute, memory and link time at the data sheet's rates.

These are lower bounds of the time, not forecasts.  The same formulas choose a mesh.
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

# Share of the forward pass's matrix products that a policy recomputes; `flat_qkv` recomputes the MLP's first
# layer, 8 of the 24 D^2 of a block.
RECOMPUTED_SHARE = {"none": 0.0, "mlp": 0.0, "flat_qkv": 1 / 3, "full": 1.0}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on a mesh.

    Attributes:
      batch: images over all devices.
      accumulate: number of gradient accumulation steps.
      data, fsdp, tensor: sizes of the mesh axes.
      remat: policy.
      itemsize: bytes of a number in the matrix products.
      ema: True if there is a moving average of the parameters.
      other_flops: FLOPs of an image outside the transformer, e.g. to encode it.
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
    def from_config(cls, train: ConfigDict, mesh: Mesh, remat: str, dtype, other_flops: float) -> "Step":
        """Create a step from a config's `train` section."""
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
    """Compute the bytes that a device receives from others in a step.

    In every accumulation step, `fsdp` gathers parameters for the forward and for the backward pass and
    scatters gradients, and `data` sums gradients.  `tensor` sums activations twice in a block's forward pass,
    and twice in its backward pass.
    """
    parameters = step.itemsize * matrix_parameters(cfg) / step.tensor
    gathered = 3 * step.accumulate * parameters * (step.fsdp - 1) / step.fsdp
    summed = 2 * step.accumulate * parameters / step.fsdp * (step.data - 1) / step.data
    images = step.batch / (step.data * step.fsdp)
    activations = step.itemsize * images * cfg.schedule.length * cfg.width
    return gathered + summed + 8 * cfg.depth * activations * (step.tensor - 1) / step.tensor


def memory_traffic_bytes(cfg: NextScaleConfig, step: Step) -> float:
    """Compute a lower bound of the bytes that a device's memory moves in a step.

    In every accumulation step, weights are read for the forward pass and twice for the backward pass.  The
    optimizer's state is read and written, and saved activations are written and read.
    """
    parameters = matrix_parameters(cfg) / step.tensor
    weights = 3 * step.accumulate * step.itemsize * parameters
    state = 4 * 2 * (3 + step.ema) * parameters / step.fsdp
    images = step.batch / step.devices
    return weights + state + 2 * images * saved_activation_bytes(cfg, step.remat, step.itemsize, scores=False)


def bound(cfg: NextScaleConfig, step: Step, chip: Chip) -> dict[str, float]:
    """Compute the minimum seconds of each resource, of the step (their maximum), and the resulting rates.

    Returns:
      compute_s, memory_s, link_s, step_s, images_per_s, mfu, link_gb (received by a device), model_tflops.
    """
    model = training_flops(cfg)  # a third of it is the forward pass
    performed = model * (1 + RECOMPUTED_SHARE[step.remat] / 3) + step.other_flops
    times = {
        "compute_s": step.batch * performed / (step.devices * chip.flops),
        "memory_s": memory_traffic_bytes(cfg, step) / chip.bandwidth,
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
    """Find the mesh with the lowest time bound, and its remat policy; ties go to the least link traffic.

    Only sizes of `fsdp` that divide the width are tried, since others do not shard all matrices.  `tensor` is
    1, since more helps only if a batch has fewer images than there are devices.

    Args:
      cfg: the model.
      step: the step; its mesh and policy are ignored.
      chip: the device.
      state_room: bytes available for the state; if it takes more on every mesh, the largest `fsdp` is chosen.
      remat_on: function from mesh sizes to the policy there; raises ConfigError if the devices cannot form
        such a mesh.
    """
    choices = []
    splits = [n for n in range(1, step.devices + 1) if step.devices % n == 0 and cfg.width % n == 0]
    possible = {}
    for fsdp in splits:
        sizes = {"data": step.devices // fsdp, "fsdp": fsdp, "tensor": 1}
        with contextlib.suppress(ConfigError):  # sizes that do not fit the slice's torus
            possible[fsdp] = sizes, remat_on(sizes)
    for fsdp, (sizes, remat) in possible.items():
        state = 4 * (4 + step.ema) * matrix_parameters(cfg) / fsdp
        if state <= state_room or fsdp == max(possible):
            result = bound(cfg, dataclasses.replace(step, **sizes, remat=remat), chip)
            choices.append((result["step_s"], result["link_gb"], fsdp, sizes, remat))
    return min(choices, key=lambda choice: choice[:3])[3:]
