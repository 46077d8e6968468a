"""Classifier-free guidance (Ho & Salimans 2022), its strength spread over the scales."""

import jax
import numpy as np

from var_jax.scales import Scales


def strengths(guidance: float, schedule: str, scales: Scales) -> np.ndarray:
    """float32 [K]: guidance at each scale.

    Args:
      guidance: strength at the last scale.
      schedule: `ramp`, the published guidance * k / (K - 1), where a single scale gets all of it; or
        `constant`.
    """
    if schedule == "constant" or len(scales) == 1:
        return np.full(len(scales), guidance, np.float32)
    return np.array([guidance * scales.progress(k) for k in range(len(scales))], np.float32)


def guide(logits: jax.Array, strength: jax.Array) -> jax.Array:
    """Logits [2 B, n, V], of each image with and then without class, -> [B, n, V].

    (1 + t) conditional - t unconditional.
    """
    return (1 + strength) * logits[::2] - strength * logits[1::2]
