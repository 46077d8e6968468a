"""Classifier-free guidance (Ho & Salimans 2022) with the published ramp over the scales."""

import jax
import numpy as np

from var_jax.scales import Scales


def ramp(guidance: float, scales: Scales) -> np.ndarray:
    """float32 [K]: strength guidance * k / (K - 1) at scale k; a single scale gets all of it."""
    if len(scales) == 1:
        return np.full(1, guidance, np.float32)
    return np.array([guidance * scales.progress(k) for k in range(len(scales))], np.float32)


def guide(logits: jax.Array, strength: jax.Array) -> jax.Array:
    """Logits [2 B, n, V], conditional first, -> [B, n, V]: (1 + t) conditional - t unconditional."""
    conditional, unconditional = logits[: len(logits) // 2], logits[len(logits) // 2 :]
    return (1 + strength) * conditional - strength * unconditional
