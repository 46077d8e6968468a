"""Resizing of square maps as two small matrix products with constant matrices.

A resize is linear and separable, so `y = A x A^T` with one matrix A [target, source].  Matrices are
made once in numpy and become constants of the compiled program: no gathers, no scatter in the
backward pass.  They follow PyTorch's `interpolate` in modes `area`, `bicubic` (half-pixel centres,
a = -0.75, no antialias, clamped border) and `bilinear`, which the published code uses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def area_matrix(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: each target cell is the mean of the source cells that it touches."""
    matrix = np.zeros((target, source))
    for i in range(target):
        start, end = i * source // target, -(-(i + 1) * source // target)
        matrix[i, start:end] = 1 / (end - start)
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@functools.cache
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: cubic interpolation between half-pixel centres, border repeated."""
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        index = np.floor(centres).astype(int) + tap
        np.add.at(matrix, (np.arange(target), index.clip(0, source - 1)), _cubic(centres - index))
    return matrix.astype(np.float32)


@functools.cache
def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: linear interpolation between half-pixel centres, border repeated."""
    centres = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    distance = np.abs(centres[:, None] - np.arange(source))
    return np.maximum(1 - distance, 0).astype(np.float32)


def _resize(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.einsum("th,bhwc,uw->btuc", matrix, x, matrix, precision=jax.lax.Precision.HIGHEST)


def area_resize(x: jax.Array, side: int) -> jax.Array:
    """[B, h, h, C] -> [B, side, side, C] by averaging; `x` itself if it has that side."""
    return x if x.shape[1] == side else _resize(x, area_matrix(x.shape[1], side))


def bicubic_resize(x: jax.Array, side: int) -> jax.Array:
    """[B, h, h, C] -> [B, side, side, C] by cubic interpolation; `x` itself if it has that side."""
    return x if x.shape[1] == side else _resize(x, bicubic_matrix(x.shape[1], side))


def bilinear_resize(x: jax.Array, side: int) -> jax.Array:
    """[B, h, h, C] -> [B, side, side, C] by linear interpolation; `x` itself if it has that side."""
    return x if x.shape[1] == side else _resize(x, bilinear_matrix(x.shape[1], side))
