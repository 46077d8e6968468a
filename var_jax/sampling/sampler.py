"""Generation: labels, captions or embeddings to images in one compiled program.

The KV cache is allocated at its full size, and everything that depends on the condition alone is computed
once.  Next-scale: the scales are unrolled, and each attends to a static prefix of the cache.  Next-token: one
scan over the tokens, each of which attends to the whole cache under its mask.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped

from var_jax.errors import UserError
from var_jax.images import denormalize
from var_jax.sampling.filter_logits import filter_logits
from var_jax.sampling.options import PerScaleOptions, SamplingOptions, guide
from var_jax.sampling.teacher_forcing import teacher_forcing
from var_jax.tokenizer.model import Tokenizer
from var_jax.tokenizer.quantizer import Quantizer
from var_jax.transformer.condition import Conditions
from var_jax.transformer.config import TransformerConfig
from var_jax.transformer.model import ARTransformer, Cache, Condition


@flax.struct.dataclass
class Refiner:
    """A second next-scale transformer, which samples the last maps.

    Collaborative decoding (CoDe, Chen et al. 2025): a large transformer, the drafter, samples the first maps.

    Attributes:
      model: of the same tokenizer and classes as the first one, the drafter.
      num_drafted: number of maps that the drafter samples.
      params: of the model.
    """

    model: ARTransformer = flax.struct.field(pytree_node=False)
    num_drafted: int = flax.struct.field(pytree_node=False)
    params: dict

    def apply(self, *args, method: str):
        """Call a method of the transformer."""
        return self.model.apply({"params": self.params}, *args, method=method)


@flax.struct.dataclass
class Networks:
    """A tokenizer and a transformer with their parameters; a pytree whose modules are static under `jit`.

    With a refiner, the transformer samples the first maps, and the refiner the others.
    """

    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    model: ARTransformer = flax.struct.field(pytree_node=False)
    tokenizer_params: dict
    params: dict
    refiner: Refiner | None = None

    @property
    def quantizer(self) -> Quantizer:
        """Return the quantizer of the tokenizer."""
        return Quantizer.create(self.tokenizer_params["quantizer"], self.tokenizer.config)

    def apply(self, *args, method: str):
        """Call a method of the transformer."""
        return self.model.apply({"params": self.params}, *args, method=method)

    def decode_features(self, f_hat: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Decode f_hat to images in [-1, 1]."""
        return self.tokenizer.apply({"params": self.tokenizer_params}, f_hat, method="decode_features")


@flax.struct.dataclass
class KnownTokens:
    """Tokens of images that are partly known, and the mask of those to resample.

    Attributes:
      tokens: int32 [B, L]; those under the mask are ignored.
      resample: bool [B, L], True where a token is resampled.
    """

    tokens: Array | np.ndarray
    resample: Array | np.ndarray


class NonFiniteImages(UserError, FloatingPointError):
    """Error for generated images that are not finite; names the images and the likely causes."""


def image_keys(seed: int, indices: Int[Array | np.ndarray, " B"]) -> Key[Array, " B"]:
    """Derive a random key from (seed, i) for each image i, so that images do not depend on their batch.

    The seed is an argument of the compiled program: a server would otherwise compile, and keep, one per seed.
    """
    return _image_keys(np.uint32(seed), indices)


@jax.jit
def _image_keys(seed: Array, indices: Array) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices.astype(jnp.uint32))


def _gumbel_noise(keys: jax.Array, step: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sample Gumbel noise [B, *shape] for one step of generation, each image from its own key."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), shape))(keys)


def smooth_codes(
    logits: Float[Array, "B n V"], noise: Float[Array, "B n V"], codes: Float[Array, "V C"], progress: float
) -> Float[Array, "B n C"]:
    """Mix codes by a Gumbel-softmax that sharpens from scale to scale.

    Args:
      logits: of the codes at each position.
      noise: Gumbel noise.
      codes: code vectors.
      progress: k / (K - 1) at scale k, 0 at the first and 1 at the last.
    """
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    weights = jax.nn.softmax(((1 + progress) * logits + noise) / temperature, axis=-1)
    return jnp.matmul(weights, codes, precision=jax.lax.Precision.HIGHEST)


def _sample_map(
    k: int,
    logits: jax.Array,
    keys: jax.Array,
    quantizer: Quantizer,
    per_scale: PerScaleOptions,
    known: KnownTokens | None,
    step: int | jax.Array,
):
    """Sample n tokens of map k, and insert those that are known.

    Args:
      k: scale, whose options apply.
      logits: float32 [B, n, V].
      keys: random keys [B].
      quantizer: quantizer of the tokenizer.
      per_scale: sampling options of every scale.
      known: tokens and mask of the same n positions.
      step: number of the step of generation, folded into the keys.

    Returns:
      Tokens int32 [B, n] and codes [B, n, C].
    """
    sampled, codes = _sample_codes(k, logits, keys, quantizer, per_scale, step)
    if known is None:
        return sampled, codes
    tokens = jnp.where(known.resample, sampled, known.tokens)
    return tokens, jnp.where(known.resample[..., None], codes, quantizer.codes[known.tokens])


def _sample_codes(k, logits, keys, quantizer, per_scale, step):
    """Sample tokens int32 [B, n] and codes [B, n, C] of map k; the arguments are those of `_sample_map`.

    An image with non-finite logits gets NaN codes, so that `check_finite` finds it at the end.
    """
    logits = logits / per_scale.temperature[k]
    finite = jnp.isfinite(logits).all(axis=(1, 2))[:, None, None]
    logits = filter_logits(logits, per_scale.top_k[k], per_scale.top_p[k] if per_scale.use_top_p[k] else None)
    noise = _gumbel_noise(keys, step, logits.shape[1:])
    if per_scale.smooth[k]:
        codes = smooth_codes(logits, noise, quantizer.codes, quantizer.scales.progress(k))
        token_map = quantizer.nearest(codes)
    else:
        token_map = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        codes = quantizer.codes[token_map]
    return token_map, jnp.where(finite, codes, jnp.nan)


@jax.jit
def generate(
    networks: Networks,
    labels: Conditions,
    keys: Key[Array, " B"],
    per_scale: PerScaleOptions,
    known: KnownTokens | None = None,
) -> tuple[Float[Array, "B H W 3"], Int32[Array, "B n"]]:
    """Generate one image per condition.

    Args:
      networks: tokenizer and transformer.
      labels: condition of each image, of the kind that the transformer takes: its class, the words of its
        caption, or its embedding.
      keys: random key of each image (`image_keys`).
      per_scale: sampling options of every scale.
      known: tokens to keep, from which the later maps are predicted too; None samples all.

    Returns:
      Images float32 in [-1, 1], and tokens of the sampled maps.  An image with non-finite logits is NaN.
    """
    config, quantizer = networks.model.config, networks.quantizer
    labels = _guided_labels(labels, config, per_scale)
    if config.predicts_maps:
        f_hat, tokens = _sample_all_maps(networks, quantizer, labels, keys, per_scale, known)
    else:
        f_hat, tokens = _sample_all_tokens(networks.apply, config, quantizer, labels, keys, per_scale, known)
    return networks.decode_features(f_hat), tokens


def _guided_labels(labels, config, per_scale):
    """With guidance, interleave rows with and without condition, so that both are on one device."""
    if not per_scale.num_guided_scales:
        return labels
    rows = jnp.stack([labels, jnp.full_like(labels, config.null_condition)], axis=1)
    return rows.reshape(-1, *labels.shape[1:])


@flax.struct.dataclass
class PartialImages:
    """Images of which the first maps are sampled.

    Attributes:
      f_hat: sum of the maps, [B, h, w, C].
      condition: of the transformer, computed from the labels or what stands for them.
      cache: keys and values of the maps so far; None if maps do not attend to others.
    """

    f_hat: Array
    condition: Condition
    cache: Cache | None


def _no_maps(apply, quantizer, labels, batch) -> PartialImages:
    """Return images before the first map; labels with guidance are those of `_guided_labels`."""
    shape = (batch, quantizer.scales.side, quantizer.scales.side, quantizer.codes.shape[1])
    condition = apply(labels, method="condition")
    return PartialImages(jnp.zeros(shape), condition, apply(labels.shape[0], method="empty_cache"))


def _sample_next_map(k, images, apply, quantizer, keys, per_scale, known):
    """Sample map k with a next-scale transformer; return the images with it, and its tokens [B, n]."""
    scales, condition, cache = quantizer.scales, images.condition, images.cache
    is_guided = k < per_scale.num_guided_scales
    if not is_guided and len(condition.vector) > len(keys):
        condition, cache = condition.conditional(), jax.tree.map(lambda x: x[:, ::2], cache)
    inputs = None if k == 0 else quantizer.next_scale_input(k, images.f_hat)
    if is_guided and k:
        inputs = jnp.repeat(inputs, 2, axis=0)
    logits, cache = apply(k, inputs, condition, cache, method="step")
    logits = guide(logits, per_scale.guidance_scale[k]) if is_guided else logits
    positions = slice(scales.starts[k], scales.ends[k])
    known_map = jax.tree.map(lambda x: x[:, positions], known)
    token_map, codes = _sample_map(k, logits, keys, quantizer, per_scale, known_map, step=k)
    f_hat = images.f_hat + quantizer.upsample_and_smooth(k, codes)
    return PartialImages(f_hat, condition, cache), token_map


def _sample_all_maps(networks, quantizer, labels, keys, per_scale, known):
    """Sample f_hat [B, h, w, C] and tokens [B, n] map by map, with a next-scale transformer or two."""
    apply, refiner = networks.apply, networks.refiner
    images, tokens, inputs = _no_maps(apply, quantizer, labels, len(keys)), [], []
    if refiner is not None:  # the drafter's cache needs no room for later maps
        end = quantizer.scales.ends[refiner.num_drafted - 1]
        images = images.replace(cache=jax.tree.map(lambda x: x[:, :, :end], images.cache))
    for k in range(per_scale.num_maps):
        if refiner is not None and k == refiner.num_drafted:
            images = _prefilled(images, inputs, refiner, labels, k < per_scale.num_guided_scales)
            apply = refiner.apply
        images, token_map = _sample_next_map(k, images, apply, quantizer, keys, per_scale, known)
        tokens.append(token_map)
        if refiner is not None and k + 1 < refiner.num_drafted:
            inputs.append(quantizer.next_scale_input(k + 1, images.f_hat))
    return images.f_hat, jnp.concatenate(tokens, axis=1)


def _prefilled(images, inputs, refiner, labels, is_guided) -> PartialImages:
    """Return images with the condition of the refiner, and its cache of the drafted maps.

    Args:
      images: with the drafted maps.
      inputs: of the drafted maps but the first, a list of [B, n, C].
      refiner: samples the next map.
      labels: [B], or with any guidance those of `_guided_labels`.
      is_guided: whether the next map is guided.
    """
    batch, *_, channels = images.f_hat.shape
    inputs = jnp.concatenate([jnp.zeros((batch, 0, channels)), *inputs], axis=1)
    if is_guided:
        inputs = jnp.repeat(inputs, 2, axis=0)
    condition = refiner.apply(labels[:: len(labels) // len(inputs)], method="condition")
    cache = refiner.apply(inputs, condition, method="prefill")
    return images.replace(condition=condition, cache=cache)


@jax.jit
def _start_stream(networks, labels, per_scale) -> PartialImages:
    rows = _guided_labels(labels, networks.model.config, per_scale)
    return _no_maps(networks.apply, networks.quantizer, rows, labels.shape[0])


@partial(jax.jit, static_argnames="k")
def _stream_map(k, images, networks, keys, per_scale, known):
    return _sample_next_map(k, images, networks.apply, networks.quantizer, keys, per_scale, known)


@jax.jit
def _stream_pixels(f_hat, networks):
    return networks.decode_features(f_hat)


def generate_map_by_map(
    networks: Networks,
    labels: Conditions,
    keys: Key[Array, " B"],
    per_scale: PerScaleOptions,
    known: KnownTokens | None = None,
) -> Iterator[tuple[Float[Array, "B H W 3"], Int32[Array, "B n"]]]:
    """Generate one image per condition, and yield the images after each map; arguments as for `generate`.

    Each map is a program of its own, so that it can be shown while the next one is sampled; the decoder is
    one for all maps.  For next-scale transformers only.

    Yields:
      Images in [-1, 1] after 1, 2, ... maps, and the tokens of the last of these maps.
    """
    images = _start_stream(networks, labels, per_scale)
    for k in range(per_scale.num_maps):
        images, token_map = _stream_map(k, images, networks, keys, per_scale, known)
        yield _stream_pixels(images.f_hat, networks), token_map


def _sample_all_tokens(apply, config, quantizer, labels, keys, per_scale, known):
    """Sample f_hat [B, h, w, C] and tokens [B, L] token by token, with a next-token transformer."""
    condition = apply(labels, method="condition")
    known = jax.tree.map(config.to_prediction_order, known)

    def step(carry, i):
        previous, cache = carry
        inputs = jnp.repeat(previous, 2, axis=0) if per_scale.num_guided_scales else previous
        logits, cache = apply(i, inputs, condition, cache, method="step")
        logits = guide(logits, per_scale.guidance_scale[0]) if per_scale.num_guided_scales else logits
        known_token = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), known)
        token, code = _sample_map(0, logits, keys, quantizer, per_scale, known_token, step=i)
        return (code, cache), (token[:, 0], code[:, 0])

    blank = jnp.zeros((keys.shape[0], 1, config.code_dim))
    init = (blank, apply(labels.shape[0], method="empty_cache"))
    _, outputs = jax.lax.scan(step, init, jnp.arange(config.length))
    tokens, codes = (config.to_raster_order(x.swapaxes(0, 1)) for x in outputs)
    return quantizer.upsample_and_smooth(0, codes), tokens


@jax.jit
def teacher_forced_logits(
    networks: Networks, labels: Conditions, tokens: Int[Array | np.ndarray, "B L"]
) -> Float32[Array, "B L V"]:
    """Compute the logits of all positions, each conditioned on the true tokens before it.

    Args:
      networks: tokenizer and transformer.
      labels: condition of each image.
      tokens: in the tokenizer's layout, which is that of the logits, too.
    """
    model = networks.model
    _, inputs = teacher_forcing(model.config, networks.quantizer, tokens)
    return model.config.to_raster_order(model.apply({"params": networks.params}, labels, inputs))


def unguided_if_null(
    per_scale: PerScaleOptions, config: TransformerConfig, labels: Conditions
) -> PerScaleOptions:
    """Return the options without guidance if all is "no condition": both halves would be the same."""
    is_null = bool((labels == config.null_condition).all())
    return per_scale.replace(num_guided_scales=0) if is_null else per_scale


def device_put_global(x: Array | np.ndarray, sharding: NamedSharding) -> Array:
    """Put an array, of which every host has a full copy, on the devices of all hosts."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    copy = np.asarray(x)
    return jax.make_array_from_callback(copy.shape, sharding, lambda index: copy[index])


@partial(jax.jit, static_argnames=("postprocess", "sharding"))
def _postprocess(images: jax.Array, tokens: jax.Array, postprocess, sharding: NamedSharding | None):
    """Return postprocessed images, tokens and is_finite bool [B], in a sharding that each host can read."""
    result = postprocess(images), tokens, jnp.isfinite(images).all(axis=(1, 2, 3))
    return result if sharding is None else jax.lax.with_sharding_constraint(result, sharding)


def generate_in_chunks(
    networks: Networks,
    labels: Conditions,
    seed: int,
    options: SamplingOptions,
    chunk: int,
    *,
    known: KnownTokens | None = None,
    start: int = 0,
    sharding: NamedSharding | None = None,
    postprocess: Callable[[Array], Array] = denormalize,
) -> Iterator[tuple[Shaped[np.ndarray, "n H W 3"], Int32[np.ndarray, "n L"]]]:
    """Generate the images of many conditions, `chunk` at a time; the last chunk is padded to the same shape.

    The devices work on the next chunk while the caller handles the one before.

    Args:
      networks: tokenizer and transformer.
      labels: condition of each image.
      seed: image i depends on (seed, i) alone.
      options: sampling options.
      chunk: number of images to generate at once; rounded up to a multiple of the number of devices.
      known: tokens to keep, [N, L].
      start: number of the first image to generate; the images before it are skipped.
      sharding: sharding of the leading axis of a batch, over the devices that hold the parameters.
      postprocess: function of images in [-1, 1], run on the device: `denormalize` or `denormalize_to_uint8`.

    Yields:
      Images and tokens; n = chunk except for the last.

    Raises:
      NonFiniteImages: naming the first images of a chunk that are not finite.
    """
    config = networks.model.config
    per_scale = options.per_scale(config.schedule, config.num_codes)
    labels = np.asarray(labels, config.null_conditions(0).dtype)
    per_scale = unguided_if_null(per_scale, config, labels)
    replicated = None
    if sharding is not None:
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        chunk = -(-chunk // sharding.num_devices) * sharding.num_devices
    put = jnp.asarray if sharding is None else partial(device_put_global, sharding=sharding)
    pending = None
    for first in range(start, len(labels), chunk):
        indices = np.arange(first, first + chunk)
        rows = np.minimum(indices, len(labels) - 1)
        known_rows = None if known is None else jax.tree.map(lambda x: put(np.asarray(x)[rows]), known)  # noqa: B023
        keys = image_keys(seed, put(indices))
        with contextlib.nullcontext() if sharding is None else jax.set_mesh(sharding.mesh):
            arrays = generate(networks, put(labels[rows]), keys, per_scale, known_rows)
        arrays = _postprocess(*arrays, postprocess, replicated)
        if pending is not None:
            yield _to_host(*pending)
        pending = (*arrays, first, labels[first : first + chunk])
    if pending is not None:
        yield _to_host(*pending)


def _to_host(
    images: jax.Array, tokens: jax.Array, is_finite: jax.Array, first: int, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Copy images and tokens of a chunk, which begins with image `first`, to the host, without padding."""
    check_finite(np.asarray(is_finite)[: len(labels)], first, labels)
    return np.asarray(images)[: len(labels)], np.asarray(tokens)[: len(labels)]


def check_finite(is_finite: Bool[np.ndarray, " n"], first: int = 0, labels: Conditions | None = None) -> None:
    """Raise NonFiniteImages unless all images are finite.

    Args:
      is_finite: of the images from number `first` on.
      first: number of the first image, for the message.
      labels: condition of each image, for the message if it is a class.
    """
    bad = np.flatnonzero(~is_finite)
    if not len(bad):
        return
    names = ", ".join(
        f"{first + i}" if labels is None or labels.ndim > 1 else f"{first + i} (label {labels[i]})"
        for i in bad[:5]
    )
    raise NonFiniteImages(
        f"{len(bad)} of {len(is_finite)} images are not finite: {names}{', ...' * (len(bad) > 5)}. "
        "Either the weights hold NaN or infinities (the run diverged, or a file is damaged), or numbers "
        "overflow: try a smaller guidance, a temperature nearer to 1, or float32"
    )
