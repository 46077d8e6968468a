"""What a block keeps from the forward to the backward pass: named policies of rematerialisation.

Bytes kept for each token and block with 16-bit matrix products (D width, N heads, L keys), as `jax.vjp`
shows; the residual stream between the blocks (4 D, float32) is always kept:

| policy | keeps besides | bytes in all | worked out again |
| --- | --- | --- | --- |
| `none` | everything | 107 D | nothing |
| `mlp` | qkv, attention, first layer of the MLP | 20 D | norms, gelu, and what is small |
| `flat_qkv` | qkv (3 D), attention (D) | 12 D | norms, first layer of the MLP |
| `full` | nothing | 4 D | everything |

With a kernel, the policies that keep the attention keep the log-sum-exp of its rows too, 4 N bytes; without
one, `none` keeps the scores, 8 N L bytes.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from var_jax.transformer.attention import ATTENTION_OUT
from var_jax.transformer.config import TransformerConfig

# Policy -> names (`checkpoint_name`) that are kept; from the largest to the smallest.
SAVED_NAMES = {
    "none": None,
    "mlp": ("qkv", ATTENTION_OUT, "fc1"),
    "flat_qkv": ("qkv", ATTENTION_OUT),
    "full": (),
}
# Platform -> policies that `auto` tries, fastest first.  Measured on an H200 (d16, batch 64, layers scanned;
# docs/performance.md): mlp 199 ms, flat_qkv 202, none 229, since it writes and reads all it keeps through
# stacked buffers; where mlp does not fit, none does not either.  Elsewhere, by what is computed twice.
FASTEST_FIRST = {"gpu": ("mlp", "flat_qkv", "full"), "tpu": tuple(SAVED_NAMES), "cpu": tuple(SAVED_NAMES)}
WITH_SCORES = ("einsum", "grouped")  # attention that has them in memory
CUDNN_FORWARD = "dot_product_attention_fwd"  # primitive of cuDNN's kernel, which names nothing


def rematerialized(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """A block that keeps for its backward pass only what the policy names."""
    if policy == "none":
        return block
    return nn.remat(block, policy=_policy(SAVED_NAMES[policy]), prevent_cse=False)


def _policy(names: tuple[str, ...]) -> Callable:
    named = jax.checkpoint_policies.save_only_these_names(*names)
    if ATTENTION_OUT not in names:
        return named
    return lambda prim, *args, **params: prim.name.startswith(CUDNN_FORWARD) or named(prim, *args, **params)


def saved_activation_bytes(cfg: TransformerConfig, policy: str, itemsize: int, scores: bool) -> int:
    """Bytes that all blocks keep of one image, by the table above; `scores` where attention is no kernel."""
    length, heads = cfg.schedule.length, cfg.num_heads
    named = int({"none": 51.5, "mlp": 8, "flat_qkv": 4, "full": 0}[policy] * itemsize * cfg.width)
    if policy == "none" and scores:
        named += 8 * heads * length
    return cfg.depth * length * (4 * cfg.width + 4 * heads + named)


def choose_remat(
    cfg: TransformerConfig,
    policy: str,
    images: float,
    room: float,
    itemsize: int,
    scores: bool,
    platform: str,
) -> str:
    """Resolve `auto` to the fastest policy on a platform of which `images` fit into `room` bytes.

    Args:
      policy: its name or `auto`.
      images: on one device.
      room: bytes; where no policy fits, `auto` is `full`.
      itemsize, scores: see `saved_activation_bytes`.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: on a policy that does not exist.
    """
    if policy != "auto":
        if policy not in SAVED_NAMES:
            raise ValueError(
                f"transformer.remat must be one of auto, {', '.join(SAVED_NAMES)}; got {policy!r}"
            )
        return policy
    fits = (
        p
        for p in FASTEST_FIRST[platform]
        if images * saved_activation_bytes(cfg, p, itemsize, scores) <= room
    )
    return next(fits, "full")
