"""Training tasks of next-scale and next-token transformers, on the tokens of a frozen tokenizer."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from var_jax.conditions import decode_caption
from var_jax.dtypes import PRECISIONS
from var_jax.errors import ConfigError, config_errors
from var_jax.images import denormalize_to_uint8, image_grid, image_strips, normalize
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.sampler import Networks, generate, image_keys
from var_jax.sampling.teacher_forcing import teacher_forcing
from var_jax.sharding import make_mesh
from var_jax.tokenizer.model import Tokenizer, fingerprint
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.training.hardware import preview_images, remat_that_fits, smallest_memory
from var_jax.training.optimizer import (
    accumulated_gradients,
    join_microbatches,
    make_optimizer,
    split_microbatches,
)
from var_jax.training.preview import (
    chunk_size,
    decode_step_by_step,
    preview_program,
    row_shapes,
    run_in_chunks,
)
from var_jax.training.self_correction import SelfCorrection, draw_replaced, requantize
from var_jax.training.state import advance, optimizer_step
from var_jax.training.task import StepOutput, Task, compute_dtype, model_config
from var_jax.transformer.attention import choose_attention
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig, TransformerConfig
from var_jax.transformer.flops import training_flops
from var_jax.transformer.model import ARTransformer, choose_scan
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken

PREVIEW_COLUMNS = 8  # images per class, caption or embedding in a preview


def batch_conditions(batch: dict) -> jax.Array:
    """Return the conditions of a batch of the loader: captions or embeddings if it has them, else labels."""
    return batch["condition"] if "condition" in batch else batch["label"]


def encoder_precision(section: ConfigDict) -> str:
    """Return `config.transformer.encoder_precision`, or its default for an older config.

    Raises:
      ConfigError: on an unknown precision.
    """
    precision = section.get("encoder_precision", "high")
    if precision not in PRECISIONS:
        raise ConfigError(
            f"transformer.encoder_precision must be one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    return precision


class TransformerTask(Task):
    """Base class of the tasks that train a transformer; see `Task`.

    Attributes:
      architecture: class of `config`.
      network: class of `model`.
      config: architecture of the transformer.
      model: transformer network.
      tokenizer: tokenizer of evaluation and previews; its parameters are `frozen["tokenizer"]`.
      training_tokenizer: the same with the precision in which training steps encode images.
      options: sampling options.
      correction: how tokens are replaced in training steps.
      trained: positions of the maps that are trained.
    """

    architecture: type[TransformerConfig]
    network: type[ARTransformer]

    def __init__(
        self,
        stage: ConfigDict,
        steps: int,
        tokenizer: Tokenizer,
        tokenizer_params: dict,
        classes: int,
        mesh: Mesh | None = None,
        condition_fields: Mapping[str, object] = MappingProxyType({}),
        examples: np.ndarray | None = None,
    ):
        """Build the network, with attention and remat chosen for the mesh.

        Args:
          stage: config of the stage.
          steps: total number of steps.
          tokenizer: tokenizer whose tokens are predicted.
          tokenizer_params: its parameters; {} if it is not trained yet.
          classes: number of classes.
          mesh: mesh of the run; None for one device.
          condition_fields: fields of `config` that follow from the captions or embeddings of the data
            (`Source.condition_fields`); none with labels.
          examples: captions or embeddings of the previews, a row each; None with labels.

        Raises:
          ConfigError: if a field of the config is invalid; names it.
        """
        self.stage = stage
        # Tokens come from a float32 encoder, whatever dtype the rest computes in.
        self.tokenizer = dataclasses.replace(tokenizer, encoder_dtype=jnp.dtype(jnp.float32))
        self.training_tokenizer = dataclasses.replace(
            self.tokenizer, encoder_precision=encoder_precision(stage.transformer)
        )
        self.config = model_config(
            self.architecture,
            stage.model,
            num_classes=classes,
            num_codes=tokenizer.config.num_codes,
            code_dim=tokenizer.config.code_dim,
            scales=tokenizer.config.scales,
            **condition_fields,
        )
        self.examples = examples
        with config_errors(prefix="config.correction: "):
            self.correction = SelfCorrection(**stage.get("correction", {}))
            self.correction.check_maps(self.config)
        with config_errors(prefix="config.loss: "):
            self.trained = self.config.schedule.positions(**stage.get("loss", {}))
        mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
        dtype = compute_dtype(stage.train.dtype)
        platform = mesh.devices.flat[0].platform
        has_bias = self.config.relative == "relative_2d"
        with config_errors():
            attention = choose_attention(
                stage.transformer.attention,
                platform,
                dtype,
                self.config.head_dim,
                self.config.masks,
                has_bias,
            )
            scan_layers = choose_scan(stage.transformer.get("scan_layers", "auto"), platform)
        remat = remat_that_fits(stage, self.config, mesh, attention, dtype, scan_layers)
        self.model = self.network(self.config, dtype, attention, remat, scan_layers)
        self.optimizer = make_optimizer(stage.train, steps)
        self.image_size = tokenizer.config.image_size
        self.frozen = {"tokenizer": tokenizer_params}
        if tokenizer_params:
            self.fingerprint = fingerprint(tokenizer_params)
        with config_errors(prefix="config.sampling: "):
            self.options = SamplingOptions(**stage.sampling)
            self.options.per_scale(self.config.schedule, self.config.num_codes)

    def init(self, key, loaded=()):
        inputs = jnp.zeros((1, self.config.length - self.config.num_start_tokens, self.config.code_dim))
        model = self.model.clone(scan_layers=True)  # the state has the layout of checkpoints
        return model.init(key, self.config.null_conditions(1), inputs)["params"], {}

    def _tokens(self, tokenizer, frozen, batch):
        """Return target tokens [B, L], cached or encoded from images, and the teacher-forcing inputs."""
        params = frozen["tokenizer"]
        if "tokens" in batch:
            tokens = batch["tokens"]
        else:
            images = normalize(batch["image"])
            tokens = tokenizer.apply({"params": params}, images, method="encode")
        quantizer = Quantizer.create(params["quantizer"], self.tokenizer.config)
        return teacher_forcing(self.config, quantizer, tokens)

    def _corrected_tokens(self, params, frozen, batch, key):
        """Return targets and inputs like `_tokens`, with tokens replaced and what follows requantized."""
        replaced_key, source_key = jax.random.split(key)
        tokenizer_params = frozen["tokenizer"]
        if "tokens" in batch:
            features = batch["features"]
        else:
            images = normalize(batch["image"])
            features = self.training_tokenizer.apply({"params": tokenizer_params}, images, method="features")
        quantizer = Quantizer.create(tokenizer_params["quantizer"], self.tokenizer.config)
        size = len(features), self.config.length
        if self.correction.source == "uniform":
            replacements = jax.random.randint(source_key, size, 0, self.config.num_codes)
        else:
            tokens = batch["tokens"] if "tokens" in batch else quantizer.tokenize(features)
            _, inputs = teacher_forcing(self.config, quantizer, tokens)
            replacements = self._predicted_tokens(params, batch_conditions(batch), inputs, source_key)
        is_replaced = draw_replaced(replaced_key, size[0], self.config.schedule, self.correction.strength)
        targets, sums = requantize(quantizer, features, is_replaced, replacements)
        return targets, quantizer.transformer_inputs(sums)

    def _predicted_tokens(self, params, labels, inputs, key):
        """Draw tokens [B, L] from the teacher-forced predictions, a microbatch at a time to save memory."""
        variables = {"params": self.model.own_layout(params)}
        num_parts = self.stage.train.grad_accum_steps

        def draw(part):
            labels, inputs, key = part
            return jax.random.categorical(key, self.model.apply(variables, labels, inputs))

        parts = split_microbatches((labels, inputs), num_parts)
        return join_microbatches(jax.lax.map(draw, (*parts, jax.random.split(key, num_parts))))

    def train_step(self, state, frozen, batch, key):
        if self.correction.strength:
            correction_key, key = jax.random.split(key)
            tokens, inputs = self._corrected_tokens(state.params, frozen, batch, correction_key)
        else:
            tokens, inputs = self._tokens(self.training_tokenizer, frozen, batch)
        return self.train_on_tokens(state, batch_conditions(batch), tokens, inputs, key)

    def train_on_tokens(self, state, labels, tokens, inputs, key):
        """Take one optimizer step on tokens.

        Args:
          state: state before the step.
          labels: int32 [B], or the captions or embeddings of `batch_conditions`.
          tokens: target tokens, int32 [B, L].
          inputs: teacher-forcing inputs of `teacher_forcing`.
          key: random key of dropout.

        Returns:
          StepOutput.
        """
        batch = {"labels": labels, "tokens": tokens, "inputs": inputs}
        return self.optimize(state, self._cross_entropy, batch, key)

    def _cross_entropy(self, params, batch, key):
        """Compute the mean cross-entropy of a batch over the trained maps; see `optimize`."""
        variables = {"params": self.model.own_layout(params)}
        losses, is_correct = self.model.apply(
            variables, **batch, train=True, rngs={"dropout": key}, method="losses"
        )
        metrics = {}
        last_start = self.config.schedule.starts[-1]
        for name, values in (("loss", losses), ("accuracy", is_correct.astype(jnp.float32))):
            metrics[name] = values[:, self.trained].mean()
            if last_start:
                metrics[f"{name}_last"] = values[:, last_start:].mean()
        return metrics["loss"], (metrics, ())

    def optimize(self, state, loss_fn, batch, key):
        """Take one optimizer step on a loss.

        Args:
          state: state before the step.
          loss_fn: (params, batch, key) -> loss, (metrics, ()); metrics include `loss`.
          batch: arrays [B, ...].
          key: random key of dropout.

        Returns:
          StepOutput.
        """
        grads, (metrics, _) = accumulated_gradients(
            jax.grad(loss_fn, has_aux=True), state.params, batch, key, self.stage.train.grad_accum_steps
        )
        params, opt_state = optimizer_step(state, grads, self.optimizer)
        state = advance(state, params, opt_state, self.stage.train.ema_decay)
        loss = metrics.pop("loss")
        return StepOutput(
            state=state,
            loss=loss,
            gradient_norm=optax.tree.norm(grads),
            metrics=metrics,
            must_be_finite=tuple(name for name in metrics if name.startswith("loss")),
        )

    def eval_step(self, params, frozen, batch):
        tokens, inputs = self._tokens(self.tokenizer, frozen, batch)
        variables = {"params": self.model.own_layout(params)}
        labels = batch_conditions(batch)
        losses, is_correct = self.model.apply(variables, labels, inputs, tokens, method="losses")
        sum_images = lambda x: jnp.sum(x * batch["valid"][:, None], axis=0)
        return {
            "images": batch["valid"].sum(),
            "losses": sum_images(losses),
            "correct": sum_images(is_correct),
        }

    def summarize(self, sums):
        scales = self.config.schedule
        metrics = {}
        for name, total in (("loss", sums["losses"]), ("accuracy", sums["correct"])):
            mean = total / sums["images"]
            metrics[name] = float(mean[self.trained].mean())
            if len(scales) > 1:
                metrics[f"{name}_last"] = float(mean[scales.starts[-1] :].mean())
                for k in range(len(scales)):
                    metrics[f"{name}_{k}"] = float(mean[scales.levels == k].mean())
        num_trained = self.trained.stop - self.trained.start
        metrics["bits_per_pixel"] = metrics["loss"] * num_trained / np.log(2) / self.image_size**2
        return metrics

    @property
    def preview_labels(self) -> np.ndarray:
        """Return the labels of the previews, int32 [N]: up to ten classes, PREVIEW_COLUMNS images each.

        With captions or embeddings, return those of the examples likewise.
        """
        if self.config.condition != "label":
            examples = self.config.null_conditions(1) if self.examples is None else self.examples
            return np.repeat(examples, PREVIEW_COLUMNS, axis=0)
        rows = min(10, self.config.num_classes)
        classes = np.linspace(0, self.config.num_classes - 1, rows).astype(np.int32)
        return np.repeat(classes, PREVIEW_COLUMNS)

    def preview_programs(self, mesh, params, frozen):
        per_scale = self.options.per_scale(self.config.schedule, self.config.num_codes)
        memory = smallest_memory(mesh)
        images_per_device = preview_images(self.stage, self.tokenizer, self.model, per_scale, memory, mesh)
        num_samples, *label_shape = self.preview_labels.shape

        def samples(params, frozen, labels, key_data):
            keys = jax.random.wrap_key_data(key_data)
            params = self.model.own_layout(params)
            networks = Networks(self.tokenizer, self.model, frozen["tokenizer"], params)
            images, tokens = generate(networks, labels, keys, per_scale)
            return denormalize_to_uint8(images), tokens

        def scales(params, frozen, tokens):
            return decode_step_by_step(self.tokenizer, frozen["tokenizer"], tokens)

        size = chunk_size(num_samples, images_per_device, mesh)
        key_data = jax.eval_shape(lambda: jax.random.key_data(image_keys(0, jnp.arange(1))))
        labels = row_shapes(size, tuple(label_shape), self.preview_labels.dtype, mesh)
        keys = row_shapes(size, key_data.shape[1:], key_data.dtype, mesh)
        programs = {"samples": (preview_program(samples, mesh), (params, frozen, labels, keys))}
        if len(self.config.scales) > 1:
            size = chunk_size(num_samples // PREVIEW_COLUMNS, images_per_device, mesh)
            length = self.config.schedule.ends[per_scale.num_maps - 1]
            tokens = row_shapes(size, (length,), jnp.int32, mesh)
            programs["scales"] = (preview_program(scales, mesh), (params, frozen, tokens))
        return programs

    def preview(self, programs, params, frozen, images):
        labels = self.preview_labels
        keys = np.asarray(jax.random.key_data(image_keys(self.stage.seed, jnp.arange(len(labels)))))
        images, tokens = run_in_chunks(programs["samples"], params, frozen, labels, keys)
        rows = labels[::PREVIEW_COLUMNS] if self.config.condition == "caption" else ()
        captions = [decode_caption(row, self.config.vocabulary) for row in rows]
        previews = {"samples": image_grid(images, columns=PREVIEW_COLUMNS, row_labels=captions)}
        if "scales" in programs:
            (steps,) = run_in_chunks(programs["scales"], params, frozen, tokens[::PREVIEW_COLUMNS])
            previews["scales"] = image_strips(steps)
        return previews

    def choices(self):
        return {
            "dtype": self.model.dtype.name,
            "attention": self.model.attention,
            "remat": self.model.remat,
            "layers": "scanned" if self.model.scan_layers else "unrolled",
        }

    def flops_per_image(self):
        flops = training_flops(self.config)
        extra_forward = self.correction.strength and self.correction.source == "model"
        return flops * 4 // 3 if extra_forward else flops


class NextScaleTask(TransformerTask):
    """Task that trains VAR: predict every token map from the coarser ones."""

    name = "next_scale"
    architecture = NextScaleConfig
    network = NextScale


class NextTokenTask(TransformerTask):
    """Task that trains the baseline: predict every token from those before it in some order."""

    name = "next_token"
    architecture = NextTokenConfig
    network = NextToken
