"""Alignment of a next-scale transformer with a frozen copy of itself, so that it samples without guidance.

With r = log p(tokens | label) - log p_reference(tokens | label), summed over all tokens, both methods
minimize

    -log sigmoid(beta r(positive)) - negative_weight log sigmoid(-beta r(negative))

- `cca`, condition contrastive alignment (Chen et al. 2024, arXiv:2410.09347): positives are images with their
  labels, negatives the same images with labels of others.  Divided by max(negative_weight, 1).
- `ddo`, direct discriminative optimization (Zheng et al. 2025, arXiv:2503.01103): positives are images,
  negatives samples of the reference, each with its label.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from var_jax.errors import ConfigError
from var_jax.sharding import replicated
from var_jax.tokenizer.model import fingerprint
from var_jax.training.transformer_task import NextScaleTask, batch_conditions
from var_jax.transformer.model import drop_conditions
from var_jax.transformer.next_scale import NextScale

METHODS = ("cca", "ddo")


def contrastive_losses(
    log_ratios: jax.Array, is_negative: jax.Array, beta: float, negative_weight: float
) -> jax.Array:
    """Compute -log sigmoid(beta r) of positives and -negative_weight log sigmoid(-beta r) of negatives.

    Args:
      log_ratios: r, float32, of any shape.
      is_negative: bool of the same shape.
      beta: factor of r.
      negative_weight: weight of the negatives.

    Returns:
      Losses of the same shape.
    """
    sign = jnp.where(is_negative, -1.0, 1.0)
    weight = jnp.where(is_negative, negative_weight, 1.0)
    return -weight * jax.nn.log_sigmoid(sign * beta * log_ratios)


def check_align(stage: ConfigDict) -> None:
    """Check the section `align` of a config.

    Raises:
      ConfigError: naming the field that is wrong.
    """
    align = stage.align
    if align.method not in METHODS:
        raise ConfigError(f"config.align.method must be one of {', '.join(METHODS)}; got {align.method!r}")
    if align.beta <= 0 or align.negative_weight < 0:
        raise ConfigError(
            "config.align.beta must be positive and config.align.negative_weight at least 0; got "
            f"{align.beta} and {align.negative_weight}"
        )
    if align.method == "ddo" and not (stage.data.tokens and align.samples):
        raise ConfigError(
            "config.align.method=ddo needs two token caches: config.data.tokens, of images, and "
            "config.align.samples, of samples (python -m var_jax.tools.sample_tokens)"
        )


class AlignTask(NextScaleTask):
    """Task that aligns a next-scale transformer with `frozen["reference"]`, what it starts from.

    A step computes two sequences for each image, the positive and the negative, in the transformer and in the
    reference.  Labels are dropped with `model.class_dropout_prob` for the negative of `cca`, too; a negative
    that has no class, or its own class, counts as a positive.
    """

    def __init__(self, stage, *args, **kwargs):
        """Build the task; arguments and errors as for `TransformerTask`."""
        check_align(stage)
        super().__init__(stage, *args, **kwargs)

    @property
    def trained_model(self) -> NextScale:
        """Return the model without label dropout: labels are dropped before they are paired."""
        return self.model.clone(config=dataclasses.replace(self.config, class_dropout_prob=0.0))

    def train_step(self, state, frozen, batch, key):
        pair_key, key = jax.random.split(key)
        pairs = self.make_pairs(frozen, batch, pair_key)
        return self.optimize(state, partial(self.pair_loss, reference=frozen["reference"]), pairs, key)

    def make_pairs(self, frozen: dict, batch: dict, key: jax.Array) -> dict[str, jax.Array]:
        """Return the positive and the negative of every image, so that a device keeps both.

        Args:
          frozen: `Task.frozen`.
          batch: from the loader.
          key: random key of label dropout.

        Returns:
          labels, is_negative, tokens and inputs with leading axes [B, 2].
        """
        labels, null = batch_conditions(batch), self.config.null_condition
        is_dropped = jax.random.bernoulli(key, self.config.class_dropout_prob, labels.shape[:1])
        positive = drop_conditions(self.config, labels, is_dropped)
        sequence = self._tokens(self.training_tokenizer, frozen, batch)
        if self.stage.align.method == "cca":
            other = sequence
            negative = jnp.roll(positive, 1, axis=0)
            differs = lambda other: (negative != other).reshape(len(negative), -1).any(1)
            is_negative = differs(labels) & differs(null)
        else:
            samples = {"tokens": batch["sample_tokens"], "label": batch["sample_label"]}
            if "condition" in batch:
                samples["condition"] = batch["sample_condition"]
            other = self._tokens(self.training_tokenizer, frozen, samples)
            # Samples of all classes are samples of "no class", so that they stay negatives.
            negative = drop_conditions(self.config, batch_conditions(samples), is_dropped)
            is_negative = jnp.ones_like(is_dropped)
        pair = lambda *arrays: jnp.stack(arrays, axis=1)
        tokens, inputs = (pair(*arrays) for arrays in zip(sequence, other, strict=True))
        return {
            "labels": pair(positive, negative),
            "is_negative": pair(jnp.zeros_like(is_negative), is_negative),
            "tokens": tokens,
            "inputs": inputs,
        }

    def pair_loss(self, params: dict, pairs: dict, key: jax.Array, reference: dict):
        """Compute the mean loss of pairs; see `optimize`.

        Args:
          params: parameters of the transformer.
          pairs: from `make_pairs`.
          key: random key of dropout.
          reference: parameters of the reference.

        Returns:
          The loss, and (metrics, ()): the loss, and r averaged over positives and over negatives.
        """
        align, is_negative = self.stage.align, pairs["is_negative"]
        rows = {
            name: pairs[name].reshape(-1, *pairs[name].shape[2:]) for name in ("labels", "tokens", "inputs")
        }
        variables = {"params": self.model.own_layout(params)}
        losses, _ = self.trained_model.apply(
            variables, **rows, train=True, rngs={"dropout": key}, method="losses"
        )
        variables = {"params": self.model.own_layout(reference)}
        reference_losses, _ = self.model.apply(variables, **rows, method="losses")
        log_ratios = (reference_losses - losses).sum(1).reshape(is_negative.shape)
        loss = contrastive_losses(log_ratios, is_negative, align.beta, align.negative_weight).sum(1).mean()
        if align.method == "cca":
            loss /= max(align.negative_weight, 1)
        metrics = {"loss": loss}
        for name, chosen in (("positive", ~is_negative), ("negative", is_negative)):
            total = jnp.sum(log_ratios, where=chosen)
            metrics[f"log_ratio_{name}"] = total / jnp.maximum(chosen.sum(), 1)
        return loss, (metrics, ())

    def frozen_shardings(self, mesh, params):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        return {"tokenizer": replicated(mesh), "reference": shardings}

    def frozen_fingerprints(self):
        return {"reference": fingerprint(self.frozen["reference"])}

    def flops_per_image(self):
        # Two sequences, forward and backward (three forward passes) and forward in the reference.
        return super().flops_per_image() * 8 / 3
