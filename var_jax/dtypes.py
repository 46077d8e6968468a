"""Precision of matrix products and convolutions."""

import jax.numpy as jnp

PRECISIONS = ("default", "high", "highest")


def product_precision(dtype: jnp.dtype) -> str:
    """Precision at which products of this dtype have the same value on every platform: `jax.lax.Precision`'s.

    In float32 JAX rounds the operands by default, to TF32 on a GPU and to bfloat16 on a TPU; `highest` rounds
    nothing.  Operands of 16 bits are taken as they are everywhere.
    """
    return "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
