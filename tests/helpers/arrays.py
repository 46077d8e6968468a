"""Golden arrays and comparisons that many tests share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

GOLDEN_SCALES = (1, 2, 3, 4)
TRANSFORMERS = ("var", "var_shared_adaln", "var_plain_attention")


def all_tokens(arrays: dict, prefix: str = "tokens") -> np.ndarray:
    """Concatenate the golden token maps to one sequence [B, L]."""
    return np.concatenate([arrays[f"{prefix}_{k}"] for k in range(len(GOLDEN_SCALES))], axis=1)


def close(got, want, tolerance: float = 1e-4) -> None:
    """Assert equality within `tolerance` times the largest magnitude."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    worst = np.abs(got - want).max() / np.abs(want).max()
    assert worst <= tolerance, f"off by {worst:.2e} of the largest magnitude"


def randomized(params: dict, seed: int = 0) -> dict:
    """Draw random parameters of a scale at which every part of a network affects its output."""
    leaves, tree = jax.tree.flatten(nn.meta.unbox(params))
    rng = np.random.default_rng(seed)
    scaled = lambda leaf: rng.standard_normal(leaf.shape) / np.sqrt(max(leaf.shape[-1], 4))
    return jax.tree.unflatten(tree, [jnp.asarray(scaled(leaf), jnp.float32) for leaf in leaves])
