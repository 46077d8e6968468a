"""Architecture of the tokenizer: the hyperparameters that determine the shapes of its parameters."""

import dataclasses
import functools

from var_jax.scales import SCALES_256, Scales

GRADIENTS = ("straight_through", "rotation")
# Values of the fields of the networks for patches: 3 channels at full resolution, nothing to train.
NO_NETWORK = dict(ch=3, ch_mult=(1,), num_blocks=1, norm_groups=1, dropout=0.0)
NO_NETWORK |= dict(vq_gradient="straight_through", quantizer_dropout=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Architecture of a multi-scale VQ-VAE, by default the published one for 256px; or raw patches of pixels.

    Attributes:
      scales: sides of the token maps; the last is the side of the features.
      num_codes: V, rows of the codebook.
      code_dim: C, channels of the codes and of the features.
      ch: channels at full resolution.
      ch_mult: multiplier of `ch` at each level; each level but the first halves the side.
      num_blocks: residual blocks per level of the encoder (the decoder has one more).
      num_phis: convolutions phi, shared by the scales and applied to each upsampled map; 0 for none.
      l2_normalized: match codes by direction and use them as unit vectors (Yu et al. 2021, ViT-VQGAN).
      vq_gradient: gradient through the quantizer, `straight_through` (Bengio et al. 2013) or `rotation`
        (Fifty et al. 2024).
      norm_groups: groups of every GroupNorm; must divide the channels of every level.
      dropout: dropout rate of the residual blocks.
      quantizer_dropout: fraction of the training images that are decoded from a random number of their first
        maps only, so that the coarse maps carry the main content (Li et al. 2024, ImageFolder).
      patch: 0 for the convolutional networks.  Otherwise there are no networks, and the features are raw
        patches of patch x patch pixels; `code_dim` is then 3 patch^2, and the fields of `NO_NETWORK` have
        the values there regardless of the arguments, since only the codebook is trained.

    Raises:
      ValueError: on an invalid schedule or size.
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
            self._set_patch_fields()
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for name in ("num_codes", "code_dim", "ch", "num_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer {name} must be at least 1, got {getattr(self, name)}")
        if self.vq_gradient not in GRADIENTS:
            raise ValueError(f"tokenizer vq_gradient must be one of {GRADIENTS}, got {self.vq_gradient!r}")
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

    def _set_patch_fields(self):
        """Set the fields that have no effect with patches, so that equivalent configs compare equal."""
        # Codes are decoded without a network, so they must be pixels.
        for name, required in (("num_phis", 0), ("l2_normalized", False)):
            if (value := getattr(self, name)) != required:
                raise ValueError(f"tokenizer {name} must be {required} with patch={self.patch}, got {value}")
        for name, value in (NO_NETWORK | {"code_dim": 3 * self.patch**2}).items():
            object.__setattr__(self, name, value)

    @functools.cached_property
    def schedule(self) -> Scales:
        """Positions of the token maps in the sequence."""
        return Scales(self.scales)

    @property
    def downsample(self) -> int:
        """Ratio of the side of an image to that of its features."""
        return self.patch or 2 ** (len(self.ch_mult) - 1)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.scales[-1] * self.downsample
