"""Training the multi-scale tokenizer: reconstruction, codebook, adversary, and codes kept alive."""

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

LAST_LAYER = ("decoder", "conv_out", "kernel")  # where the adversary's weight is weighed
MAX_RATIO = 1e4
PREVIEW_IMAGES = 32


class TokenizerTask(Task):
    """See `Task`.

    The state carries what `CodebookUpdater` and `Adversary` keep.  `frozen` holds the parameters of networks
    that judge: `vgg` of the perceptual distance, `dino` of the discriminator, where they are used.
    """

    name = "tokenizer"
    best_metric = "l2"

    def __init__(self, stage: ConfigDict, steps: int, frozen: dict | None = None):
        self.stage, self.frozen = stage, frozen or {}
        self.weights = {name: w for name, w in stage.loss.items() if w}
        if "vgg" not in self.frozen:
            self.weights.pop("perceptual", None)
        if "perceptual" in self.weights:  # an adversary raises l2, so that the best would be the blurred one
            self.best_metric = "perceptual"
        self.config = model_config(TokenizerConfig, stage.model)
        self.model = Tokenizer(self.config, compute_dtype(stage.train.dtype), stage.train.remat)
        # Held-out images are encoded as they will be once this tokenizer is trained.
        self.evaluated = dataclasses.replace(self.model, encoder_dtype=jnp.dtype(jnp.float32))
        self.optimizer = make_optimizer(stage.train, steps)
        self.image_size = self.config.image_size
        self.codebook_updater = CodebookUpdater(stage.codebook, self.config, steps, stage.train.batch)
        self.adversary = None
        if stage.adversarial.weight:
            if self.config.patch:
                raise ConfigError(
                    "config.adversarial.weight must be 0 with config.model.patch, which leaves no network "
                    f"for an adversary to train; got {stage.adversarial.weight}"
                )
            size, dtype = self.image_size, self.model.dtype
            self.adversary = Adversary(stage.adversarial, stage.train, steps, size, dtype)
        # The program is traced here already, so that an impossible loss fails before any data is read.
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.uint8)
        params, extra = nn.meta.unbox(jax.eval_shape(lambda: self.init(jax.random.key(0))))
        check = partial(self._gradient, step=0, key=jax.random.key(0))
        jax.eval_shape(check, params, extra, self.frozen, {"image": blank})

    def init(self, key, given=()):
        blank = jnp.zeros((1, self.image_size, self.image_size, 3))
        params = self.model.init(key, blank)["params"]
        extra = self.codebook_updater.init("quantizer/codebook" in given)
        if self.adversary:
            extra["adversary"] = self.adversary.init(jax.random.fold_in(key, 1), self.frozen)
        return params, extra

    def train_step(self, state, frozen, batch, key):
        dropout_key, restart_key, fit_key, adversary_key = jax.random.split(key, 4)
        some = batch["image"][:: self.stage.train.grad_accum_steps]  # as many as there is memory for
        state = self.codebook_updater.before_step(state, lambda params: self._features(params, some), fit_key)
        gradient = lambda params, part, key: self._gradient(  # noqa: E731
            params, state.extra, frozen, part, state.step, key
        )
        grads, (metrics, (quantized, recon)) = accumulated_gradients(
            gradient, state.params, batch, dropout_key, self.stage.train.grad_accum_steps
        )
        if self.adversary:
            real, step = normalize(batch["image"]), state.step
            adversary, result = self.adversary.train_step(
                state.extra["adversary"], frozen, real, recon, adversary_key, step
            )
            state, metrics = state.replace(extra={**state.extra, "adversary": adversary}), metrics | result
        state, codebook = self.codebook_updater.ema_update(state, quantized)
        params, opt_state = optimizer_step(state, grads, self.optimizer)
        if codebook is not None:  # follows its targets; the optimiser only decayed it
            params = with_codebook(params, codebook)
        state = advance(state, params, opt_state, self.stage.train.ema_decay)
        state, use = self.codebook_updater.after_step(state, quantized, restart_key)
        loss = metrics.pop("loss")
        return StepOutput(
            state=state,
            loss=loss,
            gradient_norm=optax.tree.norm(grads),
            metrics={**metrics, **use},
            must_be_finite=("discriminator", "discriminator_gradient_norm") if self.adversary else (),
        )

    def _features(self, params, images):
        return self.model.apply({"params": params}, normalize(images), method="features")

    def _gradient(self, params, extra, frozen, batch, step, key):
        """Gradient of all losses of a batch -> gradients, (metrics, (Quantized, reconstructions)).

        The gradients of the losses to the reconstructions come first; then one pass back through decoder
        and encoder takes their sum.  The two sizes that the adversary's weight is the ratio of cost a
        convolution each.
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
            ratio = self._ratio(backward, rec_grad, adv_grad, codebook_grad)
            weight = self.adversary.weight(step) * ratio
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

    def _ratio(self, backward, rec_grad, adv_grad, codebook_grad):
        """Size of the image losses' gradient at the last layer over the adversary's (Esser et al. 2021).

        With `train.grad_accum_steps`, of each part of the batch by itself.
        """
        if not self.stage.adversarial.adaptive:
            return jnp.ones(())

        def size(cotangent):
            leaf = backward((cotangent, jax.tree.map(jnp.zeros_like, codebook_grad)))[0]
            for name in LAST_LAYER:
                leaf = leaf[name]
            return jnp.linalg.norm(leaf)

        ratio = size(rec_grad) / (size(adv_grad) + 1e-4)
        return jnp.clip(ratio, self.stage.adversarial.min_ratio, MAX_RATIO)

    def eval_step(self, params, frozen, batch):
        images, valid = normalize(batch["image"]), batch["valid"]
        output = self.evaluated.apply({"params": params}, images)
        recon = jnp.clip(output.images, -1, 1)
        terms = image_terms(images, recon, frozen.get("vgg"))
        terms["codebook"] = output.quantized.loss
        # The entropy of a batch is no sum over its images.
        weights = {name: weight for name, weight in self.weights.items() if name != "entropy"}
        terms["loss"] = weighted_sum(terms, weights)
        terms["psnr"] = 10 * jnp.log10(4 / jnp.maximum(terms["l2"], 1e-10))  # values span 2
        return {
            "images": valid.sum(),
            "terms": {name: jnp.sum(term * valid) for name, term in terms.items()},
            "counts": count_codes(
                output.quantized.tokens, self.config.schedule, self.config.num_codes, valid
            ),
        }

    def summarize(self, sums):
        n = sums["images"]
        use = codebook_use(sums["counts"], self.config.scales, n)
        return {name: float(total / n) for name, total in sums["terms"].items()} | {
            name: float(value) for name, value in use.items()
        }

    def preview_programs(self, mesh, params, frozen):
        cfg = self.stage.train
        each = max(
            1, cfg.batch // cfg.grad_accum_steps // mesh.size
        )  # training takes as many, and a backward pass

        def reconstructions(params, frozen, images):
            tokens = self.evaluated.apply({"params": params}, normalize(images), method="encode")
            return decode_step_by_step(self.model, params, tokens)

        size = chunk_size(PREVIEW_IMAGES, each, mesh)
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
        """Of the networks that a step runs through, forward and backward, the discriminator among them.

        DINO's blocks are not counted.
        """
        side = self.image_size
        blank = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        params, extra = jax.eval_shape(lambda: nn.meta.unbox(self.init(jax.random.key(0))))
        forward = lambda p, x: self.model.apply({"params": p}, x).images  # noqa: E731
        flops = 3 * program_flops(forward, params, blank)  # backward: twice the forward
        if "vgg" in self.frozen:  # both images forward, one backward, to the pixels alone
            flops += 3 * program_flops(vgg_features, self.frozen["vgg"], blank)
        if self.adversary:
            flops += self.adversary.flops_per_image(extra["adversary"]["params"], self.frozen)
        return flops
