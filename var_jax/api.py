"""What a notebook user touches: load a tokenizer and a VAR, encode, decode, generate.

Images are float32 [B, H, W, 3] in [0, 1] here, and numpy arrays come back.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from var_jax.interop import load
from var_jax.sampling.generate import Given, generate_in_chunks, put, teacher_forced_logits
from var_jax.sampling.keep import anew_from_scale, anew_under_mask
from var_jax.sampling.options import SamplingOptions
from var_jax.sampling.precision import in_compute_dtype, tokenizer_in_compute_dtype
from var_jax.tokenizer import model as tokenizer_model
from var_jax.transformer.trunk import Trunk

EDITING = {"guidance": 3.0, "top_p": 0.95}  # the published demonstration's


class LoadedTokenizer:
    """A tokenizer with its parameters.

    Attributes:
      scales: sides of the K token maps.
      num_codes: V.
    """

    def __init__(self, model: tokenizer_model.Tokenizer, params: dict):
        self.module, self.params = model, tokenizer_in_compute_dtype(params, model)
        self.scales, self.num_codes = model.config.scales, model.config.num_codes

    def encode(self, images) -> np.ndarray:
        """Images [B, H, W, 3] in [0, 1] -> tokens int32 [B, L].

        Raises:
          ValueError: on images of another size or range; says what would be right.
        """
        images = np.asarray(images)
        side = self.module.config.image_size
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise ValueError(f"images must be [B, {side}, {side}, 3], found shape {images.shape}")
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images must be floats in [0, 1], found {images.dtype}; divide uint8 by 255")
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(f"images must be in [0, 1], found {images.min():.3g} .. {images.max():.3g}")
        images = jnp.asarray(images, jnp.float32) * 2 - 1
        return np.asarray(tokenizer_model.encode(self.module, self.params, images))

    def decode(self, tokens, upto: int | None = None) -> np.ndarray:
        """Tokens int [B, L] -> images [B, H, W, 3] in [0, 1]; `upto` = k uses the first k maps only.

        Raises:
          ValueError: on tokens of another length, codes outside the codebook, or k outside 1 .. K.
        """
        tokens = self.check_tokens(tokens)
        if upto is not None:
            if not 1 <= upto <= len(self.scales):
                raise ValueError(
                    f"upto must be in 1 .. {len(self.scales)}, the number of scales; found {upto}"
                )
            tokens = tokens[:, : self.module.config.schedule.ends[upto - 1]]
        images = tokenizer_model.decode(self.module, self.params, tokens)
        return np.asarray(images) / 2 + 0.5

    def decode_steps(self, tokens) -> np.ndarray:
        """Tokens int [B, L], or of the first n maps -> images [B, n, H, W, 3] after 1, 2, ... n maps."""
        images = tokenizer_model.decode_steps(
            self.module, self.params, self.check_tokens(tokens, whole=False)
        )
        return np.asarray(images) / 2 + 0.5

    def check_tokens(self, tokens, whole: bool = True) -> jnp.ndarray:
        """Tokens as int32 [B, L], or of the first maps where they need not be whole.

        Raises:
          ValueError: on another shape, or codes outside the codebook.
        """
        tokens, ends = np.asarray(tokens), self.module.config.schedule.ends
        lengths = ends[-1:] if whole else ends
        if tokens.ndim != 2 or tokens.shape[1] not in lengths or not np.issubdtype(tokens.dtype, np.integer):
            expected = " or ".join(str(length) for length in lengths)
            raise ValueError(f"tokens must be int [B, {expected}], found {tokens.dtype} {tokens.shape}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.num_codes):
            raise ValueError(
                f"tokens must be in 0 .. {self.num_codes - 1}, found {tokens.min()} .. {tokens.max()}"
            )
        return jnp.asarray(tokens, jnp.int32)


class LoadedVAR:
    """A transformer, VAR or next-token, with its parameters and its tokenizer.

    Attributes:
      num_classes: labels are 0 .. num_classes - 1; num_classes itself means "no class".
      depth: number of blocks.
      options: how its run draws its previews; the published options for a published file.
    """

    def __init__(self, model: Trunk, params: dict, options: SamplingOptions, tokenizer: LoadedTokenizer):
        self.module, self.options, self.tokenizer = model, options, tokenizer
        self.params = in_compute_dtype(params, model.dtype)
        self.num_classes, self.depth = model.config.num_classes, model.config.depth
        self._sharding = None

    def spread(self, devices=None) -> "LoadedVAR":
        """This model with its parameters on all devices (of all hosts), which then share every batch."""
        devices = jax.devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        everywhere = partial(jax.tree.map, partial(put, sharding=NamedSharding(mesh, PartitionSpec())))
        tokenizer = LoadedTokenizer(self.tokenizer.module, everywhere(self.tokenizer.params))
        model = LoadedVAR(self.module, everywhere(self.params), self.options, tokenizer)
        model._sharding = NamedSharding(mesh, PartitionSpec("data"))
        return model

    def logits(self, tokens, labels) -> np.ndarray:
        """Teacher-forced logits float32 [B, L, V] of tokens int [B, L] given labels int [B]."""
        tokens, labels = self.tokenizer.check_tokens(tokens), self.check_labels(labels)
        if len(tokens) != len(labels):
            raise ValueError(f"found tokens of {len(tokens)} images and {len(labels)} labels")
        networks = (self.tokenizer.module, self.module, self.tokenizer.params, self.params)
        return np.asarray(teacher_forced_logits(*networks, labels, tokens))

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

        Args:
          labels: int [B]; num_classes means "no class".
          seed: image i depends on (seed, i) alone.
          guidance: strength of classifier-free guidance at the last scale, rising from 0; or one a scale.
          top_k, top_p: draw among the likeliest codes only; 0 for all; one value, or one a scale.
          smooth: mix codes instead of drawing one.
          return_tokens: also return the tokens int32 [B, L].
          batch: images made at once; all by default.
          **more: other fields of `SamplingOptions`: temperature, guidance_schedule, guidance_until, upto.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).
        """
        options = SamplingOptions(guidance=guidance, top_k=top_k, top_p=top_p, smooth=smooth, **more)
        labels = self.check_labels(labels)
        batch = len(labels) if batch is None else batch
        images, tokens = _joined(self.generate_batches(labels, seed, batch, options))
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
        5.3); 1x1 maps are always kept.

        Args:
          images: float [B, H, W, 3] in [0, 1].
          mask: bool [B, H, W] or [H, W], True where to make anew.
          labels: int [B], the classes to edit towards; None for "no class".
          seed: image i depends on (seed, i) alone.
          paste_back: put the pixels of the input back outside the mask; else they come from the decoder.
          return_tokens: also return the tokens int32 [B, L].
          batch: images made at once; all by default.
          **options: fields of `SamplingOptions`; by default those of the published demonstration.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).

        Raises:
          ValueError: on a mask of another size or type than the images.
        """
        tokens = self.tokenizer.encode(images)
        images, mask = np.asarray(images, np.float32), np.asarray(mask)
        if mask.dtype != bool or mask.shape not in (images.shape[:3], images.shape[1:3]):
            raise ValueError(
                f"mask must be bool {images.shape[:3]} like the images, found {mask.dtype} {mask.shape}"
            )
        mask = np.broadcast_to(mask, images.shape[:3])
        anew = anew_under_mask(mask, self.module.config.schedule)
        made, tokens = self._anew(tokens, anew, labels, seed, batch, {**EDITING, **options})
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
        tokens = np.asarray(self.tokenizer.check_tokens(tokens))
        anew = anew_from_scale(from_scale, len(tokens), self.module.config.schedule)
        made, tokens = self._anew(tokens, anew, labels, seed, batch, options)
        return (made, tokens) if return_tokens else made

    def generate_batches(
        self, labels, seed: int, batch: int, options: SamplingOptions, **more
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Like `generate`, but gives (images, tokens) of up to `batch` labels at a time, as they are made.

        Args:
          more: `start`, `given` and `finish` of `generate_in_chunks`.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, found {batch}")
        networks = (self.tokenizer.module, self.module, self.tokenizer.params, self.params)
        labels = self.check_labels(labels)
        return generate_in_chunks(*networks, labels, seed, options, batch, sharding=self._sharding, **more)

    def _anew(self, tokens, anew, labels, seed: int, batch: int | None, options: dict):
        """Draws the tokens `anew` [B, L] again, beside the others."""
        labels = self.check_labels(np.full(len(tokens), self.num_classes) if labels is None else labels)
        if len(tokens) != len(labels):
            raise ValueError(f"found {len(tokens)} images and {len(labels)} labels")
        given = Given(tokens, anew)
        return _joined(
            self.generate_batches(labels, seed, batch or len(labels), SamplingOptions(**options), given=given)
        )

    def check_labels(self, labels) -> np.ndarray:
        """Labels as int32 [B].  Raises ValueError on another shape, or numbers that are no class."""
        labels = np.asarray(labels)
        if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be int [B], B at least 1; found {labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() > self.num_classes:
            raise ValueError(
                f"labels must be in 0 .. {self.num_classes} ({self.num_classes} means no class), "
                f"found {labels.min()} .. {labels.max()}"
            )
        return labels.astype(np.int32)


def _joined(batches: Iterator[tuple]) -> tuple[np.ndarray, np.ndarray]:
    images, tokens = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(tokens)


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
