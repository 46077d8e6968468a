"""Training the VAR transformer on the tokens of a frozen tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.sampling import pictures
from var_jax.sampling.generate import generate_in_chunks
from var_jax.sampling.options import SamplingOptions
from var_jax.tokenizer.fingerprint import fingerprint
from var_jax.tokenizer.model import Tokenizer, decode_steps, to_unit_range
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.training.memory import remat_that_fits
from var_jax.training.optimizer import accumulated_gradients, make_optimizer
from var_jax.training.sharding import make_mesh
from var_jax.training.state import apply_gradients
from var_jax.training.task import Task, compute_dtype, model_config
from var_jax.transformer.attention import choose_attention
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import training_flops
from var_jax.transformer.next_scale import NextScale


class NextScaleTask(Task):
    """See `Task`.  `frozen` holds the parameters of the tokenizer."""

    name = "next_scale"

    def __init__(
        self,
        stage: ConfigDict,
        steps: int,
        tokenizer: Tokenizer,
        tokenizer_params: dict,
        classes: int,
        mesh: Mesh | None = None,
    ):
        """`mesh` is what it will be trained on (None: one device), for what is chosen by the chip."""
        self.stage = stage
        self.tokenizer = tokenizer
        self.config = model_config(
            NextScaleConfig,
            stage.model,
            num_classes=classes,
            num_codes=tokenizer.config.num_codes,
            code_dim=tokenizer.config.code_dim,
            scales=tokenizer.config.scales,
        )
        mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        dtype = compute_dtype(stage.train.dtype)
        attention = choose_attention(stage.transformer.attention, mesh.devices.flat[0].platform, dtype)
        remat = remat_that_fits(stage, self.config, mesh, attention, dtype)
        self.model = NextScale(self.config, dtype, attention, remat)
        self.optimizer = make_optimizer(stage.train, steps)
        self.image_size = tokenizer.config.image_size
        self.frozen = {"tokenizer": tokenizer_params}
        if tokenizer_params:
            self.fingerprint = fingerprint(tokenizer_params)
        self.options = SamplingOptions(**stage.sampling)

    def init(self, key, given=()):
        scales = self.config.schedule
        inputs = jnp.zeros((1, scales.length - scales.ends[0], self.config.code_dim))
        return self.model.init(key, jnp.zeros(1, jnp.int32), inputs)["params"], {}

    def _tokens(self, frozen, batch):
        """Tokens [B, L], the batch's own or encoded, and teacher-forcing input [B, L - s_0^2, C]."""
        params = frozen["tokenizer"]
        if "tokens" in batch:
            tokens = batch["tokens"]
        else:
            images = to_unit_range(batch["image"])
            tokens = self.tokenizer.apply({"params": params}, images, method="encode")
        quantizer = Quantizer.create(params["quantizer"], self.tokenizer.config)
        return tokens, quantizer.teacher_input(quantizer.partial_sums(tokens))

    def train_step(self, state, frozen, batch, key):
        tokens, inputs = self._tokens(frozen, batch)
        return self.train_on_tokens(state, batch["label"], tokens, inputs, key)

    def train_on_tokens(self, state, labels, tokens, inputs, key):
        """A training step where the images are tokens [B, L] and teacher-forcing input already."""

        def loss_fn(params, part, key):
            losses, right = self.model.apply(
                {"params": params}, **part, train=True, rngs={"dropout": key}, method="losses"
            )
            right = right.astype(jnp.float32)
            last = self.config.schedule.starts[-1]
            metrics = {
                "loss": losses.mean(),
                "loss_last": losses[:, last:].mean(),
                "accuracy": right.mean(),
                "accuracy_last": right[:, last:].mean(),
            }
            return metrics["loss"], (metrics, ())

        parts = {"labels": labels, "tokens": tokens, "inputs": inputs}
        grads, (metrics, _) = accumulated_gradients(
            jax.grad(loss_fn, has_aux=True), state.params, parts, key, self.stage.train.accumulate
        )
        state = apply_gradients(state, grads, self.optimizer, self.stage.train.ema)
        return state, {**metrics, "gradient_norm": optax.global_norm(grads)}

    def eval_step(self, params, frozen, batch):
        tokens, inputs = self._tokens(frozen, batch)
        losses, right = self.model.apply({"params": params}, batch["label"], inputs, tokens, method="losses")
        over_images = lambda x: jnp.sum(x * batch["valid"][:, None], axis=0)  # noqa: E731
        return {"images": batch["valid"].sum(), "losses": over_images(losses), "right": over_images(right)}

    def summarize(self, sums):
        scales = self.config.schedule
        metrics = {}
        for name, total in (("loss", sums["losses"]), ("accuracy", sums["right"])):
            mean = total / sums["images"]
            metrics[name] = float(mean.mean())
            metrics[f"{name}_last"] = float(mean[scales.starts[-1] :].mean())
            for k in range(len(scales)):
                metrics[f"{name}_{k}"] = float(mean[scales.levels == k].mean())
        return metrics

    def preview(self, params, frozen, images):
        rows = min(10, self.config.num_classes)
        labels = np.repeat(np.linspace(0, self.config.num_classes - 1, rows).astype(np.int32), 8)
        frozen = frozen["tokenizer"]
        chunks = generate_in_chunks(
            self.tokenizer,
            self.model,
            frozen,
            params,
            labels,
            self.stage.seed,
            self.options,
            chunk=len(labels),
        )
        images, tokens = next(chunks)
        steps = np.asarray(decode_steps(self.tokenizer, frozen, tokens[::8])) / 2 + 0.5
        return {"samples": pictures.grid(images, columns=8), "scales": pictures.strips(steps)}

    def flops_per_image(self):
        return training_flops(self.config)
