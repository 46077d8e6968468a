"""Training the multi-scale tokenizer: reconstruction, codebook, and codes kept alive."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from var_jax.evaluation.codebook_use import codebook_use
from var_jax.sampling import pictures
from var_jax.tokenizer.codebook import count_codes, dead_codes, restart
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.losses import loss_terms, weighted_sum
from var_jax.tokenizer.model import Tokenizer, decode_steps, encode
from var_jax.training.optimizer import accumulated_gradients, make_optimizer
from var_jax.training.state import TrainState, apply_gradients
from var_jax.training.task import Task, compute_dtype, model_config, to_unit_range


class TokenizerTask(Task):
    """See `Task`.

    The state carries `code_hits` [K, V], a moving average of uses a step.  `frozen` holds the parameters of
    the perceptual distance, where it is part of the loss.
    """

    name = "tokenizer"
    best_metric = "l2"

    def __init__(self, stage: ConfigDict, steps: int, vgg: dict | None = None):
        self.stage, self.steps = stage, steps
        self.weights = {name: w for name, w in stage.loss.items() if vgg is not None or name != "perceptual"}
        self.config = model_config(TokenizerConfig, stage.model)
        self.model = Tokenizer(self.config, compute_dtype(stage.train.dtype))
        self.optimizer = make_optimizer(stage.train, steps)
        self.image_size = self.config.image_size
        self.frozen = {} if vgg is None else {"vgg": vgg}
        # The program is traced here already, so that an impossible loss fails before any data is read.
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        params = jax.eval_shape(lambda: self.init(jax.random.key(0))[0])
        check = lambda p, x: self._loss(p, self.frozen, {"image": x}, jax.random.key(0))  # noqa: E731
        jax.eval_shape(check, params, blank)

    def init(self, key):
        blank = jnp.zeros((1, self.image_size, self.image_size, 3))
        hits = jnp.zeros((len(self.config.scales), self.config.num_codes))
        return self.model.init(key, blank)["params"], {"code_hits": hits}

    def _terms(self, frozen, images, output):
        terms = loss_terms(images, output, frozen.get("vgg"), self.model.dtype)
        return {"loss": weighted_sum(terms, self.weights), **terms}

    def _loss(self, params, frozen, batch, key):
        images = to_unit_range(batch["image"])
        output = self.model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        terms = self._terms(frozen, images, output)
        metrics = jax.tree.map(jnp.mean, terms)
        return metrics["loss"], (metrics, (output.quantized.tokens, output.quantized.targets))

    def train_step(self, state, frozen, batch, key):
        dropout_key, restart_key = jax.random.split(key)
        loss = lambda params, part, key: self._loss(params, frozen, part, key)  # noqa: E731
        grads, (metrics, (tokens, targets)) = accumulated_gradients(
            loss, state.params, batch, dropout_key, self.stage.train.accumulate
        )
        state = apply_gradients(state, grads, self.optimizer, self.stage.train.ema)
        state, dead = self._restart_codes(state, tokens, targets, restart_key)
        return state, {**metrics, "dead_codes": dead, "gradient_norm": optax.global_norm(grads)}

    def _restart_codes(self, state: TrainState, tokens, targets, key) -> tuple[TrainState, jax.Array]:
        """Counts the codes of this step, and every `restart_every` steps moves those hardly used."""
        cfg = self.stage.codebook
        counts = count_codes(tokens, self.config.schedule, self.config.num_codes)
        hits = cfg.hits_decay * state.extra["code_hits"] + (1 - cfg.hits_decay) * counts
        dead = dead_codes(hits, cfg.dead_below)
        if not cfg.restart_every:
            return state.replace(extra={**state.extra, "code_hits": hits}), dead.sum()
        due = (state.step % cfg.restart_every == 0) & (state.step <= cfg.restart_until * self.steps)
        moved = dead & due

        def move(params):
            codebook = restart(params["quantizer"]["codebook"], moved, targets, key)
            return {**params, "quantizer": {**params["quantizer"], "codebook": codebook}}

        # A moved code starts with an even share of the hits, so that it has time to be found.
        hits = jnp.where(moved, hits.sum(1, keepdims=True) / hits.shape[1], hits)
        ema = None if state.ema is None else move(state.ema)
        extra = {**state.extra, "code_hits": hits}
        return state.replace(params=move(state.params), ema=ema, extra=extra), dead.sum()

    def eval_step(self, params, frozen, batch):
        images, valid = to_unit_range(batch["image"]), batch["valid"]
        output = self.model.apply({"params": params}, images)
        output = output.replace(images=jnp.clip(output.images, -1, 1))
        terms = self._terms(frozen, images, output)
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
        return {name: float(total / n) for name, total in sums["terms"].items()} | codebook_use(
            sums["counts"], self.config.scales, int(n)
        )

    def preview(self, params, frozen, images):
        images = to_unit_range(jnp.asarray(images))
        tokens = encode(self.model, params, images)
        steps = jnp.concatenate([decode_steps(self.model, params, tokens), images[:, None]], axis=1)
        steps = np.asarray(steps) / 2 + 0.5
        return {
            "reconstructions": pictures.side_by_side(steps[:32, -1], steps[:32, -2]),
            "reconstruction_scales": pictures.strips(steps[:10]),
        }

    def flops_per_image(self):
        """Of encoder, quantizer and decoder; a perceptual loss comes on top."""
        blank = jax.ShapeDtypeStruct((1, self.image_size, self.image_size, 3), jnp.float32)
        params = jax.eval_shape(lambda: self.init(jax.random.key(0))[0])
        forward = jax.jit(lambda p, x: self.model.apply({"params": p}, x).images).lower(params, blank)
        return 3 * forward.cost_analysis()["flops"]  # backward: twice the forward
