"""Toy task of eight parameters that learn the mean brightness of a batch, with failures on request."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.helpers.tiny import tiny_config
from var_jax.training.state import advance, optimizer_step
from var_jax.training.task import StepOutput, Task

RATE, WIDTH = 0.1, 8


class Toy(Task):
    """Task whose parameters follow the mean brightness of the images.

    Attributes:
      bad: steps, counted from 1, whose loss is NaN.
      high: step whose loss is multiplied by 100; 0 for none.
      ballast: number of further parameters, to make checkpoints larger.
      noisy: give each row of a batch a random weight, so that the order of rows matters.
    """

    name = "toy"
    image_size = 8

    def __init__(self, bad=(), high: int = 0, ballast: int = 1, noisy: bool = False):
        self.noisy = noisy
        self.bad = np.array(bad, np.int32)
        self.high = high
        self.ballast = ballast
        self.optimizer = optax.sgd(RATE)
        self.frozen = {}

    def init(self, key, loaded=()):
        w = nn.LogicallyPartitioned(jnp.zeros(WIDTH), ("embed",))
        return {"w": w, "ballast": jax.random.normal(key, (self.ballast,))}, {}

    def train_step(self, state, frozen, batch, key):
        brightness = batch["image"].astype(jnp.float32).mean((1, 2, 3)) / 255
        if self.noisy:
            brightness *= jax.random.normal(key, brightness.shape)

        def loss_fn(params):
            loss = jnp.mean((params["w"] - brightness.mean()) ** 2) + 1.0
            return jnp.where(jnp.isin(state.step + 1, self.bad), jnp.nan, loss)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        state = advance(state, *optimizer_step(state, grads, self.optimizer), 0.0)
        loss *= jnp.where(state.step == self.high, 100.0, 1.0)
        return StepOutput(state=state, loss=loss, gradient_norm=optax.tree.norm(grads))

    def eval_step(self, params, frozen, batch):
        return {"images": batch["valid"].sum()}

    def summarize(self, sums):
        return {"loss": float(sums["images"])}

    def preview_programs(self, mesh, params, frozen):
        return {}

    def preview(self, programs, params, frozen, images):
        return {}

    def flops_per_image(self):
        return 1.0

    def model_fields(self):
        return {}

    def model_defaults(self):
        return {}


def toy_stage(data_dir, every: int, **train):
    """Return the config of a stage of the toy, with a checkpoint every `every` steps."""
    stage = tiny_config(data_dir, every=every).next_scale
    stage.train.update(dict(ema_decay=0.0, eval_every=1000, preview_every=1000, **train))
    return stage
