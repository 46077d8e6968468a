"""Architectures of the next-scale and next-token transformers, with their order of prediction."""

import abc
import dataclasses
import functools
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from var_jax.conditions import KINDS, PADDING
from var_jax.scales import SCALES_256, Scales
from var_jax.transformer.orders import inverse_permutation, prediction_order
from var_jax.transformer.positions import (
    PositionTables,
    TokenCoords,
    order_coords,
    parse_positions,
    position_tables,
    scale_coords,
    sequence_masks,
)

MAP_MASKS = ("block_causal", "block_diagonal")  # of next-scale transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(abc.ABC):
    """Architecture of a transformer and its order of prediction; the defaults are the published d16.

    Attributes:
      depth: number of blocks.
      width: D; 0 for the published 64 * depth.
      num_heads: N; 0 for the published head size, D / 64.
      num_classes: labels are 0 .. num_classes - 1; num_classes itself means "no class".
      num_codes: V of the tokenizer.
      code_dim: C of the tokenizer.
      scales: sides of the token maps.
      shared_adaln: use one adaLN projection for all blocks and a learned offset per block.
      normalized_attention: L2-normalize queries and keys, with a learned temperature per head.
      gamma_init: factor on the initial adaLN kernel of the residual gates gamma.
      class_dropout_prob: probability of replacing a training condition by "no condition".
      drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
      dropout: dropout rate of the outputs of attention and MLP.
      positions: kinds of position encodings (see `transformer/positions.py`).
      condition: kind of condition, one of `conditions.KINDS`.
      condition_length: T, maximum number of words of a caption, or of vectors of an embedding.
      condition_width: channels of an embedding's vectors.
      vocabulary: words of the captions.
      text_depth: number of blocks of the caption encoder.

    Raises:
      ValueError: on invalid sizes, or an unknown kind of positions or of condition.
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
    class_dropout_prob: float = 0.1
    drop_path: float = 0.0
    dropout: float = 0.0
    positions: str = "learned_1d"
    condition: str = "label"
    condition_length: int = 0
    condition_width: int = 0
    vocabulary: tuple[str, ...] = ()
    text_depth: int = 2

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        set_("scales", Scales(self.scales).sides)
        set_("vocabulary", tuple(self.vocabulary))
        for name in ("depth", "num_classes", "num_codes", "code_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"transformer {name} must be at least 1, got {getattr(self, name)}")
        set_("width", self.width or 64 * self.depth)
        set_("num_heads", self.num_heads or max(self.width // 64, 1))
        if self.width < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"transformer num_heads={self.num_heads} must be positive and divide width={self.width}"
            )
        for name in ("class_dropout_prob", "drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"transformer {name} must be in [0, 1), got {getattr(self, name)}")
        parse_positions(self.positions, self.width, self.head_dim)
        if self.condition not in KINDS:
            raise ValueError(
                f"transformer condition must be one of {', '.join(KINDS)}; got {self.condition!r}"
            )
        sizes = {
            "caption": ("condition_length", "text_depth"),
            "embedding": ("condition_length", "condition_width"),
        }
        for name in sizes.get(self.condition, ()):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"transformer {name} must be at least 1 with condition={self.condition}, got "
                    f"{getattr(self, name)}"
                )

    @functools.cached_property
    def schedule(self) -> Scales:
        """Positions of the token maps in the sequence."""
        return Scales(self.scales)

    @property
    def head_dim(self) -> int:
        """H, channels of one head."""
        return self.width // self.num_heads

    @property
    def length(self) -> int:
        """L, positions of the sequence."""
        return self.schedule.length

    @property
    def null_condition(self) -> int:
        """Return the value of all entries of "no condition": the label after the last, or padding."""
        return self.num_classes if self.condition == "label" else PADDING

    def null_conditions(
        self, batch: int
    ) -> Int32[np.ndarray, " B"] | Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T E"]:
        """Return "no condition" for `batch` images, with the shape and dtype that conditions have."""
        sizes = {"label": (), "caption": (self.condition_length,)}
        shape = sizes.get(self.condition, (self.condition_length, self.condition_width))
        dtype = np.float32 if self.condition == "embedding" else np.int32
        return np.full((batch, *shape), self.null_condition, dtype)

    def check_conditions(self, conditions: Shaped[Array | np.ndarray, "..."]) -> None:
        """Check that conditions are of the kind and the size that the transformer takes.

        Raises:
          ValueError: if they are not.
        """
        null, shape = self.null_conditions(1), np.shape(conditions)
        is_integer = np.issubdtype(conditions.dtype, np.integer)
        fits = len(shape) == null.ndim and is_integer == np.issubdtype(null.dtype, np.integer)
        if fits and null.ndim > 1:
            fits = 1 <= shape[1] <= self.condition_length and shape[2:] == null.shape[2:]
        if not fits:
            sizes = ", ".join(["B", f"up to {self.condition_length}", f"{self.condition_width}"][: null.ndim])
            raise ValueError(
                f"this transformer is conditioned on {self.condition}s, {null.dtype} [{sizes}]; got "
                f"{conditions.dtype} {list(shape)}"
            )

    predicts_maps: ClassVar[bool]  # True: a step predicts a token map; False: a step predicts one token

    @property
    @abc.abstractmethod
    def steps(self) -> list[tuple[int, int]]:
        """Positions (start, end) predicted by each step, in prediction order."""

    @property
    @abc.abstractmethod
    def masks(self) -> tuple[Bool[np.ndarray, "L L"], ...]:
        """M masks, True where a query (row) sees a key (column); block i uses number i modulo M."""

    @property
    @abc.abstractmethod
    def coords(self) -> TokenCoords:
        """Coordinates of the positions in the image."""

    @property
    @abc.abstractmethod
    def levels(self) -> Int32[np.ndarray, " L"] | None:
        """Scale of each position; None for a transformer without level embeddings."""

    @abc.abstractmethod
    def to_prediction_order(self, tokens: Shaped[Array, "B L *dims"]) -> Shaped[Array, "B L *dims"]:
        """Reorder positions from raster order, the tokenizer's layout, to prediction order."""

    @abc.abstractmethod
    def to_raster_order(self, predicted: Shaped[Array, "B L *dims"]) -> Shaped[Array, "B L *dims"]:
        """Reorder positions from prediction order to raster order, the tokenizer's layout."""

    @property
    def uses_cache(self) -> bool:
        """Return whether a step of generation attends to the keys and values of earlier steps."""
        return True

    @property
    def num_start_tokens(self) -> int:
        """Number of start tokens: the positions of the first step, whose input is the label alone."""
        return self.steps[0][1]

    @functools.cached_property
    def position_tables(self) -> PositionTables:
        """Constant tables of all positions."""
        return position_tables(
            self.positions, self.coords, self.levels, self.masks, self.width, self.head_dim
        )

    @property
    def relative(self) -> str | None:
        """Kind of relative or rotary positions; None without."""
        return parse_positions(self.positions, self.width, self.head_dim)[1]

    @property
    def absolute(self) -> str | None:
        """Kind of absolute positions; None without."""
        return parse_positions(self.positions, self.width, self.head_dim)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextScaleConfig(TransformerConfig):
    """Architecture of a VAR transformer, which predicts a token map per step; the defaults are for 256px.

    Attributes:
      mask: attention mask: `block_causal` shows each map itself and all coarser maps (published);
        `block_diagonal` shows it itself alone, so that it depends on the coarser maps through f_hat only, a
        Markov chain of maps (HMAR, Kumbong et al. 2025; MVAR).

    Raises:
      ValueError: on an unknown mask.
    """

    predicts_maps: ClassVar[bool] = True

    mask: str = "block_causal"

    def __post_init__(self):
        super().__post_init__()
        if self.mask not in MAP_MASKS:
            raise ValueError(f"transformer mask must be one of {', '.join(MAP_MASKS)}; got {self.mask!r}")

    @property
    def uses_cache(self) -> bool:
        """Return whether a step of generation attends to the keys and values of earlier steps."""
        return self.mask == "block_causal"

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Positions (start, end) of each token map."""
        return list(zip(self.schedule.starts, self.schedule.ends, strict=True))

    @property
    def masks(self) -> tuple[Bool[np.ndarray, "L L"], ...]:
        """Mask of all blocks."""
        return (self.schedule.mask if self.mask == "block_causal" else self.schedule.own_map_mask,)

    @property
    def levels(self) -> Int32[np.ndarray, " L"]:
        """Scale of each position."""
        return self.schedule.levels

    def to_prediction_order(self, tokens: Shaped[Array, "B L *dims"]) -> Shaped[Array, "B L *dims"]:
        """Return positions unchanged: prediction order is raster order."""
        return tokens

    def to_raster_order(self, predicted: Shaped[Array, "B L *dims"]) -> Shaped[Array, "B L *dims"]:
        """Return positions unchanged: prediction order is raster order."""
        return predicted

    @functools.cached_property
    def coords(self) -> TokenCoords:
        """Coordinates of the positions in the image."""
        return scale_coords(self.schedule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig(TransformerConfig):
    """Architecture of a transformer that predicts the tokens of one map one by one.

    Attributes:
      order: order of prediction of the cells of the map (see `transformer/orders.py`).
      order_seed: seed of the order `random`.
      mask: attention mask on the earlier tokens (see `transformer/positions.py`).
      mask_radius: radius of the masks row, column, axial and local, in cells.

    Raises:
      ValueError: on more than one token map, or an unknown order or mask.
    """

    predicts_maps: ClassVar[bool] = False

    scales: tuple[int, ...] = (16,)
    order: str = "raster"
    order_seed: int = 0
    mask: str = "causal"
    mask_radius: int = 1

    def __post_init__(self):
        super().__post_init__()
        if len(self.scales) != 1:
            raise ValueError(
                "a next-token transformer needs a tokenizer of one map, scales=(n,), "
                f"got scales={self.scales}"
            )
        self.masks  # noqa: B018  (raises the errors of order and mask)

    levels = None

    def to_prediction_order(self, tokens: Shaped[Array, "B L *dims"]) -> Shaped[Array, "B L *dims"]:
        """Reorder positions from raster order to prediction order."""
        return tokens[:, self.cells]

    def to_raster_order(self, predicted: Shaped[Array, "B L *dims"]) -> Shaped[Array, "B L *dims"]:
        """Reorder positions from prediction order to raster order."""
        return predicted[:, inverse_permutation(self.cells)]

    @functools.cached_property
    def cells(self) -> Int32[np.ndarray, " L"]:
        """Row-major cell of the map of each token in prediction order."""
        return prediction_order(self.order, self.scales[0], self.order_seed)

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Positions (start, end) of each token."""
        return [(i, i + 1) for i in range(self.length)]

    @functools.cached_property
    def masks(self) -> tuple[Bool[np.ndarray, "L L"], ...]:
        """M masks, True where a query (row) sees a key (column); block i uses number i modulo M."""
        return sequence_masks(self.mask, self.coords, self.mask_radius)

    @functools.cached_property
    def coords(self) -> TokenCoords:
        """Coordinates of the positions in the image."""
        return order_coords(self.cells, self.scales[0])
