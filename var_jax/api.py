"""What a notebook user touches: load a tokenizer and a VAR, encode, decode, generate.

Images are float32 [B, H, W, 3] in [0, 1] here, and numpy arrays come back.
"""

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from var_jax.interop import load
from var_jax.sampling.generate import SamplingOptions, generate_in_chunks, teacher_forced_logits
from var_jax.tokenizer import model as tokenizer_model
from var_jax.transformer.next_scale import NextScale


class LoadedTokenizer:
    """A tokenizer with its parameters.

    Attributes:
      scales: sides of the K token maps.
      num_codes: V.
    """

    def __init__(self, model: tokenizer_model.Tokenizer, params: dict):
        self.module, self.params = model, params
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

    def check_tokens(self, tokens) -> jnp.ndarray:
        """Tokens as int32 [B, L].  Raises ValueError on another shape, or codes outside the codebook."""
        tokens, length = np.asarray(tokens), self.module.config.schedule.length
        if tokens.ndim != 2 or tokens.shape[1] != length or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be int [B, {length}], found {tokens.dtype} {tokens.shape}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.num_codes):
            raise ValueError(
                f"tokens must be in 0 .. {self.num_codes - 1}, found {tokens.min()} .. {tokens.max()}"
            )
        return jnp.asarray(tokens, jnp.int32)


class LoadedVAR:
    """A VAR transformer with its parameters and its tokenizer.

    Attributes:
      num_classes: labels are 0 .. num_classes - 1; num_classes itself means "no class".
      depth: number of blocks.
      options: how its run draws its previews; the published options for a published file.
    """

    def __init__(self, model: NextScale, params: dict, options: SamplingOptions, tokenizer: LoadedTokenizer):
        self.module, self.params, self.options, self.tokenizer = model, params, options, tokenizer
        self.num_classes, self.depth = model.config.num_classes, model.config.depth

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
        guidance: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        smooth: bool = False,
        return_tokens: bool = False,
        batch: int | None = None,
    ):
        """Draws one image a label; the same seed gives the same images.

        Args:
          labels: int [B]; num_classes means "no class".
          seed: image i depends on (seed, i) alone.
          guidance: strength of classifier-free guidance at the last scale, rising from 0.
          top_k, top_p: draw among the likeliest codes only; 0 for all.
          smooth: mix codes instead of drawing one.
          return_tokens: also return the tokens int32 [B, L].
          batch: images made at once; all by default.

        Returns:
          Images float32 [B, H, W, 3] in [0, 1], or (images, tokens).
        """
        labels = self.check_labels(labels)
        options = dict(guidance=guidance, top_k=top_k, top_p=top_p, smooth=smooth)
        parts = list(self.generate_batches(labels, seed, len(labels) if batch is None else batch, **options))
        images, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
        return (images, tokens) if return_tokens else images

    def generate_batches(
        self, labels, seed: int, batch: int, **options
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Like `generate`, but gives (images, tokens) of up to `batch` labels at a time, as they are made."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, found {batch}")
        return generate_in_chunks(
            self.tokenizer.module,
            self.module,
            self.tokenizer.params,
            self.params,
            self.check_labels(labels),
            seed,
            SamplingOptions(**options),
            chunk=batch,
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


def load_tokenizer(path: str | Path, scales=None, step: int | str = "latest") -> LoadedTokenizer:
    """Loads a tokenizer from a run directory or a published `.pth` or `.safetensors` file.

    Args:
      path: the --workdir of a run, or a file.
      scales: sides of the token maps, where a file's are not those of 256px.
      step: checkpoint of a run: a step, `latest` or `best`.

    Raises:
      FileNotFoundError: where there is nothing of the kind.
      ValueError: where the tensors do not fit, naming them.
    """
    return LoadedTokenizer(*load.load_tokenizer(path, scales, step))


def load_var(path: str | Path, tokenizer: LoadedTokenizer, step: int | str = "latest") -> LoadedVAR:
    """Loads a VAR transformer from a run directory or a published file; see `load_tokenizer`."""
    return LoadedVAR(*load.load_next_scale(path, tokenizer.module.config, step), tokenizer)
