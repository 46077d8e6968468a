"""Parameters as the matrix products and convolutions read them."""

import jax.numpy as jnp

from var_jax.tokenizer.model import Tokenizer

_CAST_ON_USE = ("kernel", "bias", "q_bias", "v_bias")


def in_compute_dtype(params: dict, dtype: jnp.dtype) -> dict:
    """Parameters that every use casts to `dtype`, cast once: half the bytes to read, the same numbers.

    Norms, embeddings (the transformer's of codes among them), the head's bias, codebook and phi are used in
    float32 and stay so.
    """
    is_norm = "scale" in params
    cast = {}
    for name, value in params.items():
        if name == "code_embedding":
            cast[name] = value
        elif name == "head":
            cast[name] = {**value, "kernel": value["kernel"].astype(dtype)}
        elif isinstance(value, dict):
            cast[name] = in_compute_dtype(value, dtype)
        else:
            cast[name] = value.astype(dtype) if name in _CAST_ON_USE and not is_norm else value
    return cast


def tokenizer_in_compute_dtype(params: dict, tokenizer: Tokenizer) -> dict:
    """The same of a tokenizer, whose encoder may have another dtype than its decoder."""
    encoding = {name: params[name] for name in ("encoder", "quant_conv") if name in params}
    return in_compute_dtype(params, tokenizer.dtype) | in_compute_dtype(encoding, tokenizer.dtype_of_encoder)
