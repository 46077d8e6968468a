"""Codebook updates during training: k-means initialization, EMA, restarts of dead codes, usage metrics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from var_jax.errors import ConfigError
from var_jax.tokenizer.codebook_updates import (
    codebook_use,
    count_codes,
    dead_codes,
    kmeans,
    moving_mean,
    restart,
)
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.quantizer import Quantized, Quantizer
from var_jax.training.state import TrainState


class CodebookUpdater:
    """Updates of the codebook other than by its gradient.

    Its part of the training state is `code_hits` [K, V], the moving average of uses per step; `window`, the
    uses counted in the current and in the last full half of the window, and the number of their images;
    `fitted`, True if the codebook was loaded; with `codebook.ema_decay`, `code_uses` [V] of `moving_mean`.
    """

    def __init__(self, cfg: ConfigDict, model: TokenizerConfig, steps: int, batch: int):
        """Check and keep the settings.

        Args:
          cfg: section `codebook` of the stage.
          model: the tokenizer's architecture.
          steps: total number of steps.
          batch: images per step.

        Raises:
          ConfigError: if a field is out of range; names it.
        """
        for name in ("ema_decay", "hits_decay"):
            if not 0 <= cfg[name] < 1:
                raise ConfigError(f"config.codebook.{name} must be in [0, 1), got {cfg[name]}")
        for name, minimum in (("kmeans_steps", 0), ("restart_every", 0), ("window", 1)):
            if cfg[name] < minimum:
                raise ConfigError(f"config.codebook.{name} must be {minimum} or more, got {cfg[name]}")
        self.cfg = cfg
        self.model = model
        self.steps = steps
        self.batch = batch
        self.half_window = max(1, cfg.window // (2 * batch))  # steps

    def init(self, loaded: bool) -> dict:
        """Return the initial state.

        If the codebook was loaded (`init_from`), k-means is skipped and the EMA counts start high, so that
        codes move slowly.
        """
        scales = len(self.model.scales)
        codes = self.model.num_codes
        extra = {
            "code_hits": jnp.zeros((scales, codes)),
            "window": {"counts": jnp.zeros((2, scales, codes)), "images": jnp.zeros(2)},
            "fitted": jnp.asarray(loaded),
        }
        if self.cfg.ema_decay:  # loaded codes weigh as if they had been used evenly for a long time
            uniform = self.batch * self.model.schedule.length / codes / (1 - self.cfg.ema_decay)
            extra["code_uses"] = jnp.full(codes, uniform if loaded else 0.0, jnp.float32)
        return extra

    def before_step(self, state: TrainState, features: Callable, key: jax.Array) -> TrainState:
        """Fit the codebook to the batch by k-means, in the first `kmeans_steps` steps.

        Args:
          state: state before the step.
          features: function from parameters to the features of the batch.
          key: random key of the initial codes.
        """
        if not self.cfg.kmeans_steps:
            return state

        def fit(codebook):
            quantizer = Quantizer.create(state.params["quantizer"], self.model)
            return kmeans(quantizer, features(state.params), key, resample=state.step == 0)

        due = (state.step < self.cfg.kmeans_steps) & ~state.extra["fitted"]
        codebook = state.params["quantizer"]["codebook"]
        codebook = jax.lax.cond(due, fit, lambda codebook: codebook, codebook)
        return _map_codebook(state, lambda old: jnp.where(due, codebook, old))

    def stop_codebook_gradient(self, params: dict) -> dict:
        """Stop the gradient of the codebook if it is updated by EMA."""
        if not self.cfg.ema_decay:
            return params
        return with_codebook(params, jax.lax.stop_gradient(params["quantizer"]["codebook"]))

    def ema_update(self, state: TrainState, quantized: Quantized) -> tuple[TrainState, jax.Array | None]:
        """Update the moving means of the codes' targets.

        Returns:
          The state, and the codebook to set after the optimizer step, float32 [V, C]; None if the codebook is
          trained by its gradient.
        """
        if not self.cfg.ema_decay:
            return state, None
        codebook, uses = moving_mean(
            state.params["quantizer"]["codebook"],
            state.extra["code_uses"],
            quantized.tokens,
            quantized.targets,
            self.cfg.ema_decay,
        )
        return state.replace(extra={**state.extra, "code_uses": uses}), codebook

    def after_step(self, state: TrainState, quantized: Quantized, key: jax.Array) -> tuple[TrainState, dict]:
        """Restart dead codes and count uses; return the state and metrics of the codebook."""
        counts = count_codes(quantized.tokens, self.model.schedule, self.model.num_codes)
        state, dead = self._restart(state, counts, quantized.targets, key)
        window = self._update_window(state, counts)
        codes = Quantizer.create(state.params["quantizer"], self.model).codes
        metrics = codebook_use(window["counts"].sum(0), self.model.scales, window["images"].sum())
        metrics |= {
            "dead_codes": dead,
            "code_norm": jnp.linalg.norm(codes, axis=-1).mean(),
            "f_hat_norm": jnp.linalg.norm(quantized.f_hat, axis=-1).mean(),
        }
        return state.replace(extra={**state.extra, "window": window}), metrics

    def _restart(self, state: TrainState, counts, targets, key) -> tuple[TrainState, jax.Array]:
        """Update the hits, and every `restart_every` steps move dead codes onto targets.

        Returns:
          The state, and the number of dead codes.
        """
        cfg, extra = self.cfg, dict(state.extra)
        hits = cfg.hits_decay * extra["code_hits"] + (1 - cfg.hits_decay) * counts
        dead = dead_codes(hits, cfg.dead_threshold)
        if not cfg.restart_every:
            return state.replace(extra={**extra, "code_hits": hits}), dead.sum()
        due = (state.step % cfg.restart_every == 0) & (state.step <= cfg.restart_until_fraction * self.steps)
        moved = dead & due
        # A moved code starts with the mean of the hits, so that it is not dead again at once.
        extra["code_hits"] = jnp.where(moved, hits.sum(1, keepdims=True) / hits.shape[1], hits)
        if cfg.ema_decay:  # its moving mean starts afresh
            extra["code_uses"] = jnp.where(moved, 0, extra["code_uses"])
        move = lambda codebook: restart(codebook, moved, targets, self.model.schedule, key)
        state = _map_codebook(state, lambda codebook: jax.lax.cond(due, move, lambda c: c, codebook))
        return state.replace(extra=extra), dead.sum()

    def _update_window(self, state: TrainState, counts) -> dict:
        """Add the counts of this step to the window; when its current half is full, drop the older half."""
        window = state.extra["window"]
        starts_half = (state.step - 1) % self.half_window == 0  # steps count from 1 here

        def add(halves, increment):
            current = jnp.where(starts_half, 0, halves[0]) + increment
            return jnp.stack([current, jnp.where(starts_half, halves[0], halves[1])])

        return {"counts": add(window["counts"], counts), "images": add(window["images"], self.batch)}


def with_codebook(params: dict, codebook: jax.Array) -> dict:
    """Replace the codebook of a tokenizer's parameters."""
    return {**params, "quantizer": {**params["quantizer"], "codebook": codebook}}


def _map_codebook(state: TrainState, function: Callable) -> TrainState:
    """Apply a function to the codebook, and to its moving average if there is one."""
    apply = lambda params: with_codebook(params, function(params["quantizer"]["codebook"]))
    return state.replace(params=apply(state.params), ema=None if state.ema is None else apply(state.ema))
