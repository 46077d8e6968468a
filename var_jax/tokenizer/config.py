"""Hyperparameters of the tokenizer: what decides the shapes of its parameters."""

import dataclasses
import functools

from var_jax.scales import SCALES_256, Scales

GRADIENTS = ("straight_through", "rotation")
# What the fields of the networks come to with patches: 3 channels at full resolution, nothing to train.
NO_NETWORK = dict(ch=3, ch_mult=(1,), num_blocks=1, norm_groups=1, dropout=0.0)
NO_NETWORK |= dict(vq_gradient="straight_through", quantizer_dropout=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a multi-scale VQ-VAE, the published one for 256px by default; or patches of pixels.

    Attributes:
      scales: sides of the token maps; the last is the side of the features.
      num_codes: V, rows of the codebook.
      code_dim: C, channels of the codes and of the features.
      ch: channels at full resolution.
      ch_mult: multiplier of `ch` at each level; each level but the first halves the side.
      num_blocks: residual blocks a level in the encoder (the decoder has one more).
      num_phis: convolutions shared by the scales, applied to what each map adds; 0 for none.
      l2_normalized: match codes by direction and use them as unit vectors (Yu et al. 2021, ViT-VQGAN).
      vq_gradient: gradient through the quantizer, `straight_through` (Bengio et al. 2013) or `rotation`
        (Fifty et al. 2024).
      norm_groups: groups of every GroupNorm; must divide the channels of every level.
      dropout: rate inside the residual blocks.
      quantizer_dropout: share of the training images that are decoded from a random number of their first
        maps only (Li et al. 2024, ImageFolder): it makes the coarse maps tell what the image is about.
      patch: 0 for the convolutional networks; else there are none, and the features are the patches of so
        many pixels a side as they are.  `code_dim` is then 3 patch^2 and the fields of `NO_NETWORK` have
        their values there, whatever is given: with nothing to train but codes, they mean nothing.

    Raises:
      ValueError: on a schedule or a size that makes no network.
    """

    scales: tuple[int, ...] = SCALES_256
    num_codes: int = 4096
    code_dim: int = 32
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    num_phis: int = 4
    l2_normalized: bool = False
    vq_gradient: str = "straight_through"
    norm_groups: int = 32
    dropout: float = 0.0
    quantizer_dropout: float = 0.0
    patch: int = 0

    def __post_init__(self):
        object.__setattr__(self, "scales", Scales(self.scales).sides)
        if self.patch < 0:
            raise ValueError(f"tokenizer patch must be 0 (networks) or a side in pixels, got {self.patch}")
        if self.patch:
            self._become_patches()
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for name in ("num_codes", "code_dim", "ch", "num_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer {name} must be at least 1, got {getattr(self, name)}")
        if self.vq_gradient not in GRADIENTS:
            raise ValueError(f"tokenizer gradient must be one of {GRADIENTS}, got {self.vq_gradient!r}")
        if self.num_phis < 0:
            raise ValueError(f"tokenizer num_phis must be 0 (none) or more, got {self.num_phis}")
        for name in ("dropout", "quantizer_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"tokenizer {name} must be in [0, 1), got {getattr(self, name)}")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"tokenizer ch_mult must be multipliers of at least 1, got {self.ch_mult}")
        for mult in (1, *self.ch_mult):  # the first level starts from `ch`
            if self.ch * mult % self.norm_groups:
                raise ValueError(
                    f"tokenizer norm_groups={self.norm_groups} must divide the channels of every level, "
                    f"but ch * {mult} = {self.ch * mult}"
                )

    def _become_patches(self):
        """Sets what patches decide, so that two tokenizers that are the same are equal."""
        # Codes are decoded as they are, so that they must be pixels.
        for name, off in (("num_phis", 0), ("l2_normalized", False)):
            if (value := getattr(self, name)) != off:
                raise ValueError(f"tokenizer {name} must be {off} with patch={self.patch}, got {value}")
        for name, value in (NO_NETWORK | {"code_dim": 3 * self.patch**2}).items():
            object.__setattr__(self, name, value)

    @functools.cached_property
    def schedule(self) -> Scales:
        return Scales(self.scales)

    @property
    def downsample(self) -> int:
        """Side of an image over side of its features."""
        return self.patch or 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.scales[-1] * self.downsample
