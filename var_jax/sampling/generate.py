"""Generation: labels to images in one compiled program.

The scales are unrolled, the cache of keys and values has its full size from the start and each scale
attends to a static prefix of it; all that depends on the label alone is computed once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.sampling.filters import filter_logits
from var_jax.sampling.guidance import guide, ramp
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.next_scale import NextScale


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw; the defaults are those of the published FID protocol.

    Attributes:
      guidance: strength at the last scale, rising linearly from 0 at the first; 0 for none.
      top_k: draw among this many of the likeliest codes; 0 for all.
      top_p: draw among the likeliest codes that hold this probability; 0 for all.
      smooth: mix codes instead of drawing one (for looking at, not for FID).

    Raises:
      ValueError: naming the option that is out of range.
    """

    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False

    def __post_init__(self):
        if not np.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, found {self.guidance}")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be a whole number, 0 (all codes) or more, found {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be in [0, 1], 0 for all codes, found {self.top_p}")


def image_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """Random keys [B]: image i depends on (seed, i) alone, whatever batch it is made in."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices, jnp.uint32))


def _noise(keys: jax.Array, fold: int, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise [B, *shape], of every image from its own key."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, fold), shape))(keys)


def smooth_codes(logits: jax.Array, noise: jax.Array, codes: jax.Array, progress: float) -> jax.Array:
    """Gumbel-softmax mixtures of codes, sharper from scale to scale -> [B, n, C]."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return jax.nn.softmax(((1 + progress) * logits + noise) / temperature, axis=-1) @ codes


@partial(jax.jit, static_argnames=("tokenizer", "model", "guided", "top_k", "smooth"))
def generate(
    tokenizer: Tokenizer,
    model: NextScale,
    tokenizer_params: dict,
    params: dict,
    labels: jax.Array,
    keys: jax.Array,
    strengths: jax.Array,
    top_p: jax.Array,
    *,
    guided: bool,
    top_k: int,
    smooth: bool,
) -> tuple[jax.Array, jax.Array]:
    """Draws one image a label.

    Args:
      tokenizer, model: the networks; hashable, so part of the program.
      tokenizer_params, params: their parameters.
      labels: int32 [B].
      keys: random keys [B] (`image_keys`).
      strengths: float32 [K], guidance at each scale; used where `guided`.
      top_p: scalar.
      guided: whether the unconditional half is computed at all.
      top_k, smooth: as in `SamplingOptions`.

    Returns:
      Images float32 [B, H, W, 3] in [-1, 1] and tokens int32 [B, L].
    """
    apply = partial(model.apply, {"params": params})
    quantizer = Quantizer.create(tokenizer_params["quantizer"], tokenizer.config)
    scales, batch = quantizer.scales, labels.shape[0]
    twice = (lambda x: jnp.concatenate([x, x])) if guided else (lambda x: x)
    if guided:
        labels = jnp.concatenate([labels, jnp.full_like(labels, model.config.num_classes)])
    condition = apply(labels, method="condition")
    cache = apply(labels.shape[0], method="empty_cache")
    f_hat = jnp.zeros((batch, scales.side, scales.side, tokenizer.config.code_dim))
    tokens = []
    for k, side in enumerate(scales.sides):
        inputs = None if k == 0 else twice(quantizer.next_input(k, f_hat))
        logits, cache = apply(k, inputs, condition, cache, method="step")
        logits = guide(logits, strengths[k]) if guided else logits
        logits = filter_logits(logits, top_k, top_p)
        noise = _noise(keys, k, (side * side, logits.shape[-1]))
        if smooth:
            codes = smooth_codes(logits, noise, quantizer.codes, scales.progress(k))
            token_map = quantizer.nearest(codes)
        else:
            token_map = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
            codes = quantizer.codes[token_map]
        f_hat = f_hat + quantizer.contribution(k, codes)
        tokens.append(token_map)
    images = tokenizer.apply({"params": tokenizer_params}, f_hat, method="decode_features")
    return images, jnp.concatenate(tokens, axis=1)


@partial(jax.jit, static_argnames=("tokenizer", "model"))
def teacher_forced_logits(
    tokenizer: Tokenizer,
    model: NextScale,
    tokenizer_params: dict,
    params: dict,
    labels: jax.Array,
    tokens: jax.Array,
) -> jax.Array:
    """Logits float32 [B, L, V] of tokens int32 [B, L], each map given the true coarser ones."""
    quantizer = Quantizer.create(tokenizer_params["quantizer"], tokenizer.config)
    inputs = quantizer.teacher_input(quantizer.partial_sums(tokens))
    return model.apply({"params": params}, labels, inputs)


def generate_in_chunks(
    tokenizer: Tokenizer,
    model: NextScale,
    tokenizer_params: dict,
    params: dict,
    labels: np.ndarray,
    seed: int,
    options: SamplingOptions,
    chunk: int,
    place: Callable = jnp.asarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of many labels, `chunk` at a time; the last chunk is filled up, so nothing is compiled twice.

    Args:
      labels: int [N].
      seed: image i depends on (seed, i) alone.
      chunk: images made at once.
      place: puts the arrays of a chunk on the devices.

    Yields:
      Images float32 [n, H, W, 3] in [0, 1] and tokens int32 [n, L], n = chunk but for the last.
    """
    strengths = ramp(options.guidance, model.config.schedule)
    for start in range(0, len(labels), chunk):
        indices = np.arange(start, start + chunk)
        chosen = np.asarray(labels, np.int32)[np.minimum(indices, len(labels) - 1)]
        images, tokens = generate(
            tokenizer,
            model,
            tokenizer_params,
            params,
            place(chosen),
            place(image_keys(seed, indices)),
            strengths,
            np.float32(options.top_p),
            guided=options.guidance != 0,
            top_k=int(options.top_k),
            smooth=options.smooth,
        )
        n = min(chunk, len(labels) - start)
        yield np.asarray(images[:n]) / 2 + 0.5, np.asarray(tokens[:n])
