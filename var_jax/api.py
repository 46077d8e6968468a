"""What a notebook user touches: load a tokenizer and a VAR, encode, decode, generate.

Images are float32 [B, H, W, 3] in [0, 1] here, and numpy arrays come back.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from var_jax.interop import load
from var_jax.sampling.auto_batch_size import codec_batch
from var_jax.sampling.cast_params import in_compute_dtype, tokenizer_in_compute_dtype
from var_jax.sampling.editing import mask_from_pixels, mask_from_scale
from var_jax.sampling.options import MAX_SEED, SamplingOptions, check_integer
from var_jax.sampling.sampler import (
    KnownTokens,
    Networks,
    check_finite,
    device_put_global,
    generate_in_chunks,
    teacher_forced_logits,
)
from var_jax.tokenizer import model as tokenizer_model
from var_jax.transformer.model import ARTransformer

# Those of the published demonstration, but for its `more_smooth`: mixed codes are no tokens, and the tokens
# of an edit are to be those of its image.  smooth=True gives the demonstration's.
EDITING = {"guidance": 3.0, "top_p": 0.95}
OUT_OF_RANGE = 1e-3  # by which pixels may leave [0, 1], as they do after a resize or in bfloat16


class LoadedTokenizer:
    """A tokenizer with its parameters.

    Attributes:
      scales: sides of the K token maps.
      num_codes: V.
    """

    def __init__(self, model: tokenizer_model.Tokenizer, params: dict):
        self.module, self.params = model, tokenizer_in_compute_dtype(params, model)
        self.params = jax.tree.map(jnp.asarray, self.params)  # cast on the host, so that it is held once
        self.scales, self.num_codes = model.config.scales, model.config.num_codes

    def encode(self, images, batch: int | None = None) -> np.ndarray:
        """Images float [B, H, W, 3] in [0, 1] -> tokens int32 [B, L].

        Args:
          images: float of any width; up to 0.001 outside [0, 1] is clipped.
          batch: images encoded at once; by default as many as take 2 GiB or less.

        Raises:
          ValueError: on images of another size or range; says what would be right.
        """
        images = self.check_images(images) * 2 - 1
        return self._in_batches(tokenizer_model.encode, images, batch)

    def decode(self, tokens, upto: int | None = None, batch: int | None = None) -> np.ndarray:
        """Tokens int [B, L] -> images [B, H, W, 3] in [0, 1]; `upto` = k uses the first k maps only.

        Args:
          tokens: int [B, L].
          upto: how many of the maps to use; None for all.
          batch: images decoded at once; by default as many as take 2 GiB or less.

        Raises:
          ValueError: on tokens of another length, codes outside the codebook, or k outside 1 .. K.
          NonFiniteImages: on weights that make such.
        """
        tokens = self.check_tokens(tokens)
        if upto is not None:
            maps = check_integer("upto", upto, 1, len(self.scales))
            tokens = tokens[:, : self.module.config.schedule.ends[maps - 1]]
        images = self._in_batches(tokenizer_model.decode, tokens, batch) / 2 + 0.5
        check_finite(np.isfinite(images).all(axis=(1, 2, 3)))
        return images

    def decode_steps(self, tokens, batch: int | None = None) -> np.ndarray:
        """Tokens int [B, L], or of the first n maps -> images [B, n, H, W, 3] after 1, 2, ... n maps.

        `batch` is as for `decode`; n maps take no more memory than one.
        """
        tokens = self.check_tokens(tokens, whole=False)
        return self._in_batches(tokenizer_model.decode_steps, tokens, batch) / 2 + 0.5

    def _in_batches(self, function: Callable, rows: np.ndarray, batch: int | None) -> np.ndarray:
        """Apply a program to rows [B, ...], `batch` at once; the last row fills up the last batch."""
        batch = codec_batch(self.module) if batch is None else check_integer("batch", batch, 1)
        batch, results = min(batch, len(rows)), []
        for first in range(0, len(rows), batch):
            some = rows[np.minimum(np.arange(first, first + batch), len(rows) - 1)]
            result = function(self.module, self.params, jnp.asarray(some))
            results.append(np.asarray(result)[: len(rows) - first])
        return np.concatenate(results)

    def check_images(self, images) -> np.ndarray:
        """Images as float32 [B, H, W, 3] in [0, 1].  Raises ValueError on another size, type or range."""
        images, side = np.asarray(images), self.module.config.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3) or not len(images):
            result = f"got shape {images.shape}"
            raise ValueError(f"images must be [B, {side}, {side}, 3], {result}; B must be at least 1")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}; divide uint8 by 255")
        images = images.astype(np.float32)
        if not (images.min() >= -OUT_OF_RANGE and images.max() <= 1 + OUT_OF_RANGE):
            raise ValueError(f"images must be in [0, 1], got {images.min():.6g} .. {images.max():.6g}")
        return images.clip(0, 1)

    def check_tokens(self, tokens, whole: bool = True) -> np.ndarray:
        """Tokens as int32 [B, L], or of the first maps where they need not be whole.

        Raises:
          ValueError: on another shape, or codes outside the codebook.
        """
        tokens, ends = np.asarray(tokens), self.module.config.schedule.ends
        lengths = ends[-1:] if whole else ends
        fits = tokens.ndim == 2 and tokens.shape[1] in lengths and len(tokens)
        if not fits or not np.issubdtype(tokens.dtype, np.integer):
            expected = " or ".join(str(length) for length in lengths)
            result = f"got {tokens.dtype} {tokens.shape}"
            raise ValueError(f"tokens must be int [B, {expected}], {result}; B must be at least 1")
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
      options: how its run draws its previews; the published options for a published file.
    """

    def __init__(
        self, model: ARTransformer, params: dict, options: SamplingOptions, tokenizer: LoadedTokenizer
    ):
        self.module, self.options, self.tokenizer = model, options, tokenizer
        self.params = in_compute_dtype(params, model.dtype)
        self.params = jax.tree.map(jnp.asarray, self.params)  # cast on the host, so that it is held once
        self.num_classes, self.depth = model.config.num_classes, model.config.depth
        self._sharding = None

    @property
    def networks(self) -> Networks:
        """Modules and parameters, as the functions of `sampling/sampler.py` take them."""
        return Networks(self.tokenizer.module, self.module, self.tokenizer.params, self.params)

    def replicate(self, devices=None) -> "LoadedVAR":
        """Replicate the parameters on all devices (of all hosts), which then share every batch."""
        devices = jax.devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        everywhere = partial(
            jax.tree.map, partial(device_put_global, sharding=NamedSharding(mesh, PartitionSpec()))
        )
        tokenizer = LoadedTokenizer(self.tokenizer.module, everywhere(self.tokenizer.params))
        model = LoadedVAR(self.module, everywhere(self.params), self.options, tokenizer)
        model._sharding = NamedSharding(mesh, PartitionSpec("data"))
        return model

    def logits(self, tokens, labels) -> np.ndarray:
        """Teacher-forced logits float32 [B, L, V] of tokens int [B, L] given labels int [B]."""
        tokens, labels = self.tokenizer.check_tokens(tokens), self.check_labels(labels)
        if len(tokens) != len(labels):
            raise ValueError(f"got tokens of {len(tokens)} images and {len(labels)} labels")
        return np.asarray(teacher_forced_logits(self.networks, labels, tokens))

    def generate(
        self,
        labels,
        seed: int = 0,
        guidance=1.5,
        top_k=900,
        top_p=0.96,
        smooth=False,
        return_tokens: bool = False,
        batch: int | None = None,
        **more,
    ):
        """Draws one image a label; the same seed gives the same images.

        The defaults are the published ones, whatever the model was trained on; `sample` has those of its run.

        Args:
          labels: int [B]; num_classes means "no class".
          seed: 0 .. 2^32 - 1; image i depends on (seed, i) alone.
          guidance: strength of classifier-free guidance at the last scale, rising from 0; or one a scale.
          top_k, top_p: draw among the likeliest codes only; 0 for all; one value, or one a scale.
          smooth: mix codes instead of drawing one.
          return_tokens: also return the tokens int32 [B, L].
          batch: images made at once; all by default.
          **more: other fields of `SamplingOptions`: temperature, guidance_schedule, guidance_until, upto.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: naming the argument that is out of range or of another type.
          NonFiniteImages: on weights or options that make such.
        """
        options = SamplingOptions(guidance=guidance, top_k=top_k, top_p=top_p, smooth=smooth, **more)
        images, tokens = self._drawn(labels, seed, options, batch)
        return (images, tokens) if return_tokens else images

    def sample(self, labels, seed: int = 0, return_tokens: bool = False, batch: int | None = None, **options):
        """Draw one image a label as the model's run does its previews, and as sample.py does by default.

        Args:
          labels, seed, return_tokens, batch: as for `generate`.
          **options: fields of `SamplingOptions`; by default those of `self.options`.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError, NonFiniteImages: as `generate`.
        """
        options = dataclasses.replace(self.options, **options)
        images, tokens = self._drawn(labels, seed, options, batch)
        return (images, tokens) if return_tokens else images

    def inpaint(
        self,
        images,
        mask,
        labels=None,
        seed: int = 0,
        paste_back: bool = False,
        return_tokens: bool = False,
        batch: int | None = None,
        **options,
    ):
        """Makes a part of images anew: in- and out-painting, or editing towards a class, without training.

        At every scale the tokens outside the mask are those of the given image (Tian et al. 2024, section
        5.3); 1x1 maps are always kept.  At the last scale every token is drawn whose cell has a masked pixel.

        Args:
          images: float [B, H, W, 3] in [0, 1].
          mask: bool [B, H, W] or [H, W], True where to make anew; at least one pixel of each image.
          labels: int [B], the classes to edit towards; None for "no class".
          seed: image i depends on (seed, i) alone.
          paste_back: put the pixels of the input back outside the mask; else they come from the decoder.
          return_tokens: also return the tokens int32 [B, L].
          batch: images made at once; all by default.
          **options: fields of `SamplingOptions`; by default guidance 3, top-k 900 and top-p 0.95 as in the
            published demonstration, which also mixes codes (smooth=True).

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: on a mask of another size or type than the images, or that marks nothing to draw.
        """
        images, mask = self.tokenizer.check_images(images), np.asarray(mask)
        if mask.dtype != bool or mask.shape not in (images.shape[:3], images.shape[1:3]):
            raise ValueError(
                f"mask must be bool {images.shape[:3]} like the images, got {mask.dtype} {mask.shape}"
            )
        mask = np.broadcast_to(mask, images.shape[:3])
        resample = mask_from_pixels(mask, self.module.config.schedule)
        if len(unchanged := np.flatnonzero(~resample.any(axis=1))):
            raise ValueError(
                f"mask must mark something to draw in every image; in image {unchanged[0]} no token is to be "
                f"drawn: {mask[unchanged[0]].sum()} of its pixels are True, and 1x1 maps are always kept"
            )
        labels, options = self._labels_of(len(images), labels), SamplingOptions(**{**EDITING, **options})
        tokens = self.tokenizer.encode(images)
        made, tokens = self._drawn(labels, seed, options, batch, KnownTokens(tokens, resample))
        made = np.where(mask[..., None], made, images) if paste_back else made
        return (made, tokens) if return_tokens else made

    def vary(
        self,
        tokens,
        from_scale: int,
        labels=None,
        seed: int = 0,
        return_tokens: bool = False,
        batch: int | None = None,
        **options,
    ):
        """Draws the maps of images anew from one scale on: what is coarse stays, what is fine is renewed.

        Args:
          tokens: int [B, L].
          from_scale: the first map to draw anew; 0 keeps nothing.
          labels: int [B]; another class than the image's leads from one to the other.  None for "no class".
          seed, return_tokens, batch, options: as for `inpaint`; the published options by default.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).
        """
        tokens = self.tokenizer.check_tokens(tokens)
        given = KnownTokens(tokens, mask_from_scale(from_scale, len(tokens), self.module.config.schedule))
        labels = self._labels_of(len(tokens), labels)
        made, tokens = self._drawn(labels, seed, SamplingOptions(**options), batch, given)
        return (made, tokens) if return_tokens else made

    def generate_batches(
        self, labels, seed: int, batch: int, options: SamplingOptions, **more
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Like `generate`, but gives (images, tokens) of up to `batch` labels at a time, as they are made.

        Args:
          more: `start`, `given` and `finish` of `generate_in_chunks`.
        """
        batch, seed = check_integer("batch", batch, 1), check_integer("seed", seed, 0, MAX_SEED)
        labels = self.check_labels(labels)
        return generate_in_chunks(
            self.networks, labels, seed, options, batch, sharding=self._sharding, **more
        )

    def _drawn(
        self, labels, seed: int, options: SamplingOptions, batch: int | None, given: KnownTokens | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images and tokens of all labels, `batch` at a time, all at once by default."""
        labels = self.check_labels(labels)
        batch = len(labels) if batch is None else batch
        images, tokens = zip(*self.generate_batches(labels, seed, batch, options, given=given), strict=True)
        return np.concatenate(images), np.concatenate(tokens)

    def _labels_of(self, count: int, labels) -> np.ndarray:
        """Labels int32 of so many images that are given; None for "no class"."""
        labels = self.check_labels(np.full(count, self.num_classes) if labels is None else labels)
        if len(labels) != count:
            raise ValueError(f"got {count} images and {len(labels)} labels")
        return labels

    def check_labels(self, labels) -> np.ndarray:
        """Labels as int32 [B].  Raises ValueError on another shape, or numbers that are no class."""
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
    """Loads a tokenizer from a run directory or a published `.pth` or `.safetensors` file.

    Args:
      path: the --workdir of a run, or a file.
      scales: sides of the token maps, where a file's are not those of 256px.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: `auto` encodes in float32, so that tokens are the same on every platform, and decodes in bfloat16
        on accelerators and in float32 on CPU; `float32` and `bfloat16` are for both (docs/precision.md).

    Raises:
      FileNotFoundError: where there is nothing of the kind.
      ValueError: where the tensors do not fit, naming them; on another dtype.
    """
    return LoadedTokenizer(*load.load_tokenizer(path, scales, step, dtype))


def load_var(
    path: str | Path, tokenizer: LoadedTokenizer, step: int | str = "latest", dtype: str = "auto"
) -> LoadedVAR:
    """Loads a transformer from a run (VAR, else next-token) or a published file; see `load_tokenizer`.

    Its `dtype` is that of the matrix products: bfloat16 on accelerators and float32 on CPU by default.
    """
    return LoadedVAR(*load.load_transformer(path, tokenizer.module.config, step, dtype), tokenizer)
