"""Head of the transformer: logits in float32, with operands of the compute dtype."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from var_jax.dtypes import product_precision


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply x [B, n, D] by a kernel [D, V], accumulating and returning float32.

    In the backward pass the gradient of the logits is rounded to the dtype of x and kernel, since a product
    of float32 and bfloat16 would run in float32.
    """
    return _product(x, kernel, preferred_element_type=jnp.float32)


def _project_forward(x, kernel):
    return _project(x, kernel), (x, kernel)


def _project_backward(factors, gradient):
    x, kernel = factors
    gradient = gradient.astype(x.dtype)
    (x_gradient,) = jax.linear_transpose(lambda x: _product(x, kernel), x)(gradient)
    (kernel_gradient,) = jax.linear_transpose(lambda kernel: _product(x, kernel), kernel)(gradient)
    return x_gradient, kernel_gradient


_project.defvjp(_project_forward, _project_backward)


def _product(x, kernel, **options):
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, precision=product_precision(x.dtype), **options)


class Head(nn.Module):
    """Linear layer from D channels to V logits, with operands of `dtype` and float32 results."""

    num_codes: int
    kernel_init: Callable
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B n D"]) -> Float32[Array, "B n V"]:
        kernel_init = nn.with_logical_partitioning(self.kernel_init, ("embed", "codes"))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("codes",))
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.num_codes))
        bias = self.param("bias", bias_init, (self.num_codes,))
        return _project(x.astype(self.dtype), kernel.astype(self.dtype)) + bias
