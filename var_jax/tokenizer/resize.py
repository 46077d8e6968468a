"""Resizing of square maps as two small matrix products with constant matrices.

A resize is linear and separable, so `y = A x A^T` with one matrix A [target, source].  The matrices are
computed in numpy and become constants of the compiled program: no gather, and no scatter in the backward
pass.  They equal PyTorch's `interpolate`, which the published code uses, in the modes `area`, `bicubic`
(half-pixel centers, a = -0.75, no antialiasing, clamped border) and `bilinear`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


@functools.cache
def area_matrix(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Build the matrix that averages over each target cell the source cells it overlaps."""
    matrix = np.zeros((target, source))
    for i in range(target):
        start, end = i * source // target, -(-(i + 1) * source // target)
        matrix[i, start:end] = 1 / (end - start)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Evaluate Keys' cubic convolution kernel."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@functools.cache
def bicubic_matrix(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Build the matrix of cubic interpolation between half-pixel centers, with the border repeated."""
    centers = (np.arange(target) + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        index = np.floor(centers).astype(int) + tap
        np.add.at(matrix, (np.arange(target), index.clip(0, source - 1)), _cubic(centers - index))
    return matrix.astype(np.float32)


@functools.cache
def bilinear_matrix(source: int, target: int) -> Float32[np.ndarray, "target source"]:
    """Build the matrix of linear interpolation between half-pixel centers, with the border repeated."""
    centers = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    distance = np.abs(centers[:, None] - np.arange(source))
    return np.maximum(1 - distance, 0).astype(np.float32)


def _resize(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.einsum("th,bhwc,uw->btuc", matrix, x, matrix, precision=jax.lax.Precision.HIGHEST)


def area_resize(x: Float[Array, "B h h C"], side: int) -> Float[Array, "B {side} {side} C"]:
    """Resize square maps by averaging; return `x` itself if it has that side."""
    return x if x.shape[1] == side else _resize(x, area_matrix(x.shape[1], side))


def bicubic_resize(x: Float[Array, "B h h C"], side: int) -> Float[Array, "B {side} {side} C"]:
    """Resize square maps by cubic interpolation; return `x` itself if it has that side."""
    return x if x.shape[1] == side else _resize(x, bicubic_matrix(x.shape[1], side))


def bilinear_resize(x: Float[Array, "B h h C"], side: int) -> Float[Array, "B {side} {side} C"]:
    """Resize square maps by linear interpolation; return `x` itself if it has that side."""
    return x if x.shape[1] == side else _resize(x, bilinear_matrix(x.shape[1], side))
