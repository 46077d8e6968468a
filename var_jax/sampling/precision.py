"""Parameters as the matrix products and convolutions read them."""

import jax.numpy as jnp

_CAST_ON_USE = ("kernel", "bias", "q_bias", "v_bias")


def in_compute_dtype(params: dict, dtype: jnp.dtype) -> dict:
    """Parameters that every use casts to `dtype`, cast once: half the bytes to read, the same numbers.

    Norms, embeddings, codebook and phi are used in float32 and stay so.
    """
    is_norm = "scale" in params
    cast = {}
    for name, value in params.items():
        if isinstance(value, dict):
            cast[name] = in_compute_dtype(value, dtype)
        else:
            cast[name] = value.astype(dtype) if name in _CAST_ON_USE and not is_norm else value
    return cast
