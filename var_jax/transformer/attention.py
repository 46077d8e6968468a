"""Attention of the transformer: one function, several implementations that agree.

| name | what it is | where it is meant to run |
| --- | --- | --- |
| `einsum` | all scores in memory, masked | the reference; CPU |
| `grouped` | queries of a group attend to the keys up to its end, so large maps need no mask | anywhere |
| `cudnn` | as grouped, the groups without a mask by cuDNN's fused kernel | NVIDIA GPUs, bfloat16 |
| `splash` | Pallas kernel that skips masked blocks | TPU, bfloat16 |

`auto`, in 16 bits, is `splash` on TPU and, where its head size allows, `cudnn` on GPU; `grouped` on both
otherwise; `einsum` on CPU.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from var_jax.dtypes import product_precision
from var_jax.sharding import shard_map_batch

LANES = 128  # lengths are padded to a multiple of it
BLOCKS = (512, 384, 256, 128)  # rows of a block, the largest that divides a padded length
ATTENTION_OUT = (
    "attention_out"  # name by which a remat policy can keep the output, and a kernel's log-sum-exp
)


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

    return shard_map_batch(local, (q * scale).astype(q.dtype), k, v, tensor=2)


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
        residual_checkpoint_name=ATTENTION_OUT,
        interpret=interpret,
    )


IMPLEMENTATIONS = ("einsum", "grouped", "cudnn", "splash")
CUDNN_HEAD_MULTIPLE, CUDNN_HEAD_MAX = 8, 128  # channels of a head; from Hopper on cuDNN takes 256
MIN_KERNEL_ROWS = 64  # queries that are worth a kernel, or a group of their own
MAX_LOG_TEMPERATURE = math.log(100)


def choose_attention(
    name: str,
    platform: str,
    dtype: jnp.dtype,
    head_dim: int,
    masks: Sequence[np.ndarray] = (),
    bias: bool = False,
) -> str:
    """What `auto` stands for on a platform ("cpu", "gpu", "tpu"); other names are checked against it.

    Args:
      head_dim: channels of a head.
      masks: of the blocks, in turn; bool [L, L].
      bias: whether something is added to the scores.

    Raises:
      ValueError: on a name that is none, or an implementation that cannot run there, or cannot do that.
    """
    able, half = _supported(masks, bias), jnp.dtype(dtype).itemsize == 2
    fits_cudnn = head_dim % CUDNN_HEAD_MULTIPLE == 0 and head_dim <= CUDNN_HEAD_MAX
    if name == "auto":
        kernels = {"tpu": ("splash",) if half else (), "gpu": ("cudnn",) if half and fits_cudnn else ()}
        best = {on: (*kernels[on], "grouped") for on in kernels}
        return next((result for result in best.get(platform, ()) if result in able), "einsum")
    if name not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"transformer.attention must be one of {known}; got {name!r}")
    if name == "splash" and (platform != "tpu" or not half):
        raise ValueError(
            "transformer.attention=splash runs on TPU in bfloat16 (it rounds float32 to that), got "
            f"{jnp.dtype(dtype).name} on {platform}; try auto or grouped"
        )
    if name == "cudnn" and (platform != "gpu" or not half):
        raise ValueError(
            "transformer.attention=cudnn runs on an NVIDIA GPU in bfloat16, got "
            f"{jnp.dtype(dtype).name} on {platform}; try auto or grouped"
        )
    if name == "cudnn" and not fits_cudnn:
        raise ValueError(
            f"transformer.attention=cudnn needs heads of a multiple of {CUDNN_HEAD_MULTIPLE} channels, "
            f"at most {CUDNN_HEAD_MAX}, got {head_dim} (model.width / model.num_heads); try auto or grouped"
        )
    if name not in able:
        raise ValueError(
            f"transformer.attention={name} does not know the mask or the relative positions of this model; "
            f"use {' or '.join(able)}"
        )
    return name


def _supported(masks: Sequence[np.ndarray], bias: bool) -> list[str]:
    """The implementations that know these masks and, where it is needed, a bias."""
    able = ["einsum"]
    ends = all(_sees_up_to_an_end(mask) for mask in masks)
    if len(masks) < 2 and ends:
        able.append("grouped")
    if len(masks) < 2 and not bias:
        able.append("splash")
        if ends and all(any(_needs_no_mask(mask, group) for group in groups(mask.sum(1))) for mask in masks):
            able.append("cudnn")
    return able


def _needs_no_mask(mask: np.ndarray, group: tuple[int, int]) -> bool:
    """Whether all queries of a group see the same keys, so that a kernel needs no mask."""
    ends = mask[slice(*group)].sum(1)
    return group[1] - group[0] >= MIN_KERNEL_ROWS and (ends == ends[0]).all()


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    mask: np.ndarray | jax.Array | None,
    name: str = "auto",
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, softmax in float32.

    Args:
      q: [B, Lq, N, H].
      k, v: [B, Lk, N, H].
      scale: factor on the dot products.
      mask: bool [Lq, Lk], True where a query sees a key; None where all see all.  One that is known only when
        the program runs is for `einsum` alone.
      name: of the implementation; `auto` chooses for the platform that JAX runs on.
      bias: float32 [N, Lq, Lk], added to the scores; for `einsum` and `grouped` alone.

    Returns:
      [B, Lq, N, H].

    Raises:
      ValueError: where an implementation cannot have this mask, or cannot run here.
    """
    traced = isinstance(mask, jax.Array)
    if name == "auto":
        known = () if mask is None or traced else (mask,)
        name = choose_attention(name, jax.default_backend(), q.dtype, q.shape[-1], known, bias is not None)
    if name == "einsum" or traced or (mask is None and q.shape[1] < MIN_KERNEL_ROWS):
        return einsum(q, k, v, scale, mask, bias)
    if name == "splash":
        return splash(q, k, v, scale, mask)
    return grouped(q, k, v, scale, mask, cudnn if name == "cudnn" else einsum, bias)


def einsum(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: np.ndarray | jax.Array | None, bias=None
) -> jax.Array:
    """See `attend`; plain matrix products."""
    # Heads before positions in memory: XLA's CPU matrix products are then two to three times as fast.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    precision = product_precision(q.dtype)
    scores = (
        jnp.einsum("bnqh,bnkh->bnqk", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    )
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bnqk,bnkh->bnqh", shares, v, precision=precision)
    return checkpoint_name(y.swapaxes(1, 2), ATTENTION_OUT)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: None) -> jax.Array:
    """See `attend`; without a mask, in which cuDNN is slow.

    JAX refuses to differentiate it at odd lengths: those are padded by one, and keys of padding not seen.
    """
    assert mask is None

    def local(q, k, v):
        even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
        seen = jnp.full(k.shape[0], k.shape[1], jnp.int32) if k.shape[1] % 2 else None
        out = jax.nn.dot_product_attention(
            even(q), even(k), even(v), scale=scale, key_value_seq_lengths=seen, implementation="cudnn"
        )
        return out[:, : q.shape[1]]

    return shard_map_batch(local, q, k, v, tensor=2)  # XLA would not split the lengths with the images


def key_ends(mask: np.ndarray) -> np.ndarray:
    """The number of keys, from the first on, that each query sees: int [Lq].

    Raises:
      ValueError: where a query sees other keys than those up to some end.
    """
    if not _sees_up_to_an_end(mask):
        raise ValueError(
            "this attention needs a mask by which each query sees the keys up to some end; "
            "use einsum or splash"
        )
    return mask.sum(1)


def _sees_up_to_an_end(mask: np.ndarray) -> bool:
    ends = mask.sum(1)
    return ends.min() >= 1 and np.array_equal(mask, np.arange(mask.shape[1]) < ends[:, None])


def groups(ends: np.ndarray, least: int = MIN_KERNEL_ROWS) -> list[tuple[int, int]]:
    """Cuts queries into runs (start, stop): of at least `least` with one end, or of several ends together.

    A run of several ends, which needs a mask, has at most 4 * `least` queries.
    """
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(ends)]
    result, mixed = [], None
    for start, stop in itertools.pairwise(cuts):
        if stop - start >= least:
            result.append((start, stop))
            mixed = None
        elif mixed is not None and stop - result[mixed][0] <= 4 * least:
            result[mixed] = (result[mixed][0], stop)
        else:
            mixed = len(result)
            result.append((start, stop))
    return result


def grouped(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    mask: np.ndarray | None,
    free: Callable,
    bias: jax.Array | None = None,
) -> jax.Array:
    """See `attend`; group by group, each with the keys that it sees and no others.

    `free` is the attention of groups whose queries all see the same keys, where they are many.

    Raises:
      ValueError: where a query sees other keys than those up to some end.
    """
    ends = np.full(q.shape[1], k.shape[1]) if mask is None else key_ends(mask)
    parts = []
    for start, stop in groups(ends):
        end = int(ends[start:stop].max())
        own = None if (ends[start:stop] == end).all() else np.arange(end) < ends[start:stop, None]
        attention = free if own is None and stop - start >= MIN_KERNEL_ROWS else einsum
        added = {} if bias is None else {"bias": bias[:, start:stop, :end]}
        parts.append(attention(q[:, start:stop], k[:, :end], v[:, :end], scale, own, **added))
    return jnp.concatenate(parts, axis=1)


def normalize_qk(q: jax.Array, k: jax.Array, log_temperature: jax.Array):
    """Unit-length queries and keys; queries times exp(min(log_temperature [N], ln 100))."""
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-24))  # noqa: E731
    temperature = jnp.exp(jnp.minimum(log_temperature, MAX_LOG_TEMPERATURE))
    return unit(q.astype(jnp.float32)) * temperature[:, None], unit(k.astype(jnp.float32))
