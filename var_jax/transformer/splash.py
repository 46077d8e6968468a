"""Attention on TPU: JAX's Splash kernel with the block-causal mask of the scales.

Lengths are padded to what the kernel can cut into blocks (680 to 768), inside attention alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from var_jax.partition import on_each_device

LANES = 128  # lengths are padded to a multiple of it
BLOCKS = (512, 384, 256, 128)  # rows of a block, the largest that divides a padded length
OUTPUT = "attention_out"  # name by which a remat policy can keep the output, and a kernel's log-sum-exp


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    mask: np.ndarray | None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention with blocks that no query sees left out; on the mesh that is set, if one is.

    Args:
      q: [B, Lq, N, H].
      k, v: [B, Lk, N, H].
      scale: factor on the dot products.
      mask: bool [Lq, Lk], True where a query sees a key; None where all see all.
      interpret: run without a TPU, slowly.

    Returns:
      [B, Lq, N, H].
    """
    lengths = [-(-x.shape[1] // LANES) * LANES for x in (q, k)]
    seen = np.ones((q.shape[1], k.shape[1]), bool) if mask is None else mask
    padded = np.zeros(lengths, bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    padded[seen.shape[0] :, 0] = True  # rows of padding see something, so that their softmax is finite

    def local(q, k, v):
        heads = lambda x, n: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n - x.shape[1]), (0, 0)))  # noqa: E731
        attention = _kernel(padded, q.shape[2], interpret)
        out = jax.vmap(attention)(heads(q, lengths[0]), heads(k, lengths[1]), heads(v, lengths[1]))
        return out[:, :, : q.shape[1]].swapaxes(1, 2)

    return on_each_device(local, (q * scale).astype(q.dtype), k, v, tensor=2)


def _kernel(mask: np.ndarray, heads: int, interpret: bool):
    """The kernel for one image: [N, Lq, H], [N, Lk, H], [N, Lk, H] -> [N, Lq, H]."""
    rows, columns = (next(block for block in BLOCKS if length % block == 0) for length in mask.shape)
    sizes = kernels.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.NumpyMask(mask)] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=OUTPUT,
        interpret=interpret,
    )
