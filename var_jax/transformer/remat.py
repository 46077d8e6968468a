"""Rematerialization policies of the blocks: the activations saved for the backward pass.

Bytes saved per token and block with 16-bit matrix products (D width, N heads, L keys), as measured with
`jax.vjp`; the residual stream between the blocks (4 D, float32) is always saved:

| policy | also saves | total bytes | recomputes |
| --- | --- | --- | --- |
| `none` | everything | 68 D | what `elementwise.py` always does |
| `mlp` | qkv, attention, first layer of the MLP, both branches | 24 D | norms, GELU, small activations |
| `flat_qkv` | qkv (3 D), attention (D) | 12 D | norms, first layer of the MLP |
| `full` | nothing | 4 D | everything |

For `none` it is the TPU compiler's count, with heads of 64 channels padded to 128; `jax.vjp` counts 44 D.
Cross-attention to the T rows of a condition adds 2 D (`flat_qkv`), 4 D (`mlp`), or 10 D + 8 N T (`none`).
With an attention kernel, the policies that save the attention also save the log-sum-exp of its rows, 4 N
bytes; without one, `none` saves the scores, 8 N L bytes.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from var_jax.transformer.attention import ATTENTION_OUT
from var_jax.transformer.config import TransformerConfig

# Policy -> names (`checkpoint_name`) of the saved activations; from the largest to the smallest.
SAVED_NAMES = {
    "none": None,
    "mlp": ("qkv", ATTENTION_OUT, "fc1", "branch"),
    "flat_qkv": ("qkv", ATTENTION_OUT),
    "full": (),
}
# Policies that `auto` tries with layers scanned on a GPU, fastest first.  Measured on an H200 (d16, batch 64;
# docs/performance.md): mlp 199 ms, flat_qkv 202 ms, and none 229 ms, since it writes and reads everything it
# saves through stacked buffers; none needs more memory than mlp.  Elsewhere, least recomputation first.
SCANNED_ON_GPU = ("mlp", "flat_qkv", "full")
WITH_SCORES = ("einsum", "grouped")  # attention implementations with all scores in memory
CUDNN_FORWARD = "dot_product_attention_fwd"  # primitive of cuDNN's kernel; its output has no checkpoint name


def rematerialized(block: type[nn.Module], policy: str, scanned: bool) -> type[nn.Module]:
    """Wrap a block so that it saves only the activations of the policy for its backward pass.

    Outside a scan, XLA would find the activations of the forward pass equal to the recomputed ones, and save
    them after all.
    """
    if policy == "none":
        return block
    return nn.remat(block, policy=_checkpoint_policy(SAVED_NAMES[policy]), prevent_cse=not scanned)


def _checkpoint_policy(names: tuple[str, ...]) -> Callable:
    """Return a `jax.checkpoint` policy that saves the named activations, and cuDNN's output as attention."""
    named = jax.checkpoint_policies.save_only_these_names(*names)
    if ATTENTION_OUT not in names:
        return named
    return lambda prim, *args, **params: prim.name.startswith(CUDNN_FORWARD) or named(prim, *args, **params)


def saved_activation_bytes(cfg: TransformerConfig, policy: str, itemsize: int, scores: bool) -> int:
    """Estimate the bytes that all blocks save for one image, by the table above.

    Args:
      cfg: the architecture.
      policy: its name.
      itemsize: bytes of a number of the compute dtype.
      scores: whether attention has all scores in memory (WITH_SCORES).
    """
    length, heads = cfg.schedule.length, cfg.num_heads
    saved = int({"none": 32, "mlp": 10, "flat_qkv": 4, "full": 0}[policy] * itemsize * cfg.width)
    if policy == "none" and scores:
        saved += 8 * heads * length
    if cfg.condition != "label":
        saved += {"none": 5, "mlp": 2, "flat_qkv": 1, "full": 0}[policy] * itemsize * cfg.width
        saved += 8 * heads * cfg.condition_length if policy == "none" else 0
    return cfg.depth * length * (4 * cfg.width + 4 * heads + saved)


def recomputed_block_bytes(cfg: TransformerConfig, itemsize: int, scores: bool) -> int:
    """Estimate the bytes of one image's activations in the block whose backward pass runs, 107 D a token."""
    length, heads = cfg.schedule.length, cfg.num_heads
    by_token = int(51.5 * itemsize * cfg.width) + 4 * cfg.width + 4 * heads
    if cfg.condition != "label":
        by_token += 5 * itemsize * cfg.width + 8 * heads * cfg.condition_length
    return length * (by_token + (8 * heads * length if scores else 0))


def choose_remat(
    cfg: TransformerConfig,
    policy: str,
    images: float,
    room: float,
    itemsize: int,
    scores: bool,
    platform: str,
    scan_layers: bool,
) -> str:
    """Resolve `auto` to the fastest policy with which the saved activations fit into memory.

    Args:
      cfg: the architecture.
      policy: name of the policy, or `auto`.
      images: number of images on one device.
      room: bytes for saved activations; if no policy fits, `auto` is `full`.
      itemsize: see `saved_activation_bytes`.
      scores: see `saved_activation_bytes`.
      platform: "cpu", "gpu" or "tpu".
      scan_layers: whether the layers are scanned.

    Raises:
      ValueError: on an unknown policy.
    """
    if policy != "auto":
        if policy not in SAVED_NAMES:
            raise ValueError(
                f"transformer.remat must be one of auto, {', '.join(SAVED_NAMES)}; got {policy!r}"
            )
        return policy
    fits = (
        p
        for p in (SCANNED_ON_GPU if platform == "gpu" and scan_layers else SAVED_NAMES)
        if images * saved_activation_bytes(cfg, p, itemsize, scores) <= room
    )
    return next(fits, "full")
