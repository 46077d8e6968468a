"""Public API: load a tokenizer and a VAR, encode, decode, generate, edit.

Images are float32 [B, H, W, 3] in [0, 1] here, and results are numpy arrays.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from var_jax.conditions import encode_prompt
from var_jax.images import denormalize
from var_jax.interop import load
from var_jax.sampling.attention_weights import attention_weights
from var_jax.sampling.auto_batch_size import codec_batch
from var_jax.sampling.cast_params import in_compute_dtype, tokenizer_in_compute_dtype
from var_jax.sampling.editing import mask_from_pixels, mask_from_scale
from var_jax.sampling.options import MAX_SEED, SamplingOptions, check_integer
from var_jax.sampling.sampler import (
    KnownTokens,
    Networks,
    Refiner,
    check_finite,
    device_put_global,
    generate_in_chunks,
    generate_map_by_map,
    image_keys,
    teacher_forced_logits,
    unguided_if_null,
)
from var_jax.tokenizer import model as tokenizer_model
from var_jax.transformer.model import ARTransformer

# Sampling options of the published editing demonstration, without its `more_smooth` (smooth=True here): mixed
# codes are not tokens, so the returned tokens would not decode to the image.
EDITING = {"guidance": 3.0, "top_p": 0.95}
ARGUMENTS = {"label": "labels", "caption": "prompt", "embedding": "embeddings"}  # of `conditions`, by kind
RANGE_TOLERANCE = 1e-3  # excess of pixels over [0, 1] that is clipped, as from a resize or bfloat16


def on_device(params: dict) -> dict:
    """Move NumPy arrays to the first device, without a program for each shape; others stay where they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), params)


class LoadedTokenizer:
    """A tokenizer with its parameters.

    Attributes:
      scales: sides of the K token maps.
      num_codes: V, number of codes in the codebook.
      num_tokens: L, number of tokens of an image.
      image_size: H = W, side of the images in pixels.
      module: Flax module.
      params: parameters in the compute dtype.
    """

    def __init__(self, model: tokenizer_model.Tokenizer, params: dict):
        self.module = model
        # Cast on the host, so that the devices never hold two copies.
        self.params = on_device(tokenizer_in_compute_dtype(params, model))
        self.scales, self.num_codes = model.config.scales, model.config.num_codes
        self.num_tokens, self.image_size = model.config.schedule.length, model.config.image_size

    def encode(self, images, batch: int | None = None) -> np.ndarray:
        """Encode images to tokens int32 [B, L].

        Args:
          images: float of any precision [B, H, W, 3] in [0, 1]; an excess of up to 0.001 is clipped.
          batch: number of images to encode at once; by default as many as fit 2 GiB.

        Raises:
          ValueError: on images of another size, type or range.
        """
        images = self.check_images(images) * 2 - 1
        return self._in_batches(tokenizer_model.encode, images, batch)

    def decode(self, tokens, upto: int | None = None, batch: int | None = None) -> np.ndarray:
        """Decode tokens to images float32 [B, H, W, 3] in [0, 1].

        Args:
          tokens: int [B, L].
          upto: number of maps to decode, from the coarsest; None for all.
          batch: number of images to decode at once; by default as many as fit 2 GiB.

        Raises:
          ValueError: on tokens of another length, codes outside the codebook, or `upto` outside 1 .. K.
          NonFiniteImages: if the weights give images that are not finite.
        """
        tokens = self.check_tokens(tokens)
        if upto is not None:
            maps = check_integer("upto", upto, 1, len(self.scales))
            tokens = tokens[:, : self.module.config.schedule.ends[maps - 1]]
        images = denormalize(self._in_batches(tokenizer_model.decode, tokens, batch))
        check_finite(np.isfinite(images).all(axis=(1, 2, 3)))
        return images

    def decode_steps(self, tokens, batch: int | None = None) -> np.ndarray:
        """Decode tokens to images float32 [B, n, H, W, 3] in [0, 1] after 1, 2, ... n maps.

        Args:
          tokens: int [B, L], or the tokens of the first n maps.
          batch: as for `decode`; n maps take no more memory than one.
        """
        tokens = self.check_tokens(tokens, all_maps=False)
        return denormalize(self._in_batches(tokenizer_model.decode_steps, tokens, batch))

    def _in_batches(self, function: Callable, rows: np.ndarray, batch: int | None) -> np.ndarray:
        """Apply a jitted function to rows [B, ...], `batch` at once; the last batch is padded."""
        batch = codec_batch(self.module) if batch is None else check_integer("batch", batch, 1)
        batch = min(batch, len(rows))
        outputs = []
        for first in range(0, len(rows), batch):
            padded = rows[np.minimum(np.arange(first, first + batch), len(rows) - 1)]
            output = function(self.module, self.params, jnp.asarray(padded))
            outputs.append(np.asarray(output)[: len(rows) - first])
        return np.concatenate(outputs)

    def check_images(self, images) -> np.ndarray:
        """Return images as float32 [B, H, W, 3] in [0, 1].

        Raises:
          ValueError: on images of another size, type or range.
        """
        images, side = np.asarray(images), self.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3) or not len(images):
            raise ValueError(
                f"images must be [B, {side}, {side}, 3], got shape {images.shape}; B must be at least 1"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}; divide uint8 by 255")
        images = images.astype(np.float32)
        if not (images.min() >= -RANGE_TOLERANCE and images.max() <= 1 + RANGE_TOLERANCE):
            raise ValueError(f"images must be in [0, 1], got {images.min():.6g} .. {images.max():.6g}")
        return images.clip(0, 1)

    def check_tokens(self, tokens, all_maps: bool = True) -> np.ndarray:
        """Return tokens as int32 [B, L].

        Args:
          tokens: int [B, L].
          all_maps: False to accept the tokens of the first n maps, too.

        Raises:
          ValueError: on another shape or type, or codes outside the codebook.
        """
        tokens, ends = np.asarray(tokens), self.module.config.schedule.ends
        lengths = ends[-1:] if all_maps else ends
        fits = tokens.ndim == 2 and tokens.shape[1] in lengths and len(tokens)
        if not fits or not np.issubdtype(tokens.dtype, np.integer):
            expected = " or ".join(str(length) for length in lengths)
            raise ValueError(
                f"tokens must be int [B, {expected}], got {tokens.dtype} {tokens.shape}; B must be at least 1"
            )
        if not (tokens.min() >= 0 and tokens.max() < self.num_codes):
            raise ValueError(
                f"tokens must be in 0 .. {self.num_codes - 1}, got {tokens.min()} .. {tokens.max()}"
            )
        return tokens.astype(np.int32)


class LoadedVAR:
    """A transformer, VAR or next-token, with its parameters and its tokenizer.

    Attributes:
      num_classes: labels are 0 .. num_classes - 1; num_classes itself means "no class".
      depth: number of blocks.
      scales: sides of the K token maps.
      image_size: H = W, side of the images in pixels.
      options: sampling options of the run's previews; the published options for a published file.
      class_names: names of the classes, index = label; () for a published file and for older runs.
      tokenizer: tokenizer whose tokens are predicted.
      module: Flax module.
      params: parameters in the compute dtype and the layout of `module` (see `transformer/layer_params.py`).
      refiner: model that samples the last maps (see `with_refiner`); None to sample all with this one.
      draft_scales: number of maps that this model samples if there is a refiner.
    """

    refiner: "LoadedVAR | None" = None
    draft_scales: int = 0

    def __init__(
        self,
        model: ARTransformer,
        params: dict,
        options: SamplingOptions,
        tokenizer: LoadedTokenizer,
        class_names: tuple[str, ...] = (),
    ):
        self.module, self.options, self.tokenizer = model, options, tokenizer
        # Cast on the host, so that the devices never hold two copies.
        self.params = on_device(in_compute_dtype(params, model.dtype))
        self.num_classes, self.depth = model.config.num_classes, model.config.depth
        self.scales, self.image_size = model.config.scales, tokenizer.image_size
        self.class_names = class_names
        self._sharding = None

    @property
    def checkpoint_params(self) -> dict:
        """Return the parameters in the layout of checkpoints; copied to the host if the layers are apart."""
        return self.module.checkpoint_layout(self.params)

    @property
    def networks(self) -> Networks:
        """Return modules and parameters as the functions of `sampling/sampler.py` take them."""
        refiner = None
        if self.refiner is not None:
            refiner = Refiner(self.refiner.module, self.draft_scales, self.refiner.params)
        return Networks(self.tokenizer.module, self.module, self.tokenizer.params, self.params, refiner)

    def with_refiner(self, refiner: "LoadedVAR", draft_scales: int) -> "LoadedVAR":
        """Return a copy that samples the first maps with this model and the others with a refiner.

        This is collaborative decoding (CoDe, Chen et al. 2025): a large model drafts the few tokens of the
        coarse maps, and a small one, which reads the draft in one pass, adds the many of the fine maps.
        `sample`, `generate`, `inpaint` and `vary` use both, with the options of this model; `logits` and
        `attention` are those of this model.

        Args:
          refiner: next-scale model of the same tokenizer and classes.
          draft_scales: number of maps that this model samples, 1 .. K - 1.

        Raises:
          ValueError: if the models do not fit each other, or on `draft_scales` out of range.
        """
        if not (self.module.config.predicts_maps and refiner.module.config.predicts_maps):
            raise ValueError("drafter and refiner must be next-scale transformers")
        if refiner.num_classes != self.num_classes:
            raise ValueError(
                f"drafter and refiner must have the same classes, got {self.num_classes} and "
                f"{refiner.num_classes}"
            )
        for name in ("condition", "condition_length", "condition_width", "vocabulary"):
            if getattr(self.module.config, name) != getattr(refiner.module.config, name):
                raise ValueError(
                    f"drafter and refiner must take the same conditions, but their {name} differs"
                )
        prints = [tokenizer_model.fingerprint(model.tokenizer.params) for model in (self, refiner)]
        if refiner.scales != self.scales or len(set(prints)) > 1:
            raise ValueError(
                f"drafter and refiner must predict tokens of one tokenizer, got {' and '.join(prints)}, "
                f"scales {self.scales} and {refiner.scales}"
            )
        model = copy.copy(self)
        model.refiner = refiner
        model.draft_scales = check_integer("draft_scales", draft_scales, 1, len(self.scales) - 1)
        return model

    def replicate(self, devices=None) -> "LoadedVAR":
        """Return a copy with its parameters replicated on devices, which then share every batch.

        Args:
          devices: by default all devices of all hosts.
        """
        devices = jax.devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        put = partial(device_put_global, sharding=NamedSharding(mesh, PartitionSpec()))
        tokenizer = LoadedTokenizer(self.tokenizer.module, jax.tree.map(put, self.tokenizer.params))
        copies = [
            LoadedVAR(
                model.module, jax.tree.map(put, model.params), model.options, tokenizer, model.class_names
            )
            for model in (self, self.refiner)
            if model is not None
        ]
        model = copies[0]
        model.refiner, model.draft_scales = next(iter(copies[1:]), None), self.draft_scales
        model._sharding = NamedSharding(mesh, PartitionSpec("data"))
        return model

    def logits(self, tokens, labels=None, *, prompt=None, embeddings=None) -> np.ndarray:
        """Compute teacher-forced logits float32 [B, L, V].

        Args:
          tokens: int [B, L].
          labels: int [B]; None for "no class".
          prompt, embeddings: instead of labels; see `conditions`.

        Raises:
          ValueError: on tokens or labels that do not fit the model or each other.
        """
        tokens = self.tokenizer.check_tokens(tokens)
        conditions = self.conditions(labels, prompt, embeddings, len(tokens))
        return np.asarray(teacher_forced_logits(self.networks, conditions, tokens))

    def generate(
        self,
        labels=None,
        seed: int = 0,
        guidance=1.5,
        top_k=900,
        top_p=0.96,
        smooth=False,
        return_tokens: bool = False,
        batch: int | None = None,
        *,
        prompt=None,
        embeddings=None,
        **other_options,
    ):
        """Generate one image per label, prompt or embedding; the same seed gives the same images.

        The defaults are the published options, whatever the model was trained on; those of `sample` are the
        options of the model's run.

        Args:
          labels: int [B]; num_classes means "no class".
          seed: 0 .. 2^32 - 1; image i depends on (seed, i) alone.
          guidance: strength of classifier-free guidance at the last scale, rising from 0; or one per scale.
          top_k: number of likeliest codes to sample from; 0 for all; one value, or one per scale.
          top_p: probability that the likeliest codes to sample from hold together; 0 for all; one value, or
            one per scale.
          smooth: mix codes instead of sampling one.
          return_tokens: also return the tokens int32 [B, L].
          batch: number of images to generate at once; all by default.
          prompt, embeddings: instead of labels; see `conditions`.
          **other_options: other fields of `SamplingOptions`: temperature, guidance_schedule, guidance_until,
            upto.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: naming the argument that is out of range or of the wrong type.
          NonFiniteImages: if the weights or the options give images that are not finite.
        """
        options = SamplingOptions(guidance=guidance, top_k=top_k, top_p=top_p, smooth=smooth, **other_options)
        images, tokens = self._generate(self.conditions(labels, prompt, embeddings), seed, options, batch)
        return (images, tokens) if return_tokens else images

    def sample(
        self,
        labels=None,
        seed: int = 0,
        return_tokens: bool = False,
        batch: int | None = None,
        *,
        prompt=None,
        embeddings=None,
        **options,
    ):
        """Generate one image per label, prompt or embedding with the options of the model's run.

        Args:
          labels: int [B]; num_classes means "no class".
          seed: 0 .. 2^32 - 1; image i depends on (seed, i) alone.
          return_tokens: also return the tokens int32 [B, L].
          batch: number of images to generate at once; all by default.
          prompt, embeddings: instead of labels; see `conditions`.
          **options: fields of `SamplingOptions` that replace those of `self.options`.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: naming the argument that is out of range or of the wrong type.
          NonFiniteImages: if the weights or the options give images that are not finite.
        """
        options = dataclasses.replace(self.options, **options)
        images, tokens = self._generate(self.conditions(labels, prompt, embeddings), seed, options, batch)
        return (images, tokens) if return_tokens else images

    def best_of(
        self,
        labels,
        score: Callable[[np.ndarray, np.ndarray], np.ndarray],
        num: int,
        seed: int = 0,
        batch: int | None = None,
        *,
        prompt=None,
        embeddings=None,
        **options,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate several images per condition as `sample` does, and keep the one with the highest score.

        Args:
          labels: int [B]; num_classes means "no class".  None with a prompt or embeddings.
          score: function of images float32 [N, H, W, 3] in [0, 1] and their conditions (labels int32 [N])
            that returns a score [N] of each.
          num: number of images per label.
          seed: 0 .. 2^32 - 1; image j of label i depends on (seed, num i + j) alone.
          batch: number of images to generate and to score at once; all by default.
          prompt, embeddings: instead of labels; see `conditions`.
          **options: fields of `SamplingOptions` that replace those of `self.options`.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], and their scores [B].

        Raises:
          ValueError: naming the argument that is out of range, and on scores of another shape or NaN.
          NonFiniteImages: if the weights or the options give images that are not finite.
        """
        num = check_integer("num", num, 1)
        labels = np.repeat(self.conditions(labels, prompt, embeddings), num, axis=0)
        options = dataclasses.replace(self.options, **options)
        images, scores = [], []
        batch = len(labels) if batch is None else batch
        for chunk, _ in self.generate_batches(labels, seed, batch, options):
            first = sum(map(len, scores))
            chunk_scores = np.asarray(score(chunk, labels[first : first + len(chunk)]))
            if chunk_scores.shape != (len(chunk),) or np.isnan(chunk_scores).any():
                raise ValueError(
                    f"score must return a number for each of {len(chunk)} images, got {chunk_scores}"
                )
            images.append(chunk)
            scores.append(chunk_scores)
        scores = np.concatenate(scores).reshape(-1, num)
        best = np.arange(len(scores)) * num + scores.argmax(axis=1)
        return np.concatenate(images)[best], scores.max(axis=1)

    def stream(
        self,
        labels=None,
        seed: int = 0,
        known: KnownTokens | None = None,
        *,
        prompt=None,
        embeddings=None,
        **options,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Generate one image per condition as `sample` does, and yield the images after each map.

        Args:
          labels: int [B]; num_classes means "no class".
          seed: 0 .. 2^32 - 1; image i depends on (seed, i) alone.
          known: tokens [B, L] to keep; None samples all.
          prompt, embeddings: instead of labels; see `conditions`.
          **options: fields of `SamplingOptions` that replace those of `self.options`.

        Yields:
          Images float32 [B, H, W, 3] in [0, 1] after 1, 2, ... maps, and the tokens int32 [B, n] of these
          maps.  A next-token transformer, which has one map, yields once.

        Raises:
          ValueError: naming the argument that is out of range or of the wrong type; with a refiner.
          NonFiniteImages: if the weights or the options give images that are not finite.
        """
        if self.refiner is not None:
            raise ValueError("stream samples with one model; use sample or generate with a refiner")
        conditions = self.conditions(labels, prompt, embeddings, None if known is None else len(known.tokens))
        seed = check_integer("seed", seed, 0, MAX_SEED)
        options = dataclasses.replace(self.options, **options)
        return self._stream(conditions, seed, options, known)

    def _stream(self, labels, seed, options, known):
        config = self.module.config
        if not config.predicts_maps:
            yield self._generate(labels, seed, options, None, known)
            return
        per_scale = options.per_scale(config.schedule, config.num_codes)
        per_scale = unguided_if_null(per_scale, config, labels)
        keys, token_maps = image_keys(seed, np.arange(len(labels))), []
        for images, token_map in generate_map_by_map(self.networks, labels, keys, per_scale, known):
            images = np.asarray(images)
            check_finite(np.isfinite(images).all(axis=(1, 2, 3)), labels=labels)
            token_maps.append(np.asarray(token_map))
            yield denormalize(images), np.concatenate(token_maps, axis=1)

    def attention(self, tokens, labels, position: int, *, prompt=None, embeddings=None) -> np.ndarray:
        """Compute how much one position attends to every position, teacher-forced.

        Args:
          tokens: int [B, L].
          labels: int [B]; None for "no class".
          position: 0 .. L - 1.
          prompt, embeddings: instead of labels; see `conditions`.

        Returns:
          Weights float32 [B, depth, num_heads, L], which sum to 1 over the last axis.

        Raises:
          ValueError: on arguments that do not fit the model or each other, or a next-token transformer.
        """
        if not self.module.config.predicts_maps:
            raise ValueError("attention is computed for next-scale transformers only")
        tokens = self.tokenizer.check_tokens(tokens)
        conditions = self.conditions(labels, prompt, embeddings, len(tokens))
        position = check_integer("position", position, 0, self.tokenizer.num_tokens - 1)
        return np.asarray(attention_weights(self.networks, conditions, tokens, position))

    def inpaint(
        self,
        images,
        mask,
        labels=None,
        seed: int = 0,
        paste_back: bool = False,
        return_tokens: bool = False,
        batch: int | None = None,
        *,
        prompt=None,
        embeddings=None,
        **options,
    ):
        """Inpaint, outpaint or edit images: resample the tokens under a mask, without training.

        At every scale the tokens outside the mask are those of the input image (Tian et al. 2024, section
        5.3); 1x1 maps are always kept.  At the last scale every token is resampled whose cell has a masked
        pixel.

        Args:
          images: float [B, H, W, 3] in [0, 1].
          mask: bool [B, H, W] or [H, W], True where to resample; at least one pixel of each image.
          labels: int [B], the classes to edit towards; None for "no class".
          seed: image i depends on (seed, i) alone.
          paste_back: copy the pixels of the input outside the mask; otherwise they come from the decoder.
          return_tokens: also return the tokens int32 [B, L].
          batch: number of images to generate at once; all by default.
          prompt, embeddings: instead of labels; see `conditions`.
          **options: fields of `SamplingOptions`; by default guidance 3, top-k 900 and top-p 0.95 as in the
            published demonstration, which also mixes codes (smooth=True).

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: on a mask of another shape than the images or another type than bool, or that selects
            no token of an image.
          NonFiniteImages: if the weights or the options give images that are not finite.
        """
        images = self.tokenizer.check_images(images)
        conditions = self.conditions(labels, prompt, embeddings, len(images))
        options = SamplingOptions(**{**EDITING, **options})
        known = self.known_outside_mask(self.tokenizer.encode(images), mask)
        edited, tokens = self._generate(conditions, seed, options, batch, known)
        edited = np.where(np.asarray(mask)[..., None], edited, images) if paste_back else edited
        return (edited, tokens) if return_tokens else edited

    def vary(
        self,
        tokens,
        from_scale: int,
        labels=None,
        seed: int = 0,
        return_tokens: bool = False,
        batch: int | None = None,
        *,
        prompt=None,
        embeddings=None,
        **options,
    ):
        """Generate variations of images: keep the coarse maps, and resample the maps from one scale on.

        Args:
          tokens: int [B, L].
          from_scale: first map to resample (0 is the coarsest, and keeps nothing).
          labels: int [B]; a class other than the image's edits it towards that class.  None for "no class".
          seed: image i depends on (seed, i) alone.
          return_tokens: also return the tokens int32 [B, L].
          batch: number of images to generate at once; all by default.
          prompt, embeddings: instead of labels; see `conditions`.
          **options: fields of `SamplingOptions`; the published options by default.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: naming the argument that is out of range or of the wrong type.
          NonFiniteImages: if the weights or the options give images that are not finite.
        """
        known = self.known_before_scale(tokens, from_scale)
        conditions = self.conditions(labels, prompt, embeddings, len(known.tokens))
        images, tokens = self._generate(conditions, seed, SamplingOptions(**options), batch, known)
        return (images, tokens) if return_tokens else images

    def known_outside_mask(self, tokens, mask) -> KnownTokens:
        """Return the tokens that `inpaint` keeps, for `stream`.

        Args:
          tokens: int [B, L], of the images.
          mask: bool [B, H, W] or [H, W], True where to resample.

        Raises:
          ValueError: on tokens that do not fit the model, a mask of another shape than the images or another
            type than bool, or that selects no token of an image.
        """
        tokens, mask = self.tokenizer.check_tokens(tokens), np.asarray(mask)
        shape = (len(tokens), self.image_size, self.image_size)
        if mask.dtype != bool or mask.shape not in (shape, shape[1:]):
            raise ValueError(f"mask must be bool {shape} like the images, got {mask.dtype} {mask.shape}")
        mask = np.broadcast_to(mask, shape)
        resample = mask_from_pixels(mask, self.module.config.schedule)
        if len(unmasked := np.flatnonzero(~resample.any(axis=1))):
            raise ValueError(
                f"mask must select a token of every image; in image {unmasked[0]} it selects none: "
                f"{mask[unmasked[0]].sum()} of its pixels are True, and 1x1 maps are always kept"
            )
        return KnownTokens(tokens, resample)

    def known_before_scale(self, tokens, from_scale: int) -> KnownTokens:
        """Return the tokens that `vary` keeps, for `stream`.

        Args:
          tokens: int [B, L].
          from_scale: first map to resample (0 is the coarsest, and keeps nothing).

        Raises:
          ValueError: on tokens that do not fit the model, or if `from_scale` is not a scale.
        """
        tokens = self.tokenizer.check_tokens(tokens)
        return KnownTokens(tokens, mask_from_scale(from_scale, len(tokens), self.module.config.schedule))

    def generate_batches(
        self, labels, seed: int, batch: int, options: SamplingOptions, **kwargs
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (images, tokens) of up to `batch` labels at a time, as they are generated.

        Args:
          labels: int [N]; num_classes means "no class".  Or other conditions, from `conditions`.
          seed: 0 .. 2^32 - 1; image i depends on (seed, i) alone.
          batch: number of images to generate at once.
          options: sampling options.
          **kwargs: `start`, `known` and `postprocess` of `generate_in_chunks`.
        """
        batch, seed = check_integer("batch", batch, 1), check_integer("seed", seed, 0, MAX_SEED)
        conditions = self._check_conditions(labels)
        return generate_in_chunks(
            self.networks, conditions, seed, options, batch, sharding=self._sharding, **kwargs
        )

    def _generate(
        self,
        conditions: np.ndarray,
        seed: int,
        options: SamplingOptions,
        batch: int | None,
        known: KnownTokens | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate images and tokens of all conditions, `batch` at a time; all at once by default."""
        batch = len(conditions) if batch is None else batch
        batches = self.generate_batches(conditions, seed, batch, options, known=known)
        images, tokens = zip(*batches, strict=True)
        return np.concatenate(images), np.concatenate(tokens)

    def conditions(self, labels=None, prompt=None, embeddings=None, count: int | None = None) -> np.ndarray:
        """Return the conditions of images as the transformer takes them; one of the first three is given.

        Args:
          labels: of a model of classes: int [B]; num_classes means "no class".
          prompt: of a model trained on captions: a text, or B of them, where None means "no caption".
          embeddings: of a model trained on embeddings: float [B, T, D]; rows of zeros are padding, and zeros
            alone mean "no embedding".
          count: number of images, which all get a single prompt, or "no condition" if none is given.

        Returns:
          int32 [B], int32 [B, T] or float32 [B, T, D].

        Raises:
          ValueError: on another kind than that of the model, another number than `count`, and on labels,
            words or vectors that the model does not know.
        """
        config, given = self.module.config, {"labels": labels, "prompt": prompt, "embeddings": embeddings}
        names = [name for name, value in given.items() if value is not None]
        if not names and count is not None:
            return config.null_conditions(count)
        expected = ARGUMENTS[config.condition]
        if names != [expected]:
            raise ValueError(
                f"this model was trained on {config.condition}s: give {expected}=; "
                f"got {' and '.join(names) or 'nothing'}"
            )
        if prompt is not None:
            prompts = [prompt] * (count or 1) if isinstance(prompt, str) else prompt
            rows = [self._encode_prompt(text) for text in prompts]
            conditions = np.stack(rows) if rows else config.null_conditions(0)
        else:
            conditions = given[expected]
        conditions = self._check_conditions(conditions)
        if count is not None and len(conditions) != count:
            raise ValueError(f"got {count} images and {len(conditions)} {expected}")
        return conditions

    def _encode_prompt(self, prompt: str | None) -> np.ndarray:
        config = self.module.config
        if prompt is None:
            return config.null_conditions(1)[0]
        return encode_prompt(prompt, config.vocabulary, config.condition_length)

    def _check_conditions(self, conditions) -> np.ndarray:
        """Return conditions of the model's kind in its dtype; raise ValueError on others."""
        config = self.module.config
        if config.condition == "label":
            return self.check_labels(conditions)
        conditions = np.asarray(conditions)
        config.check_conditions(conditions)
        if not len(conditions) or not np.isfinite(conditions).all():
            raise ValueError(f"{config.condition}s must be finite and at least one; got {conditions.shape}")
        if config.condition == "caption" and not (
            0 <= conditions.min() <= conditions.max() < 2 + len(config.vocabulary)
        ):
            raise ValueError(
                f"word ids must be in 0 .. {1 + len(config.vocabulary)}, got {conditions.min()} .. "
                f"{conditions.max()}"
            )
        return conditions.astype(config.null_conditions(0).dtype)

    def check_labels(self, labels) -> np.ndarray:
        """Return labels as int32 [B].

        Raises:
          ValueError: on another shape or type, or numbers outside 0 .. num_classes; if the model is not one
            of classes.
        """
        kind = self.module.config.condition
        if kind != "label":
            raise ValueError(f"this model was trained on {kind}s: give {ARGUMENTS[kind]}=, not labels")
        labels = np.asarray(labels)
        if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be int [B], B at least 1; got {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > self.num_classes:
            raise ValueError(
                f"labels must be in 0 .. {self.num_classes} ({self.num_classes} means no class), "
                f"got {labels.min()} .. {labels.max()}"
            )
        return labels.astype(np.int32)


def load_tokenizer(
    path: str | Path, scales=None, step: int | str = "latest", dtype: str = "auto"
) -> LoadedTokenizer:
    """Load a tokenizer from a run, an exported model or a published `.pth` or `.safetensors` file.

    Args:
      path: the --workdir of a run, the folder of an exported model, or a file; the name of a model that comes
        with the package, such as `digits`; or `hf://owner/name[@revision][/file]`.
      scales: sides of the token maps of a file that is not of 256px.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: `auto` encodes in float32, so that tokens are the same on every platform, and decodes in bfloat16
        on accelerators and in float32 on CPU; `float32` and `bfloat16` apply to both (docs/precision.md).

    Raises:
      FileNotFoundError: if there is no such file, or no checkpoint in the run.
      ValueError: naming the tensors that do not fit; on another dtype.
    """
    return LoadedTokenizer(*load.load_tokenizer(path, scales, step, dtype))


def load_var(
    path: str | Path,
    tokenizer: LoadedTokenizer | str | Path | None = None,
    step: int | str = "latest",
    dtype: str = "auto",
) -> LoadedVAR:
    """Load a transformer (VAR, else next-token) from a run, an exported model or a published file.

    Args:
      path: as for `load_tokenizer`.
      tokenizer: tokenizer whose tokens the transformer predicts, or its path; None if `path` holds it, too.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: of the matrix products; `auto` is bfloat16 on accelerators and float32 on CPU.

    Raises:
      FileNotFoundError: if there is no such file, or no checkpoint in the run.
      ValueError: naming the tensors that do not fit; on another tokenizer's scales or another dtype.
    """
    if not isinstance(tokenizer, LoadedTokenizer):
        tokenizer = load_tokenizer(tokenizer or path, dtype=dtype)
    model, params, options, names = load.load_transformer(path, tokenizer.module.config, step, dtype)
    return LoadedVAR(model, params, options, tokenizer, names)
