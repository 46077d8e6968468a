"""What a training task gives to the loop."""

import abc
import dataclasses
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from var_jax.training.state import TrainState


def compute_dtype(name: str) -> jnp.dtype:
    """`auto` is bfloat16 on accelerators and float32 on CPU.

    Raises:
      ValueError: on another name than auto, float32, bfloat16.
    """
    if name == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype or config.train.dtype must be auto, float32 or bfloat16, found {name!r}")
    return jnp.dtype(name)


def model_config(cls, fields: ConfigDict, **fixed):
    """A model's dataclass from the config's `model` section and what other parts of the run fix.

    Raises:
      ValueError: on a field that the model does not have, naming those it has.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"config.model has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return cls(**{**fields.to_dict(), **fixed})


def program_flops(function: Callable, *inputs) -> float:
    """FLOPs of a function without loops, as XLA counts them."""
    return jax.jit(function).lower(*inputs).cost_analysis()["flops"]


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
    def train_step(
        self, state: TrainState, frozen: dict, batch: dict, key: jax.Array
    ) -> tuple[TrainState, dict]:
        """One optimiser step on a global batch -> new state, scalar metrics."""

    @abc.abstractmethod
    def eval_step(self, params: dict, frozen: dict, batch: dict) -> dict:
        """Sums over the images of a batch that are `valid`; the loop adds them up over batches."""

    @abc.abstractmethod
    def summarize(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Sums over the whole held-out set -> metrics."""

    @abc.abstractmethod
    def preview(self, params: dict, frozen: dict, images: np.ndarray | None) -> dict[str, Image.Image]:
        """Pictures by name; may show some held-out images uint8 [N, H, W, 3] (None in a run on tokens)."""

    @abc.abstractmethod
    def flops_per_image(self) -> float:
        """Matrix FLOPs of a training step for one image."""

    def model_defaults(self) -> dict:
        """What the fields of the architecture are where nothing is said of them."""
        return {field.name: field.default for field in dataclasses.fields(self.config)}

    def model_fields(self) -> dict:
        """Architecture that was trained, to build it again from a checkpoint."""
        return dataclasses.asdict(self.config)
