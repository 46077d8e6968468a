"""What a training task gives to the loop."""

import abc
import dataclasses
import math
from collections.abc import Callable, Collection

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from var_jax.errors import ConfigError, config_errors
from var_jax.training.state import TrainState

UNKNOWN = ("while", "pallas_call")  # how often their body runs is not in the jaxpr


def count_flops(jaxpr: Jaxpr) -> float:
    """Count the FLOPs of all matrix products and convolutions (a multiplication and an addition are two).

    A scan counts as often as it runs, a `cond` as its most expensive branch.

    Raises:
      ValueError: on a while loop or a Pallas kernel, whose FLOPs are not known from the jaxpr.
    """
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: JaxprEqn) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _product_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [count_flops(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
    if name in UNKNOWN:
        raise ValueError(f"cannot count the FLOPs of {name}: how often its body runs is not in the jaxpr")
    if name == "cond":
        return max(inner)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _product_flops(equation: JaxprEqn) -> float:
    lhs, (contracting, _) = equation.invars[0].aval, equation.params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracting[0])


def _convolution_flops(equation: JaxprEqn) -> float:
    """Count only the taps that meet the image, as XLA does: those that meet padding are no work."""
    params, (lhs, rhs), out = equation.params, equation.invars, equation.outvars[0].aval
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]  # batch or output channels, channels, sides
    flops = 2 * out.shape[out_spec[0]] * out.shape[out_spec[1]] * rhs.aval.shape[rhs_spec[1]]
    for i, (padding, _) in enumerate(params["padding"]):
        side, taps, outputs = (
            aval.shape[spec[2 + i]]
            for aval, spec in ((lhs.aval, lhs_spec), (rhs.aval, rhs_spec), (out, out_spec))
        )
        stride, spread, dilation = (
            params[name][i] for name in ("window_strides", "lhs_dilation", "rhs_dilation")
        )
        places = (o * stride + t * dilation - padding for o in range(outputs) for t in range(taps))
        flops *= sum(0 <= place <= (side - 1) * spread and place % spread == 0 for place in places)
    return flops


def compute_dtype(name: str) -> jnp.dtype:
    """`auto` is bfloat16 on accelerators and float32 on CPU.

    Raises:
      ConfigError: on another name than auto, float32, bfloat16.
    """
    if name == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype or config.train.dtype must be auto, float32 or bfloat16, got {name!r}")
    return jnp.dtype(name)


def model_config(cls, fields: ConfigDict, **fixed):
    """A model's dataclass from the config's `model` section and what other parts of the run fix.

    Raises:
      ConfigError: on a field that the model does not have, naming those it has, or a value that makes none.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(
            f"config.model has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    with config_errors():
        return cls(**{**fields.to_dict(), **fixed})


def program_flops(function: Callable, *inputs) -> float:
    """Count the matrix FLOPs of a function of arrays or their shapes, without compiling it.

    Raises:
      ValueError: on a while loop or a Pallas kernel, see `count_flops`.
    """
    return count_flops(jax.make_jaxpr(function)(*inputs).jaxpr)


@flax.struct.dataclass
class StepOutput:
    """Result of one training step.

    Attributes:
      state: after the step.
      loss: scalar, watched for spikes.
      gradient_norm: scalar, of the gradient before clipping.
      metrics: further scalars to log.
      must_be_finite: names of metrics that must be finite, as loss and gradient norm must: a step where one
        is not changes nothing and counts as skipped.
    """

    state: TrainState
    loss: jax.Array
    gradient_norm: jax.Array
    metrics: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    must_be_finite: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def state_and_metrics(self) -> tuple[TrainState, dict[str, jax.Array]]:
        """Return the state, and all metrics, loss and gradient norm among them."""
        return self.state, {"loss": self.loss, **self.metrics, "gradient_norm": self.gradient_norm}


class Task(abc.ABC):
    """One thing to train: parameters, a step, an evaluation, pictures.

    All methods but `preview` and `summarize` are traced by `jit`.

    Attributes:
      name: also the folder of the run's stage.
      frozen: arrays that the steps read but do not change, e.g. the tokenizer under a transformer.
      image_size: side of the images in pixels.
      fingerprint: of what was trained before and is built on; "" where there is nothing.
      best_metric: evaluation metric whose least value marks the best checkpoint.
    """

    name: str
    frozen: dict
    image_size: int
    fingerprint: str = ""
    best_metric: str = "loss"

    @abc.abstractmethod
    def init(self, key: jax.Array, given: Collection[str] = ()) -> tuple[dict, dict]:
        """Parameters with logical axis names, and what else the task carries in the state.

        `given` are paths of parameters in whose place others will be put (see `fine_tune`).
        """

    @abc.abstractmethod
    def train_step(self, state: TrainState, frozen: dict, batch: dict, key: jax.Array) -> StepOutput:
        """Take one optimiser step on a global batch."""

    @abc.abstractmethod
    def eval_step(self, params: dict, frozen: dict, batch: dict) -> dict:
        """Sums over the images of a batch that are `valid`; the loop adds them up over batches."""

    @abc.abstractmethod
    def summarize(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Sums over the whole held-out set -> metrics, `best_metric` among them."""

    @abc.abstractmethod
    def preview_programs(self, mesh: Mesh, params: dict, frozen: dict) -> dict[str, tuple[Callable, tuple]]:
        """Return the programs that `preview` runs, so that they can be compiled ahead of it.

        Args:
          mesh: of the run.
          params: parameters to sample with, arrays or their shapes and shardings, as the state has them.
          frozen: likewise.

        Returns:
          Jitted functions by name, with their arguments: `params` and `frozen` as given, then the shapes and
          shardings of one batch of rows.
        """

    @abc.abstractmethod
    def preview(
        self,
        programs: dict[str, tuple[Callable, tuple]],
        params: dict,
        frozen: dict,
        images: np.ndarray | None,
    ) -> dict[str, Image.Image]:
        """Draw pictures, computed on the mesh by all processes alike.

        Args:
          programs: of `preview_programs`, compiled or not.
          params: parameters to sample with.
          frozen: `Task.frozen` on the mesh.
          images: uint8 [N, H, W, 3], some held-out ones; None in a run on tokens.

        Returns:
          Pictures by name, the same on every process.
        """

    @abc.abstractmethod
    def flops_per_image(self) -> float:
        """Matrix FLOPs of a training step for one image."""

    def choices(self) -> dict[str, str]:
        """Settings that `auto` stands for on this platform, equal on all hosts; `dtype` is one of them."""
        return {}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the frozen networks that the losses use."""
        return {}

    def model_defaults(self) -> dict:
        """What the fields of the architecture are where nothing is said of them."""
        return {field.name: field.default for field in dataclasses.fields(self.config)}

    def model_fields(self) -> dict:
        """Architecture that was trained, to build it again from a checkpoint."""
        return dataclasses.asdict(self.config)
