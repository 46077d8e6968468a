"""Attention of the transformer: one function with several equivalent implementations.

| name | algorithm | platform |
| --- | --- | --- |
| `einsum` | all scores in memory, masked | the reference; all |
| `grouped` | each group of queries attends to the range of keys that it sees; large maps need no mask | all |
| `cudnn` | as `grouped`, with cuDNN's fused kernel for large groups | NVIDIA GPUs, bfloat16 |
| `triton` | Pallas kernels for all groups at once; in generation as `cudnn` | NVIDIA GPUs, bfloat16 |
| `splash` | Pallas kernel that skips masked blocks | TPU, bfloat16 |

With 16-bit dtypes, `auto` is `splash` on TPU and, on GPU, the first of `triton` and `cudnn` that supports the
head size and the mask.  Otherwise it is `grouped` or, for masks that show no range of keys, `einsum`.
`triton` needs ranges from the first key on, prefixes: block-causal masks have them, block-diagonal ones not.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from var_jax.dtypes import product_precision
from var_jax.sharding import shard_map_batch
from var_jax.transformer.elementwise import normalize_heads

LANES = 128  # lengths are padded to a multiple of this
BLOCKS = (512, 384, 256, 128)  # block sizes, of which the largest that divides a padded length is used
ATTENTION_OUT = "attention_out"  # checkpoint name of the output, and of a kernel's log-sum-exp


def splash(
    q: Float[Array, "B Lq N H"],
    k: Float[Array, "B Lk N H"],
    v: Float[Array, "B Lk N H"],
    scale: float,
    mask: Bool[np.ndarray, "Lq Lk"] | None,
    interpret: bool = False,
) -> Float[Array, "B Lq N H"]:
    """Compute attention with the Pallas TPU kernel, which skips masked blocks; see `attend`.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor on the dot products.
      mask: True where a query sees a key; None for no mask.
      interpret: run in the interpreter, slowly, on other platforms than TPU.
    """
    lengths = [-(-x.shape[1] // LANES) * LANES for x in (q, k)]
    mask = np.ones((q.shape[1], k.shape[1]), bool) if mask is None else mask
    padded = np.zeros(lengths, bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    padded[mask.shape[0] :, 0] = True  # a padded query sees one key, so that its softmax is finite

    def local(q, k, v):
        heads = lambda x, n: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n - x.shape[1]), (0, 0)))
        attention = _splash_kernel(padded, q.shape[2], interpret)
        out = jax.vmap(attention)(heads(q, lengths[0]), heads(k, lengths[1]), heads(v, lengths[1]))
        return out[:, :, : q.shape[1]].swapaxes(1, 2)

    return shard_map_batch(local, (q * scale).astype(q.dtype), k, v, tensor_axis=2)


def _splash_kernel(mask: np.ndarray, heads: int, interpret: bool):
    """Build the kernel for one image, a function of [N, Lq, H], [N, Lk, H], [N, Lk, H] to [N, Lq, H]."""
    # Imported here: Pallas takes a sixth of the time of `import var_jax`.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

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
        splash_masks.MultiHeadMask([splash_masks.NumpyMask(mask)] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION_OUT,
        interpret=interpret,
    )


IMPLEMENTATIONS = ("einsum", "grouped", "cudnn", "triton", "splash")
GPU_KERNELS = ("cudnn", "triton")
CUDNN_HEAD_MULTIPLE, CUDNN_HEAD_MAX = 8, 128  # limits on the head size; cuDNN accepts 256 from Hopper on
TRITON_HEADS = (16, 32, 64, 128)
MIN_CUDNN_QUERIES = 4  # in generation; the first map has one token, which sees itself alone
MIN_KERNEL_ROWS = 64  # smallest number of queries for which a kernel, or a separate group, pays off
MAX_LOG_TEMPERATURE = math.log(100)


def choose_attention(
    name: str,
    platform: str,
    dtype: DTypeLike,
    head_dim: int,
    masks: Sequence[Bool[np.ndarray, "L L"]] = (),
    bias: bool = False,
) -> str:
    """Resolve `auto` to an attention implementation; check other names.

    Args:
      name: of the implementation, or `auto`.
      platform: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values.
      head_dim: channels of a head.
      masks: the masks that the blocks use in turn.
      bias: whether there is a bias on the scores.

    Raises:
      ValueError: on an unknown name, or an implementation that does not support the platform, the dtype, the
        head size, the masks or the bias.
    """
    supported = _supported(masks, bias)
    half = jnp.dtype(dtype).itemsize == 2
    fits_cudnn = head_dim % CUDNN_HEAD_MULTIPLE == 0 and head_dim <= CUDNN_HEAD_MAX
    if name == "auto":
        on_gpu = ("triton",) * (head_dim in TRITON_HEADS) + ("cudnn",) * fits_cudnn
        kernels = {"tpu": ("splash",), "gpu": on_gpu}.get(platform, ()) if half else ()
        candidates = (*kernels, "grouped")
        return next((candidate for candidate in candidates if candidate in supported), "einsum")
    if name not in IMPLEMENTATIONS:
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"transformer.attention must be one of {known}; got {name!r}")
    if name == "splash" and (platform != "tpu" or not half):
        raise ValueError(
            "transformer.attention=splash runs on TPU in bfloat16 (it would round float32 to it), got "
            f"{jnp.dtype(dtype).name} on {platform}; try auto or grouped"
        )
    if name in GPU_KERNELS and (platform != "gpu" or not half):
        raise ValueError(
            f"transformer.attention={name} runs on an NVIDIA GPU in bfloat16, got "
            f"{jnp.dtype(dtype).name} on {platform}; try auto or grouped"
        )
    if name == "cudnn" and not fits_cudnn:
        raise ValueError(
            f"transformer.attention=cudnn needs heads of a multiple of {CUDNN_HEAD_MULTIPLE} channels, "
            f"at most {CUDNN_HEAD_MAX}, got {head_dim} (model.width / model.num_heads); try auto or grouped"
        )
    if name == "triton" and head_dim not in TRITON_HEADS:
        raise ValueError(
            f"transformer.attention=triton needs heads of {', '.join(map(str, TRITON_HEADS))} channels, got "
            f"{head_dim} (model.width / model.num_heads); try auto or grouped"
        )
    if name not in supported:
        raise ValueError(
            f"transformer.attention={name} does not support the mask or the relative positions of this "
            f"model; use {' or '.join(supported)}"
        )
    return name


def _supported(masks: Sequence[np.ndarray], bias: bool) -> list[str]:
    """List the implementations that support these masks and, if there is one, a bias."""
    supported = ["einsum"]
    ranges = all(_is_range_mask(mask) for mask in masks)
    if len(masks) < 2 and ranges:
        supported.append("grouped")
    if len(masks) < 2 and not bias:
        supported.append("splash")
        if ranges and all(mask[:, 0].all() for mask in masks):
            supported.append("triton")
        if ranges and all(
            any(_needs_no_mask(mask, group) for group in groups(key_ranges(mask))) for mask in masks
        ):
            supported.append("cudnn")
    return supported


def _needs_no_mask(mask: np.ndarray, group: tuple[int, int]) -> bool:
    """Check whether a group is large enough for a kernel, and its queries all see the same keys."""
    rows = mask[slice(*group)]
    return len(rows) >= MIN_KERNEL_ROWS and (rows == rows[0]).all()


def attend(
    q: Float[Array, "B Lq N H"],
    k: Float[Array, "B Lk N H"],
    v: Float[Array, "B Lk N H"],
    scale: float,
    mask: Bool[np.ndarray | Array, "Lq Lk"] | None,
    name: str = "auto",
    bias: Float32[Array, "N Lq Lk"] | None = None,
    num_keys: int | None = None,
) -> Float[Array, "B Lq N H"]:
    """Compute multi-head attention with the softmax in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor on the dot products.
      mask: True where a query sees a key; None for no mask.  A traced mask is always computed by `einsum`.
      name: of the implementation; `auto` chooses one for the current platform.
      bias: added to the scores, [N, Lq, num_keys]; supported by `einsum` and `grouped`.
      num_keys: in generation, the number of keys that exist, the first ones; None for all.

    Raises:
      ValueError: if the implementation does not support this mask or this platform.
    """
    traced = isinstance(mask, jax.Array)
    if name == "auto":
        static_masks = () if mask is None or traced else (mask,)
        platform = jax.default_backend()
        name = choose_attention(name, platform, q.dtype, q.shape[-1], static_masks, bias is not None)
    if name == "triton":
        if mask is not None and not traced:
            from var_jax.transformer.prefix_attention import prefix_attention  # imported here: Pallas

            kernel = partial(prefix_attention, scale=scale, ends=key_ends(mask), name=ATTENTION_OUT)
            return shard_map_batch(kernel, q, k, v, tensor_axis=2)
        name = "cudnn"  # in generation
    if name == "cudnn" and num_keys is not None and q.shape[1] >= MIN_CUDNN_QUERIES:
        return cudnn(q, k, v, scale, None, num_keys)
    if num_keys is not None:
        k, v = k[:, :num_keys], v[:, :num_keys]
    if name == "einsum" or traced or (mask is None and q.shape[1] < MIN_KERNEL_ROWS):
        return einsum(q, k, v, scale, mask, bias)
    if name == "splash":
        return splash(q, k, v, scale, mask)
    return grouped(q, k, v, scale, mask, cudnn if name == "cudnn" else einsum, bias)


def einsum(
    q: Float[Array, "B Lq N H"],
    k: Float[Array, "B Lk N H"],
    v: Float[Array, "B Lk N H"],
    scale: float,
    mask: Bool[np.ndarray | Array, "Lq Lk"] | Bool[Array, "B 1 1 Lk"] | None,
    bias: Float32[Array, "N Lq Lk"] | None = None,
) -> Float[Array, "B Lq N H"]:
    """Compute attention with plain matrix products and all scores in memory; see `attend`.

    The mask may be one of the keys of each image, too.
    """
    # With heads before positions in memory, XLA's CPU matrix products are two to three times as fast.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    weights = softmax_weights(q, k, scale, mask, bias).astype(v.dtype)
    y = jnp.einsum("bnqk,bnkh->bnqh", weights, v, precision=product_precision(q.dtype))
    return checkpoint_name(y.swapaxes(1, 2), ATTENTION_OUT)


def softmax_weights(
    q: Float[Array, "B N Lq H"],
    k: Float[Array, "B N Lk H"],
    scale: float,
    mask: Bool[np.ndarray | Array, "Lq Lk"] | Bool[Array, "B 1 1 Lk"] | None,
    bias: Float32[Array, "N Lq Lk"] | None = None,
) -> Float32[Array, "B N Lq Lk"]:
    """Compute the weights of attention, with heads before positions; arguments otherwise as for `einsum`."""
    precision = product_precision(q.dtype)
    scores = (
        jnp.einsum("bnqh,bnkh->bnqk", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    )
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def cudnn(
    q: Float[Array, "B Lq N H"],
    k: Float[Array, "B Lk N H"],
    v: Float[Array, "B Lk N H"],
    scale: float,
    mask: Bool[np.ndarray, "Lq Lk"] | None,
    num_keys: int | None = None,
) -> Float[Array, "B Lq N H"]:
    """Compute attention with cuDNN's kernel; see `attend`.  A mask slows it, except for few positions.

    JAX refuses to differentiate the kernel at odd lengths, so in training these are padded by one.  In
    generation the kernel reads the first `num_keys` keys of a cache in place.
    """
    attention = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")

    def local(q, k, v):
        if num_keys is not None:
            return attention(q, k, v, key_value_seq_lengths=jnp.full(k.shape[0], num_keys, jnp.int32))
        even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
        options = {}
        if mask is not None:
            # The padded query sees the first key, so that its softmax is finite.
            seen = np.pad(mask, [(0, size % 2) for size in mask.shape])
            seen[mask.shape[0] :, 0] = True
            options["mask"] = seen[None, None]
        elif k.shape[1] % 2:
            options["key_value_seq_lengths"] = jnp.full(k.shape[0], k.shape[1], jnp.int32)
        return attention(even(q), even(k), even(v), **options)[:, : q.shape[1]]

    # XLA would not shard the key lengths with the images.
    return shard_map_batch(local, q, k, v, tensor_axis=2)


def key_ends(mask: Bool[np.ndarray, "Lq Lk"]) -> Int[np.ndarray, " Lq"]:
    """Compute the number of keys that each query sees, for a mask that shows each a prefix of the keys.

    Raises:
      ValueError: if a query sees keys that are not a prefix.
    """
    ranges = key_ranges(mask)
    if ranges[:, 0].any():
        raise ValueError(
            "this attention needs a mask that shows each query a prefix of the keys; use einsum or splash"
        )
    return ranges[:, 1]


def key_ranges(mask: Bool[np.ndarray, "Lq Lk"]) -> Int[np.ndarray, "Lq 2"]:
    """Compute the range first .. end of the keys that each query sees.

    Raises:
      ValueError: if a query sees keys that are not a range.
    """
    if not _is_range_mask(mask):
        raise ValueError(
            "this attention needs a mask that shows each query a range of the keys; use einsum or splash"
        )
    return _key_ranges(mask)


def _is_range_mask(mask: np.ndarray) -> bool:
    """Check whether each query sees the keys from some first one up to some end."""
    keys, (first, end) = np.arange(mask.shape[1]), _key_ranges(mask).T[..., None]
    return bool(mask.any(1).all()) and np.array_equal(mask, (first <= keys) & (keys < end))


def _key_ranges(mask: np.ndarray) -> np.ndarray:
    first = mask.argmax(1)
    return np.stack([first, first + mask.sum(1)], axis=1)


def groups(keys: Int[np.ndarray, "Lq ..."], min_size: int = MIN_KERNEL_ROWS) -> list[tuple[int, int]]:
    """Partition queries into contiguous groups (start, stop) by the keys they see.

    Runs of at least `min_size` queries that see the same keys become a group of their own; shorter runs are
    merged into groups of at most 4 * `min_size` queries, which need a mask.

    Args:
      keys: what each query sees, from `key_ends` or `key_ranges`.
      min_size: see above.
    """
    changes = np.diff(keys.reshape(len(keys), -1), axis=0).any(axis=1)
    cuts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(keys)]
    result, mixed = [], None  # `mixed`: index of the group that shorter runs are merged into
    for start, stop in itertools.pairwise(cuts):
        if stop - start >= min_size:
            result.append((start, stop))
            mixed = None
        elif mixed is not None and stop - result[mixed][0] <= 4 * min_size:
            result[mixed] = (result[mixed][0], stop)
        else:
            mixed = len(result)
            result.append((start, stop))
    return result


def grouped(
    q: Float[Array, "B Lq N H"],
    k: Float[Array, "B Lk N H"],
    v: Float[Array, "B Lk N H"],
    scale: float,
    mask: Bool[np.ndarray, "Lq Lk"] | None,
    large_fn: Callable,
    bias: Float32[Array, "N Lq Lk"] | None = None,
) -> Float[Array, "B Lq N H"]:
    """Compute attention group by group, each over the range of the keys that it sees; see `attend`.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor on the dot products.
      mask: shows each query a range of the keys; None for no mask.
      large_fn: attention of groups of at least MIN_KERNEL_ROWS queries.
      bias: added to the scores.

    Raises:
      ValueError: if a query sees keys that are not a range.
    """
    mask = np.ones((q.shape[1], k.shape[1]), bool) if mask is None else mask
    ranges = key_ranges(mask)
    cuts = groups(ranges)
    bounds = [(int(ranges[slice(*cut), 0].min()), int(ranges[slice(*cut), 1].max())) for cut in cuts]
    # The gradient of a split is a concatenation, in place of a sum of arrays padded to all keys.
    segments = sorted({0, k.shape[1]}.union(*bounds))
    keys, values = (jax.lax.split(x, np.diff(segments).tolist(), axis=1) for x in (k, v))
    queries = jax.lax.split(q, [stop - start for start, stop in cuts], axis=1)
    parts = []
    for part, (start, stop), (first, end) in zip(queries, cuts, bounds, strict=True):
        seen = slice(segments.index(first), segments.index(end))
        group_k, group_v = (jnp.concatenate(x[seen], axis=1) for x in (keys, values))
        group_mask = mask[start:stop, first:end]
        group_mask = None if group_mask.all() else group_mask
        attention = large_fn if stop - start >= MIN_KERNEL_ROWS else einsum
        group_bias = {} if bias is None else {"bias": bias[:, start:stop, first:end]}
        parts.append(attention(part, group_k, group_v, scale, group_mask, **group_bias))
    return jnp.concatenate(parts, axis=1)


def normalize_qk(
    q: Float[Array, "B n N H"], k: Float[Array, "B n N H"], log_temperature: Float[Array, " N"]
) -> tuple[Float32[Array, "B n N H"], Float32[Array, "B n N H"]]:
    """Normalize queries and keys to length 1, and multiply queries by exp(min(log_temperature, ln 100))."""
    temperature = jnp.exp(jnp.minimum(log_temperature, MAX_LOG_TEMPERATURE))
    return normalize_heads(q, temperature), normalize_heads(k, jnp.ones_like(temperature))
