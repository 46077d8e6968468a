"""Casts of parameters to the compute dtype, done once before sampling."""

from jax.typing import DTypeLike

from var_jax.tokenizer.model import Tokenizer

_CAST_NAMES = ("kernel", "bias", "q_bias", "v_bias")


def in_compute_dtype(params: dict, dtype: DTypeLike) -> dict:
    """Cast the parameters that every use casts to `dtype` anyway: half the bytes to read, the same numbers.

    Norms, embeddings (the transformer's code embedding included), the head's bias, codebook and phi are used
    in float32 and stay float32.
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
            cast[name] = value.astype(dtype) if name in _CAST_NAMES and not is_norm else value
    return cast


def tokenizer_in_compute_dtype(params: dict, tokenizer: Tokenizer) -> dict:
    """Cast a tokenizer's parameters like `in_compute_dtype`; the encoder may have a dtype of its own."""
    encoder_params = {name: params[name] for name in ("encoder", "quant_conv") if name in params}
    return in_compute_dtype(params, tokenizer.dtype) | in_compute_dtype(
        encoder_params, tokenizer.dtype_of_encoder
    )
