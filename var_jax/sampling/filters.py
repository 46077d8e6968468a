"""Which codes may be drawn: top-k and top-p."""

import jax
import jax.numpy as jnp


def filter_logits(logits: jax.Array, top_k: int, top_p: float | jax.Array | None) -> jax.Array:
    """Removes unlikely codes: logits under the top_k-th largest, then the tail of probability 1 - top_p.

    From the smallest up, codes are dropped while the cumulative probability of what top-k left is at
    most 1 - top_p; the largest is never dropped.  top-p looks inside the sorted top-k values only, so
    that nothing larger is ever sorted.

    Args:
      logits: float32 [..., V].
      top_k: known at compile time; 0 or at least V keeps all.
      top_p: in (0, 1]; None keeps all.

    Returns:
      float32 [..., V], -inf where removed.
    """
    num_codes = logits.shape[-1]
    k = min(top_k, num_codes) or num_codes
    if k == num_codes and top_p is None:
        return logits
    best, _ = jax.lax.top_k(logits, k)  # sorted, largest first
    if top_p is None:
        threshold = best[..., -1:]
    else:
        tail = jnp.cumsum(jax.nn.softmax(best, axis=-1)[..., ::-1], axis=-1)[..., ::-1]
        keep = (tail > 1 - top_p).at[..., 0].set(True)
        threshold = jnp.min(jnp.where(keep, best, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)
