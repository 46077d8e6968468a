"""Precision of matrix products and convolutions."""

import jax.numpy as jnp
from jax.typing import DTypeLike

PRECISIONS = ("default", "high", "highest")


def product_precision(dtype: DTypeLike) -> str:
    """Choose the `jax.lax.Precision` at which products of a dtype have the same value on every platform.

    By default JAX rounds float32 operands: to TF32 on a GPU, to bfloat16 on a TPU; `highest` does not round.
    16-bit operands are used as they are on every platform.
    """
    return "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
