"""3x3 convolutions: one whose filter gradient is fast on CPUs too, and one of an upsampled feature map.

With many channels, XLA's filter gradient on CPUs falls from 80 to 10 GFLOP/s as batch and image grow (2
cores); nine matrix products of shifted inputs stay at 50.  At fewer channels XLA is faster.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_CHANNELS, MIN_POSITIONS = 128, 2**14 + 1  # of a CPU's matrix products; positions of the whole batch


def conv_general_dilated(
    x: Float[Array, "B h w c"],
    kernel: Float[Array, "3 3 c c2"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options,
) -> Float[Array, "B h2 w2 c2"]:
    """Compute `jax.lax.conv_general_dilated`; the gradient of a large 3x3 kernel by matrix products on CPUs.

    Args:
      x: feature map.
      kernel: the filters.
      window_strides: see JAX, as `padding` and `options`.
      padding: see JAX.
      **options: of the original, channels last.
    """
    convolve = partial(
        jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    positions = x.shape[0] * x.shape[1] * x.shape[2]
    if padding != "SAME" or set(window_strides) != {1} or kernel.shape[:2] != (3, 3):
        return convolve(x, kernel)
    if min(kernel.shape[2:]) < MIN_CHANNELS or positions < MIN_POSITIONS:
        return convolve(x, kernel)

    @jax.custom_vjp
    def convolution(x, kernel):
        return convolve(x, kernel)

    def backward(saved, gradient):
        x, kernel = saved
        (x_gradient,) = jax.vjp(lambda x: convolve(x, kernel), x)[1](gradient)
        plain = lambda x, gradient: jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](gradient)[0]
        products = partial(_filter_gradient, precision=options.get("precision"))
        return x_gradient, jax.lax.platform_dependent(x, gradient, cpu=products, default=plain)

    convolution.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), backward)
    return convolution(x, kernel)


def _filter_gradient(
    x: Float[Array, "B h w c"], gradient: Float[Array, "B h w c2"], precision
) -> Float[Array, "3 3 c c2"]:
    """Compute the gradient of the filters: each tap is a product of the shifted input and the gradient."""
    _, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = gradient.reshape(-1, gradient.shape[-1])
    tap = lambda i, j: jnp.dot(padded[:, i : i + h, j : j + w].reshape(-1, c).T, rows, precision=precision)
    return jnp.stack([jnp.stack([tap(i, j) for j in range(3)]) for i in range(3)])


def upsampled_conv(
    x: Float[Array, "B h w c"], kernel: Float[Array, "3 3 c c2"], *args, **options
) -> Float[Array, "B 2*h 2*w c2"]:
    """Upsample a feature map to twice its side (nearest neighbor), and convolve it with zero padding.

    In 16 bits on an NVIDIA GPU, this is one transposed convolution, of 4/9 of the products.

    Args:
      x: feature map.
      kernel: the filters.
      *args: strides of 1 and padding SAME.
      **options: of `jax.lax.conv_general_dilated`, channels last.
    """
    repeat = lambda x: x.repeat(2, axis=1).repeat(2, axis=2)
    by_repeating = lambda x, kernel: conv_general_dilated(repeat(x), kernel, *args, **options)
    if x.dtype.itemsize > 2:
        return by_repeating(x, kernel)
    transposed = partial(transposed_conv, precision=options["precision"])
    return jax.lax.platform_dependent(x, kernel, cuda=transposed, default=by_repeating)


def transposed_conv(
    x: Float[Array, "B h w c"], kernel: Float[Array, "3 3 c c2"], precision
) -> Float[Array, "B 2*h 2*w c2"]:
    """Compute `upsampled_conv` by a transposed convolution; its 4x4 filters are sums of shifted ones."""
    shifts = [(i, 1 - i) for i in (0, 1)]
    # XLA takes cuDNN's kernel for transposed convolutions where it sees that the filters are reversed.
    wide = kernel[::-1, ::-1].astype(jnp.float32)
    wide = sum(jnp.pad(wide, (rows, columns, (0, 0), (0, 0))) for rows in shifts for columns in shifts)
    return jax.lax.conv_general_dilated(
        x,
        jax.lax.rev(wide.astype(kernel.dtype), (0, 1)),
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
