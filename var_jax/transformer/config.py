"""Hyperparameters of the next-scale transformer."""

import dataclasses

from var_jax.scales import SCALES_256, Scales


@dataclasses.dataclass(frozen=True)
class NextScaleConfig:
    """Architecture of a VAR transformer; the defaults are the published d16 for 256px.

    Attributes:
      depth: number of blocks.
      width: D; 0 for the published 64 * depth.
      num_heads: N; 0 for the published head size, D / 64.
      num_classes: labels are 0 .. num_classes - 1; num_classes itself means "no class".
      num_codes: V of the tokenizer.
      code_dim: C of the tokenizer.
      scales: sides of the token maps.
      shared_adaln: one adaLN projection for all blocks and a learned offset a block.
      normalized_attention: L2-normalised queries and keys with a learned temperature a head.
      gamma_init: factor on the initial adaLN rows of the residual gates gamma.
      label_drop: share of training labels replaced by "no class".
      drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
      dropout: rate on what attention and MLP add to the residual stream.

    Raises:
      ValueError: on sizes that make no network.
    """

    depth: int = 16
    width: int = 0
    num_heads: int = 0
    num_classes: int = 1000
    num_codes: int = 4096
    code_dim: int = 32
    scales: tuple[int, ...] = SCALES_256
    shared_adaln: bool = False
    normalized_attention: bool = True
    gamma_init: float = 1e-3
    label_drop: float = 0.1
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_("scales", Scales(self.scales).sides)
        for name in ("depth", "num_classes", "num_codes", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"transformer {name} must be at least 1, found {getattr(self, name)}")
        set_("width", self.width or 64 * self.depth)
        set_("num_heads", self.num_heads or max(self.width // 64, 1))
        if self.width < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"transformer num_heads={self.num_heads} must be positive and divide width={self.width}"
            )
        for name in ("label_drop", "drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"transformer {name} must be in [0, 1), found {getattr(self, name)}")

    @property
    def schedule(self) -> Scales:
        return Scales(self.scales)

    @property
    def head_dim(self) -> int:
        """H, channels of one head."""
        return self.width // self.num_heads
