"""Generation: labels to images in one compiled program.

The cache of keys and values has its full size from the start, and all that depends on the label alone is
computed once.  Next-scale: the scales are unrolled, and each attends to a static prefix of the cache.
Next-token: one scan over the tokens, each of which attends to the whole cache under its mask.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from var_jax.errors import UserError
from var_jax.images import denormalize
from var_jax.sampling.options import SamplingOptions, ScaleControls, guide
from var_jax.sampling.teacher_forcing import teacher_forcing
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.model import ARTransformer


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


@flax.struct.dataclass
class Networks:
    """A tokenizer and a transformer with their parameters; under `jit` the modules are static."""

    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    model: ARTransformer = flax.struct.field(pytree_node=False)
    tokenizer_params: dict
    params: dict

    @property
    def quantizer(self) -> Quantizer:
        """The tokenizer's quantizer."""
        return Quantizer.create(self.tokenizer_params["quantizer"], self.tokenizer.config)


@flax.struct.dataclass
class KnownTokens:
    """Tokens of an image to keep, and those to draw again.

    Attributes:
      tokens: int32 [B, L].
      resample: bool [B, L], True where a token is drawn.
    """

    tokens: jax.Array
    resample: jax.Array


class NonFiniteImages(UserError, FloatingPointError):
    """Images are not finite; names them and the likely causes."""


@partial(jax.jit, static_argnames="seed")
def image_keys(seed: int, indices: jax.Array) -> jax.Array:
    """Random keys [B] of images int [B]: image i depends on (seed, i) alone, whatever batch it is made in."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices.astype(jnp.uint32))


def _noise(keys: jax.Array, fold: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Gumbel noise [B, *shape], of every image from its own key."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, fold), shape))(keys)


def smooth_codes(logits: jax.Array, noise: jax.Array, codes: jax.Array, progress: float) -> jax.Array:
    """Gumbel-softmax mixtures of codes, sharper from scale to scale -> [B, n, C]."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    shares = jax.nn.softmax(((1 + progress) * logits + noise) / temperature, axis=-1)
    return jnp.matmul(shares, codes, precision=jax.lax.Precision.HIGHEST)


def _draw(
    k: int,
    logits: jax.Array,
    keys: jax.Array,
    quantizer: Quantizer,
    controls: ScaleControls,
    given: KnownTokens | None,
    fold: int | jax.Array,
):
    """Logits [B, n, V] of map k -> tokens int32 [B, n] and codes [B, n, C], drawn or given.

    `fold` is the number of the draw in the image; `given` holds the same n tokens.
    """
    drawn, codes = _drawn(k, logits, keys, quantizer, controls, fold)
    if given is None:
        return drawn, codes
    tokens = jnp.where(given.resample, drawn, given.tokens)
    return tokens, jnp.where(given.resample[..., None], codes, quantizer.codes[given.tokens])


def _drawn(k, logits, keys, quantizer, controls, fold):
    """See `_draw`.  Where the logits of an image are not finite, its codes are NaN, and so is the image."""
    logits = logits / controls.temperature[k]
    finite = jnp.isfinite(logits).all(axis=(1, 2))[:, None, None]
    logits = filter_logits(logits, controls.top_k[k], controls.top_p[k] if controls.use_top_p[k] else None)
    noise = _noise(keys, fold, logits.shape[1:])
    if controls.smooth[k]:
        codes = smooth_codes(logits, noise, quantizer.codes, quantizer.scales.progress(k))
        token_map = quantizer.nearest(codes)
    else:
        token_map = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        codes = quantizer.codes[token_map]
    return token_map, jnp.where(finite, codes, jnp.nan)


@jax.jit
def generate(
    networks: Networks,
    labels: jax.Array,
    keys: jax.Array,
    controls: ScaleControls,
    given: KnownTokens | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw one image a label.

    Args:
      networks: tokenizer and transformer.
      labels: int32 [B].
      keys: random keys [B] (`image_keys`).
      controls: how to draw.
      given: tokens to keep; each map is predicted from what it is to stand beside.  None draws all.

    Returns:
      Images float32 [B, H, W, 3] in [-1, 1], and tokens int32 [B, n] of the maps drawn.  An image with logits
      that are not finite is NaN.
    """
    config, quantizer = networks.model.config, networks.quantizer
    if controls.num_guided_scales:  # with and without class side by side, so that both stay on one device
        labels = jnp.stack([labels, jnp.full_like(labels, config.num_classes)], axis=1).ravel()
    draw = _draw_maps if config.predicts_maps else _draw_tokens
    apply = partial(networks.model.apply, {"params": networks.params})
    f_hat, tokens = draw(apply, config, quantizer, labels, keys, controls, given)
    params = {"params": networks.tokenizer_params}
    return networks.tokenizer.apply(params, f_hat, method="decode_features"), tokens


def _draw_maps(apply, config, quantizer, labels, keys, controls, given):
    """Next-scale: f_hat [B, h, w, C] and tokens [B, n], map by map."""
    scales, batch = quantizer.scales, keys.shape[0]
    condition = apply(labels, method="condition")
    cache = apply(labels.shape[0], method="empty_cache")
    f_hat = jnp.zeros((batch, scales.side, scales.side, config.code_dim))
    tokens = []
    for k in range(controls.scales):
        num_guided_scales = k < controls.num_guided_scales
        if k == controls.num_guided_scales > 0:
            condition, cache = condition.conditional(), cache.conditional()
        inputs = None if k == 0 else quantizer.next_scale_input(k, f_hat)
        if num_guided_scales and k:
            inputs = jnp.repeat(inputs, 2, axis=0)
        logits, cache = apply(k, inputs, condition, cache, method="step")
        logits = guide(logits, controls.guidance_scale[k]) if num_guided_scales else logits
        here = slice(scales.starts[k], scales.ends[k])
        own = jax.tree.map(lambda x: x[:, here], given)  # noqa: B023
        token_map, codes = _draw(k, logits, keys, quantizer, controls, own, fold=k)
        f_hat = f_hat + quantizer.upsample_and_smooth(k, codes)
        tokens.append(token_map)
    return f_hat, jnp.concatenate(tokens, axis=1)


def _draw_tokens(apply, config, quantizer, labels, keys, controls, given):
    """Next-token: f_hat [B, h, w, C] and tokens [B, L], one token after another, in their order."""
    condition = apply(labels, method="condition")
    given = jax.tree.map(config.to_prediction_order, given)

    def step(carry, i):
        before, cache = carry
        inputs = jnp.repeat(before, 2, axis=0) if controls.num_guided_scales else before
        logits, cache = apply(i, inputs, condition, cache, method="step")
        logits = guide(logits, controls.guidance_scale[0]) if controls.num_guided_scales else logits
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), given)
        token, code = _draw(0, logits, keys, quantizer, controls, own, fold=i)
        return (code, cache), (token[:, 0], code[:, 0])

    nothing = jnp.zeros((keys.shape[0], 1, config.code_dim))
    start = (nothing, apply(labels.shape[0], method="empty_cache"))
    _, drawn = jax.lax.scan(step, start, jnp.arange(config.length))
    tokens, codes = (config.to_raster_order(x.swapaxes(0, 1)) for x in drawn)
    return quantizer.upsample_and_smooth(0, codes), tokens


@jax.jit
def teacher_forced_logits(networks: Networks, labels: jax.Array, tokens: jax.Array) -> jax.Array:
    """Compute logits float32 [B, L, V] of tokens int32 [B, L], each given the true ones before it."""
    model = networks.model
    _, inputs = teacher_forcing(model.config, networks.quantizer, tokens)
    return model.config.to_raster_order(model.apply({"params": networks.params}, labels, inputs))


def device_put_global(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every host holds whole, onto the devices of all hosts."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


@partial(jax.jit, static_argnames=("postprocess", "sharding"))
def _finished(images: jax.Array, tokens: jax.Array, postprocess, sharding: NamedSharding | None):
    """What leaves the devices, whole on every host: images, tokens, and whether each image is finite."""
    result = postprocess(images), tokens, jnp.isfinite(images).all(axis=(1, 2, 3))
    return result if sharding is None else jax.lax.with_sharding_constraint(result, sharding)


def generate_in_chunks(
    networks: Networks,
    labels: np.ndarray,
    seed: int,
    options: SamplingOptions,
    chunk: int,
    *,
    given: KnownTokens | None = None,
    start: int = 0,
    sharding: NamedSharding | None = None,
    postprocess=denormalize,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of many labels, `chunk` at a time; the last chunk is filled up, so nothing is compiled twice.

    The devices work on a chunk while the one before it is handed out.

    Args:
      networks: tokenizer and transformer.
      labels: int [N].
      seed: image i depends on (seed, i) alone.
      chunk: images made at once; over several devices, rounded up to a multiple of their number.
      given: tokens to keep, [N, L].
      start: the first image to make, where those before it are there already.
      sharding: of the leading axis of a batch, over the devices that hold the parameters.
      postprocess: what to make of images in [-1, 1] on the device: `denormalize` or `denormalize_to_uint8`.

    Yields:
      Images [n, H, W, 3] and tokens int32 [n, L], n = chunk but for the last.

    Raises:
      NonFiniteImages: naming the first images of a chunk that are not finite.
    """
    config = networks.model.config
    controls = options.controls(config.schedule, config.num_codes)
    labels, whole = np.asarray(labels, np.int32), None
    if (labels == config.num_classes).all():
        controls = controls.replace(num_guided_scales=0)  # both halves would be the same
    if sharding is not None:
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        chunk = -(-chunk // sharding.num_devices) * sharding.num_devices
    place = jnp.asarray if sharding is None else partial(device_put_global, sharding=sharding)
    waiting = None
    for first in range(start, len(labels), chunk):
        indices = np.arange(first, first + chunk)
        rows = np.minimum(indices, len(labels) - 1)
        part = None if given is None else jax.tree.map(lambda x: place(np.asarray(x)[rows]), given)  # noqa: B023
        keys = image_keys(seed, place(indices))
        with contextlib.nullcontext() if sharding is None else jax.set_mesh(sharding.mesh):
            made = generate(networks, place(labels[rows]), keys, controls, part)
        made = (*_finished(*made, postprocess, whole), first, labels[first : first + chunk])
        if waiting is not None:
            yield _to_host(*waiting)
        waiting = made
    if waiting is not None:
        yield _to_host(*waiting)


def _to_host(
    images: jax.Array, tokens: jax.Array, finite: jax.Array, first: int, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Images and tokens of a chunk that begins with image `first`, one a label, without what fills it up."""
    check_finite(np.asarray(finite)[: len(labels)], first, labels)
    return np.asarray(images)[: len(labels)], np.asarray(tokens)[: len(labels)]


def check_finite(finite: np.ndarray, first: int = 0, labels: np.ndarray | None = None) -> None:
    """Raise NonFiniteImages unless all images are finite.

    Args:
      finite: bool [n], of the images from number `first` on.
      labels: int [n], for the message.
    """
    bad = np.flatnonzero(~finite)
    if not len(bad):
        return
    named = [f"{first + i}" if labels is None else f"{first + i} (label {labels[i]})" for i in bad[:5]]
    raise NonFiniteImages(
        f"{len(bad)} of {len(finite)} images are not finite: {', '.join(named)}{', ...' * (len(bad) > 5)}. "
        "Either the weights hold NaN or infinities (the run diverged, or a file is damaged), or numbers "
        "overflow: try a smaller guidance, a temperature nearer to 1, or float32"
    )
