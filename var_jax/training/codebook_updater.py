"""The codebook of a tokenizer in training: fitted at the start, followed, restarted, and watched."""

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
    """What happens to the codebook beside the gradient.

    In the state it keeps `code_hits` [K, V], a moving average of uses a step; `window`, the uses
    counted in the current and in the last full half of the window, and of how many images; `fitted`, whether
    the codebook came from elsewhere; and with `codebook.ema_decay` the moving uses of `moving_mean`.
    """

    def __init__(self, cfg: ConfigDict, model: TokenizerConfig, steps: int, batch: int):
        """Raises ConfigError on a field that cannot be.

        Args:
          cfg: section `codebook` of the stage.
          model: the tokenizer's architecture.
          steps: of the whole training.
          batch: images a step.
        """
        for name in ("ema_decay", "hits_decay"):
            if not 0 <= cfg[name] < 1:
                raise ConfigError(f"config.codebook.{name} must be in [0, 1), got {cfg[name]}")
        for name, least in (("kmeans_steps", 0), ("restart_every", 0), ("window", 1)):
            if cfg[name] < least:
                raise ConfigError(f"config.codebook.{name} must be {least} or more, got {cfg[name]}")
        self.cfg, self.model, self.steps, self.batch = cfg, model, steps, batch
        self.half_window = max(1, cfg.window // (2 * batch))  # steps

    def init(self, given: bool) -> dict:
        """What the state starts with; a codebook that is given is not fitted, and moves but slowly."""
        scales, codes = len(self.model.scales), self.model.num_codes
        extra = {
            "code_hits": jnp.zeros((scales, codes)),
            "window": {"counts": jnp.zeros((2, scales, codes)), "images": jnp.zeros(2)},
            "fitted": jnp.asarray(given),
        }
        if self.cfg.ema_decay:  # given codes weigh as much as if they had long been used evenly
            even = self.batch * self.model.schedule.length / codes / (1 - self.cfg.ema_decay)
            extra["code_uses"] = jnp.full(codes, even if given else 0.0, jnp.float32)
        return extra

    def before_step(self, state: TrainState, features: Callable, key: jax.Array) -> TrainState:
        """In the first steps fits the codebook to the batch, going on from the step before.

        Args:
          state: before the step.
          features: parameters -> features of the batch.
          key: of the draws.
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
        """The parameters as the loss sees them: no gradient to codes that follow means."""
        if not self.cfg.ema_decay:
            return params
        return with_codebook(params, jax.lax.stop_gradient(params["quantizer"]["codebook"]))

    def ema_update(self, state: TrainState, quantized: Quantized) -> tuple[TrainState, jax.Array | None]:
        """Update the moving means of the codes' targets.

        Returns:
          The state, and the codebook to set after the optimiser's step, float32 [V, C]; None where the codes
          follow their gradient.
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
        """Restarts codes and counts; returns the state and metrics."""
        counts = count_codes(quantized.tokens, self.model.schedule, self.model.num_codes)
        state, dead = self._restart(state, counts, quantized.targets, key)
        window = self._slide(state, counts)
        codes = Quantizer.create(state.params["quantizer"], self.model).codes
        metrics = codebook_use(window["counts"].sum(0), self.model.scales, window["images"].sum())
        metrics |= {
            "dead_codes": dead,
            "code_norm": jnp.linalg.norm(codes, axis=-1).mean(),
            "f_hat_norm": jnp.linalg.norm(quantized.f_hat, axis=-1).mean(),
        }
        return state.replace(extra={**state.extra, "window": window}), metrics

    def _restart(self, state: TrainState, counts, targets, key) -> tuple[TrainState, jax.Array]:
        """Counts the codes of this step, and every `restart_every` steps moves those hardly used."""
        cfg, extra = self.cfg, dict(state.extra)
        hits = cfg.hits_decay * extra["code_hits"] + (1 - cfg.hits_decay) * counts
        dead = dead_codes(hits, cfg.dead_threshold)
        if not cfg.restart_every:
            return state.replace(extra={**extra, "code_hits": hits}), dead.sum()
        due = (state.step % cfg.restart_every == 0) & (state.step <= cfg.restart_until_fraction * self.steps)
        moved = dead & due
        # A moved code starts with an even share of the hits, so that it has time to be found.
        extra["code_hits"] = jnp.where(moved, hits.sum(1, keepdims=True) / hits.shape[1], hits)
        if cfg.ema_decay:  # and forgets what it was the mean of
            extra["code_uses"] = jnp.where(moved, 0, extra["code_uses"])
        move = lambda codebook: restart(codebook, moved, targets, self.model.schedule, key)  # noqa: E731
        state = _map_codebook(state, lambda codebook: jax.lax.cond(due, move, lambda c: c, codebook))
        return state.replace(extra=extra), dead.sum()

    def _slide(self, state: TrainState, counts) -> dict:
        """The window with this step counted; after every half of it the older half is dropped."""
        window = state.extra["window"]
        turn = (state.step - 1) % self.half_window == 0  # steps count from 1 here

        def add(halves, more):
            current = jnp.where(turn, 0, halves[0]) + more
            return jnp.stack([current, jnp.where(turn, halves[0], halves[1])])

        return {"counts": add(window["counts"], counts), "images": add(window["images"], self.batch)}


def with_codebook(params: dict, codebook: jax.Array) -> dict:
    """Replace the codebook of a tokenizer's parameters."""
    return {**params, "quantizer": {**params["quantizer"], "codebook": codebook}}


def _map_codebook(state: TrainState, function: Callable) -> TrainState:
    """Apply a function to the codebook, and to its moving average where there is one."""
    apply = lambda params: with_codebook(params, function(params["quantizer"]["codebook"]))  # noqa: E731
    return state.replace(params=apply(state.params), ema=None if state.ema is None else apply(state.ema))
