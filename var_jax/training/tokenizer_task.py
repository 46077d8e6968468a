"""Training task of the multi-scale tokenizer: reconstruction, codebook and adversarial losses."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from var_jax.dtypes import product_precision
from var_jax.errors import ConfigError
from var_jax.images import image_strips, normalize, side_by_side
from var_jax.tokenizer.codebook_updates import codebook_use, count_codes
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.losses import entropy_penalty, image_terms, weighted_sum
from var_jax.tokenizer.lpips import vgg_features
from var_jax.tokenizer.model import Tokenizer, fingerprint
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.training.adversarial import Adversary
from var_jax.training.codebook_updater import CodebookUpdater, with_codebook
from var_jax.training.optimizer import accumulated_gradients, make_optimizer
from var_jax.training.preview import (
    chunk_size,
    decode_step_by_step,
    preview_program,
    row_shapes,
    run_in_chunks,
)
from var_jax.training.state import advance, optimizer_step
from var_jax.training.task import StepOutput, Task, compute_dtype, model_config, program_flops

LAST_LAYER = ("decoder", "conv_out", "kernel")  # whose gradients determine the adaptive weight
MAX_ADAPTIVE_WEIGHT = 1e4
PREVIEW_IMAGES = 32


class TokenizerTask(Task):
    """Task that trains a tokenizer; see `Task`.

    `TrainState.extra` has the states of `CodebookUpdater` and `Adversary`. `frozen` has the parameters of the
    perceptual networks, if used: `vgg` of the perceptual loss, `dino` of the discriminator.

    Attributes:
      weights: weights of the losses by name.
      model: tokenizer to train.
      eval_model: the same with a float32 encoder, as a trained tokenizer encodes.
      codebook_updater: EMA, restarts and metrics of the codebook.
      adversary: discriminator; None without adversarial loss.
    """

    name = "tokenizer"
    best_metric = "l2"

    def __init__(self, stage: ConfigDict, steps: int, frozen: dict | None = None):
        self.stage = stage
        self.frozen = frozen or {}
        self.weights = {name: w for name, w in stage.loss.items() if w}
        if "vgg" not in self.frozen:
            self.weights.pop("perceptual", None)
        if "perceptual" in self.weights:  # an adversary raises l2, by which the most blurred would be best
            self.best_metric = "perceptual"
        self.config = model_config(TokenizerConfig, stage.model)
        self.model = Tokenizer(self.config, compute_dtype(stage.train.dtype), stage.train.remat)
        self.eval_model = dataclasses.replace(self.model, encoder_dtype=jnp.dtype(jnp.float32))
        self.optimizer = make_optimizer(stage.train, steps)
        self.image_size = self.config.image_size
        self.codebook_updater = CodebookUpdater(stage.codebook, self.config, steps, stage.train.batch)
        self.adversary = None
        if stage.adversarial.weight:
            if self.config.patch:
                raise ConfigError(
                    "config.adversarial.weight must be 0 with config.model.patch, which has no network for "
                    f"an adversary to train; got {stage.adversarial.weight}"
                )
            size, dtype = self.image_size, self.model.dtype
            self.adversary = Adversary(stage.adversarial, stage.train, steps, size, dtype)
        # Trace the losses now, so that invalid ones fail before any data is read.
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.uint8)
        params, extra = nn.meta.unbox(jax.eval_shape(lambda: self.init(jax.random.key(0))))
        gradient = partial(self._gradient, step=0, key=jax.random.key(0))
        jax.eval_shape(gradient, params, extra, self.frozen, {"image": blank})

    def init(self, key, loaded=()):
        blank = jnp.zeros((1, self.image_size, self.image_size, 3))
        params = self.model.init(key, blank)["params"]
        extra = self.codebook_updater.init("quantizer/codebook" in loaded)
        if self.adversary:
            extra["adversary"] = self.adversary.init(jax.random.fold_in(key, 1), self.frozen)
        return params, extra

    def train_step(self, state, frozen, batch, key):
        dropout_key, restart_key, fit_key, adversary_key = jax.random.split(key, 4)
        images = batch["image"][:: self.stage.train.grad_accum_steps]  # as many as fit into memory
        features = lambda params: self._features(params, images)
        state = self.codebook_updater.before_step(state, features, fit_key)
        gradient = lambda params, part, key: self._gradient(
            params, state.extra, frozen, part, state.step, key
        )
        grads, (metrics, (quantized, recon)) = accumulated_gradients(
            gradient, state.params, batch, dropout_key, self.stage.train.grad_accum_steps
        )
        if self.adversary:
            real = normalize(batch["image"])
            adversary, adversary_metrics = self.adversary.train_step(
                state.extra["adversary"], frozen, real, recon, adversary_key, state.step
            )
            state = state.replace(extra={**state.extra, "adversary": adversary})
            metrics |= adversary_metrics
        state, codebook = self.codebook_updater.ema_update(state, quantized)
        params, opt_state = optimizer_step(state, grads, self.optimizer)
        if codebook is not None:  # EMA: the optimizer step only applied weight decay to the codebook
            params = with_codebook(params, codebook)
        state = advance(state, params, opt_state, self.stage.train.ema_decay)
        state, codebook_metrics = self.codebook_updater.after_step(state, quantized, restart_key)
        loss = metrics.pop("loss")
        return StepOutput(
            state=state,
            loss=loss,
            gradient_norm=optax.tree.norm(grads),
            metrics={**metrics, **codebook_metrics},
            must_be_finite=("discriminator", "discriminator_gradient_norm") if self.adversary else (),
        )

    def _features(self, params, images):
        return self.model.apply({"params": params}, normalize(images), method="features")

    def _gradient(self, params, extra, frozen, batch, step, key):
        """Compute the gradient of all losses of a batch.

        The gradients with respect to the reconstructions are computed first, then their weighted sum is
        back-propagated once through decoder and encoder. The adaptive weight of the adversarial loss costs
        two more backward passes of the last convolution.

        Args:
          params: trained parameters.
          extra: `TrainState.extra`.
          frozen: perceptual networks.
          batch: dict with `image`, uint8 [B, H, W, 3].
          step: int32 scalar.
          key: random key of dropout and augmentation.

        Returns:
          Gradients, and (metrics, (Quantized, reconstructions)); the reconstructions only with an adversary.
        """
        images = normalize(batch["image"])

        def forward(params):
            params = self.codebook_updater.stop_codebook_gradient(params)
            output = self.model.apply({"params": params}, images, train=True, rngs={"dropout": key})
            return (output.images, self._codebook_terms(params, output.quantized)), output.quantized

        def objective(recon, codebook_terms):
            precision = product_precision(self.model.dtype)
            terms = image_terms(images, recon, frozen.get("vgg"), precision) | codebook_terms
            terms = {"loss": weighted_sum(terms, self.weights), **terms}
            metrics = jax.tree.map(jnp.mean, terms)
            return metrics["loss"], metrics

        (recon, codebook_terms), backward, quantized = jax.vjp(forward, params, has_aux=True)
        (rec_grad, codebook_grad), metrics = jax.grad(objective, (0, 1), has_aux=True)(recon, codebook_terms)
        if self.adversary:
            augment_key = jax.random.fold_in(key, 1)
            loss, adv_grad = self.adversary.generator_loss_and_grad(
                extra["adversary"], frozen, recon, augment_key, step
            )
            adaptive_weight = self._adaptive_weight(backward, rec_grad, adv_grad, codebook_grad)
            weight = self.adversary.weight(step) * adaptive_weight
            rec_grad += weight * adv_grad
            metrics |= {"adversarial": loss, "adversarial_weight": weight}
        return backward((rec_grad, codebook_grad))[0], (metrics, (quantized, recon if self.adversary else ()))

    def _codebook_terms(self, params, quantized):
        terms = {"codebook": quantized.loss}
        if "entropy" in self.weights:
            codes = Quantizer.create(params["quantizer"], self.config).codes
            temperature = self.stage.codebook.entropy_temperature
            terms["entropy"] = entropy_penalty(quantized.targets, codes, temperature)
        return terms

    def _adaptive_weight(self, backward, rec_grad, adv_grad, codebook_grad):
        """Compute the ratio of gradient norms at the last layer, of image losses to adversarial loss.

        With `train.grad_accum_steps`, every microbatch has its own. Source: Esser et al. 2021.
        """
        if not self.stage.adversarial.adaptive:
            return jnp.ones(())

        def last_layer_norm(cotangent):
            leaf = backward((cotangent, jax.tree.map(jnp.zeros_like, codebook_grad)))[0]
            for name in LAST_LAYER:
                leaf = leaf[name]
            return jnp.linalg.norm(leaf)

        ratio = last_layer_norm(rec_grad) / (last_layer_norm(adv_grad) + 1e-4)
        return jnp.clip(ratio, self.stage.adversarial.min_ratio, MAX_ADAPTIVE_WEIGHT)

    def eval_step(self, params, frozen, batch):
        images = normalize(batch["image"])
        valid = batch["valid"]
        output = self.eval_model.apply({"params": params}, images)
        recon = jnp.clip(output.images, -1, 1)
        terms = image_terms(images, recon, frozen.get("vgg"))
        terms["codebook"] = output.quantized.loss
        # The entropy penalty of a batch is not a sum over its images.
        weights = {name: weight for name, weight in self.weights.items() if name != "entropy"}
        terms["loss"] = weighted_sum(terms, weights)
        terms["psnr"] = 10 * jnp.log10(4 / jnp.maximum(terms["l2"], 1e-10))  # the range of values is 2
        return {
            "images": valid.sum(),
            "terms": {name: jnp.sum(term * valid) for name, term in terms.items()},
            "counts": count_codes(
                output.quantized.tokens, self.config.schedule, self.config.num_codes, valid
            ),
        }

    def summarize(self, sums):
        num_images = sums["images"]
        use = codebook_use(sums["counts"], self.config.scales, num_images)
        return {name: float(total / num_images) for name, total in sums["terms"].items()} | {
            name: float(value) for name, value in use.items()
        }

    def preview_programs(self, mesh, params, frozen):
        cfg = self.stage.train
        # As many images per device as in training, which needs more memory for the backward pass.
        images_per_device = max(1, cfg.batch // cfg.grad_accum_steps // mesh.size)

        def reconstructions(params, frozen, images):
            tokens = self.eval_model.apply({"params": params}, normalize(images), method="encode")
            return decode_step_by_step(self.model, params, tokens)

        size = chunk_size(PREVIEW_IMAGES, images_per_device, mesh)
        images = row_shapes(size, (self.image_size, self.image_size, 3), jnp.uint8, mesh)
        return {"reconstructions": (preview_program(reconstructions, mesh), (params, frozen, images))}

    def preview(self, programs, params, frozen, images):
        images = images[:PREVIEW_IMAGES]
        (steps,) = run_in_chunks(programs["reconstructions"], params, frozen, images)
        strips = np.concatenate([steps, images[:, None]], axis=1)
        return {
            "reconstructions": side_by_side(images, steps[:, -1]),
            "reconstruction_scales": image_strips(strips[:10]),
        }

    def choices(self):
        return {"dtype": self.model.dtype.name}

    def frozen_fingerprints(self):
        return {name: fingerprint(params) for name, params in self.frozen.items()}

    def flops_per_image(self):
        """Count the FLOPs of tokenizer, LPIPS network and discriminator in a training step, without DINO."""
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        params, extra = jax.eval_shape(lambda: nn.meta.unbox(self.init(jax.random.key(0))))
        forward = lambda p, x: self.model.apply({"params": p}, x).images
        flops = 3 * program_flops(forward, params, blank)  # backward: twice the forward
        if "vgg" in self.frozen:  # forward for both images, backward to the pixels of one
            flops += 3 * program_flops(vgg_features, self.frozen["vgg"], blank)
        if self.adversary:
            flops += self.adversary.flops_per_image(extra["adversary"]["params"], self.frozen)
        return flops
