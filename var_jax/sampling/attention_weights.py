"""Attention of one position of a VAR transformer, to look at."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from var_jax.sampling.sampler import Networks
from var_jax.sampling.teacher_forcing import teacher_forcing
from var_jax.transformer.attention import softmax_weights
from var_jax.transformer.condition import Conditions
from var_jax.transformer.layer_params import unstack_layers


@jax.jit
def attention_weights(
    networks: Networks, labels: Conditions, tokens: Int[Array, "B L"], position: Int[Array, ""]
) -> Float32[Array, "B layers heads L"]:
    """Compute how much the query of one position attends to each key, given the true tokens.

    Args:
      networks: tokenizer and next-scale transformer.
      labels: condition of each image.
      tokens: in the tokenizer's layout.
      position: of the query.

    Returns:
      Weights over the keys of every head of every layer; 0 for keys that the query does not see.
    """
    model, params = networks.model, networks.params
    if model.scan_layers:  # a scan would have to stack what the layers keep
        model, params = model.clone(scan_layers=False), unstack_layers(params)
    _, inputs = teacher_forcing(model.config, networks.quantizer, tokens)
    _, kept = model.apply({"params": params}, labels, inputs, mutable=["attention"])
    weights = []
    for layer in range(model.config.depth):
        ((q, k, scale, mask, bias),) = kept["attention"]["blocks"][f"layers_{layer}"]["attention"]["scores"]
        q, mask, bias = (
            None if x is None else _row(x, position, axis) for x, axis in ((q, 1), (mask, 0), (bias, 1))
        )
        weights.append(softmax_weights(q.swapaxes(1, 2), k.swapaxes(1, 2), scale, mask, bias)[:, :, 0])
    return jnp.stack(weights, axis=1)


def _row(x: Array, position: Int[Array, ""], axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), position, 1, axis)
