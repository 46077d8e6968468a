"""Interface between a training task and the loop, and what tasks share: dtypes, configs, FLOPs."""

import abc
import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from var_jax.errors import ConfigError, config_errors
from var_jax.sharding import replicated
from var_jax.training.state import TrainState

UNCOUNTABLE = ("while", "pallas_call")  # the jaxpr does not have the number of iterations


@flax.struct.dataclass
class StepOutput:
    """Result of one training step.

    Attributes:
      state: state after the step.
      loss: scalar; monitored for spikes.
      gradient_norm: scalar, global norm before clipping.
      metrics: further scalars to log.
      must_be_finite: names of metrics that must be finite, like loss and gradient norm; otherwise the step is
        skipped: it changes nothing.
    """

    state: TrainState
    loss: jax.Array
    gradient_norm: jax.Array
    metrics: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    must_be_finite: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def state_and_metrics(self) -> tuple[TrainState, dict[str, jax.Array]]:
        """Return the state, and all metrics, including loss and gradient norm."""
        return self.state, {"loss": self.loss, **self.metrics, "gradient_norm": self.gradient_norm}


class Task(abc.ABC):
    """Base class of training tasks: parameters, a training step, an evaluation step and previews.

    `init`, `train_step` and `eval_step` are traced by `jit`.

    Attributes:
      name: name of the stage and of its directory in the run.
      config: dataclass of the architecture.
      optimizer: optax optimizer of the parameters.
      frozen: arrays that the steps read but do not change, e.g. the tokenizer of a transformer.
      image_size: side of the images in pixels.
      fingerprint: fingerprint of the trained networks that this task builds on; "" without any.
      best_metric: evaluation metric that is minimized to select the best checkpoint.
    """

    name: str
    config: Any
    optimizer: optax.GradientTransformation
    frozen: dict
    image_size: int
    fingerprint: str = ""
    best_metric: str = "loss"

    @abc.abstractmethod
    def init(self, key: jax.Array, loaded: Collection[str] = ()) -> tuple[dict, dict]:
        """Initialize the parameters and the rest of the task's state.

        Args:
          key: random key.
          loaded: paths of parameters that are replaced by loaded ones (see `param_init`).

        Returns:
          Parameters with logical axis names, and `TrainState.extra`.
        """

    @abc.abstractmethod
    def train_step(self, state: TrainState, frozen: dict, batch: dict, key: jax.Array) -> StepOutput:
        """Take one optimizer step on a global batch."""

    @abc.abstractmethod
    def eval_step(self, params: dict, frozen: dict, batch: dict) -> dict:
        """Compute sums over the `valid` images of a batch; the loop adds them up over batches."""

    @abc.abstractmethod
    def summarize(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Convert sums over the held-out set to metrics, including `best_metric`."""

    @abc.abstractmethod
    def preview_programs(self, mesh: Mesh, params: dict, frozen: dict) -> dict[str, tuple[Callable, tuple]]:
        """Return the programs that `preview` runs, so that they can be compiled ahead of time.

        Args:
          mesh: mesh of the run.
          params: parameters to sample with, arrays or their shapes and shardings.
          frozen: `Task.frozen` on the mesh, likewise.

        Returns:
          Jitted functions by name, with their arguments: `params`, `frozen`, then the shapes and shardings of
          one batch of rows.
        """

    @abc.abstractmethod
    def preview(
        self,
        programs: dict[str, tuple[Callable, tuple]],
        params: dict,
        frozen: dict,
        images: np.ndarray | None,
    ) -> dict[str, Image.Image]:
        """Draw preview pictures on the mesh; all processes call it.

        Args:
          programs: result of `preview_programs`, compiled or not.
          params: parameters to sample with.
          frozen: `Task.frozen` on the mesh.
          images: held-out images, uint8 [N, H, W, 3]; None in a run on tokens.

        Returns:
          Pictures by name, the same on every process.
        """

    @abc.abstractmethod
    def flops_per_image(self) -> float:
        """Return the matrix FLOPs of a training step per image."""

    def frozen_shardings(self, mesh: Mesh, params: dict) -> Any:
        """Return the shardings of `frozen`, or a prefix of their tree; replicated by default.

        Args:
          mesh: mesh of the run.
          params: parameters of the run, as shapes with shardings.
        """
        return replicated(mesh)

    def choices(self) -> dict[str, str]:
        """Return the settings that `auto` resolves to, equal on all hosts; `dtype` is one of them."""
        return {}

    def frozen_fingerprints(self) -> dict[str, str]:
        """Return fingerprints of the frozen networks that the losses use, by name."""
        return {}

    def model_defaults(self) -> dict:
        """Return the default values of the model config's fields."""
        return {field.name: field.default for field in dataclasses.fields(self.config)}

    def model_fields(self) -> dict:
        """Return the model config's fields, to rebuild the model from a checkpoint."""
        return dataclasses.asdict(self.config)


# --- Helpers of tasks


def compute_dtype(name: str) -> jnp.dtype:
    """Resolve a dtype name; `auto` is bfloat16 on accelerators and float32 on CPU.

    Raises:
      ConfigError: unless the name is auto, float32 or bfloat16.
    """
    if name == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype or config.train.dtype must be auto, float32 or bfloat16, got {name!r}")
    return jnp.dtype(name)


def model_config(cls, fields: ConfigDict, **fixed):
    """Build a model's config dataclass from the `model` section of a stage.

    Args:
      cls: class of the config.
      fields: the `model` section.
      **fixed: fields that other parts of the run determine; they take precedence.

    Raises:
      ConfigError: on an unknown field, with the known ones, or on an invalid value.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ConfigError(
            f"config.model has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    with config_errors():
        return cls(**{**fields.to_dict(), **fixed})


# --- FLOPs of a program


def program_flops(function: Callable, *inputs) -> float:
    """Count the matrix FLOPs of a function of arrays or their shapes, without compiling it.

    Raises:
      ValueError: on a while loop or a Pallas kernel, see `count_flops`.
    """
    return count_flops(jax.make_jaxpr(function)(*inputs).jaxpr)


def count_flops(jaxpr: Jaxpr) -> float:
    """Count the FLOPs of all matrix products and convolutions (a multiply-add is two).

    The body of a scan counts once per iteration, a `cond` as its most expensive branch.

    Raises:
      ValueError: on a while loop or a Pallas kernel, whose FLOPs do not follow from the jaxpr.
    """
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: JaxprEqn) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _product_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    bodies = [count_flops(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
    if name in UNCOUNTABLE:
        raise ValueError(f"cannot count the FLOPs of {name}: the jaxpr does not say how often its body runs")
    if name == "cond":
        return max(bodies)
    return sum(bodies) * (equation.params["length"] if name == "scan" else 1)


def _product_flops(equation: JaxprEqn) -> float:
    lhs = equation.invars[0].aval
    contracting, _ = equation.params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracting[0])


def _convolution_flops(equation: JaxprEqn) -> float:
    """Count the FLOPs of a convolution; like XLA, leave out kernel taps that fall on padding."""
    params = equation.params
    lhs, rhs = equation.invars
    out = equation.outvars[0].aval
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]  # batch or output channels, channels, sides
    flops = 2 * out.shape[out_spec[0]] * out.shape[out_spec[1]] * rhs.aval.shape[rhs_spec[1]]
    for i, (padding, _) in enumerate(params["padding"]):
        side, taps, outputs = (
            aval.shape[spec[2 + i]]
            for aval, spec in ((lhs.aval, lhs_spec), (rhs.aval, rhs_spec), (out, out_spec))
        )
        stride, lhs_dilation, rhs_dilation = (
            params[name][i] for name in ("window_strides", "lhs_dilation", "rhs_dilation")
        )
        positions = (o * stride + t * rhs_dilation - padding for o in range(outputs) for t in range(taps))
        flops *= sum(0 <= p <= (side - 1) * lhs_dilation and p % lhs_dilation == 0 for p in positions)
    return flops
