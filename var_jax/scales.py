"""The schedule of scales: positions of the token maps in the sequence, and attention masks.

These tables depend on the sides of the token maps alone.  They are numpy arrays, and so constants of every
compiled program.  The schedule is general: `(16,)` is an ordinary VQ-VAE, `(16, 16, 16, 16)` a residual
one, `(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)` that of VAR.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int32

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclasses.dataclass(frozen=True)
class Scales:
    """Sides of K token maps, coarse to fine; the tokens of all maps form one sequence.

    Attributes:
      sides: K positive, non-decreasing ints.

    Raises:
      ValueError: on an empty schedule, a side below 1, or a decreasing side.
    """

    sides: tuple[int, ...]

    def __init__(self, sides: Iterable[int]):
        try:
            sides = tuple(operator.index(side) for side in sides)
        except TypeError as error:
            raise ValueError(f"scales must be a tuple of whole numbers, got {sides!r}") from error
        if not sides:
            raise ValueError("scales must name at least one side, got an empty schedule ()")
        if min(sides) < 1:
            raise ValueError(f"every side of scales must be at least 1, got {min(sides)} in {sides}")
        for previous, side in itertools.pairwise(sides):
            if side < previous:
                raise ValueError(
                    f"scales must run from coarse to fine, but {side} follows {previous} in {sides}"
                )
        object.__setattr__(self, "sides", sides)

    def __len__(self) -> int:
        """Return K, the number of scales."""
        return len(self.sides)

    @property
    def side(self) -> int:
        """Side of the last map, equal to the side of the features."""
        return self.sides[-1]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """First position of each map in the sequence of all tokens."""
        return tuple(int(n) for n in np.cumsum([0, *(s * s for s in self.sides[:-1])]))

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """End of each map in the sequence, one past its last position."""
        return tuple(start + s * s for start, s in zip(self.starts, self.sides, strict=True))

    @property
    def length(self) -> int:
        """L, the number of tokens per image."""
        return self.ends[-1]

    @functools.cached_property
    def levels(self) -> Int32[np.ndarray, " L"]:
        """Scale of each position."""
        return np.repeat(np.arange(len(self), dtype=np.int32), [s * s for s in self.sides])

    @functools.cached_property
    def mask(self) -> Bool[np.ndarray, "L L"]:
        """Attention mask: True where a query (row) sees a key (column) of its own or a coarser scale."""
        return self.levels[:, None] >= self.levels[None, :]

    @functools.cached_property
    def own_map_mask(self) -> Bool[np.ndarray, "L L"]:
        """Attention mask: True where a query (row) sees a key (column) of its own map."""
        return self.levels[:, None] == self.levels[None, :]

    def positions(self, from_scale: int = 0, upto: int = 0) -> slice:
        """Return the positions of some consecutive maps, by default of all.

        Args:
          from_scale: first of these maps; 0 is the coarsest.
          upto: number of maps, counted from the coarsest, with the last of these; 0 for all K.

        Raises:
          ValueError: naming the argument that is out of range.
        """
        if not 0 <= from_scale < len(self):
            raise ValueError(f"from_scale must be a map, 0 .. {len(self) - 1}; got {from_scale}")
        if upto and not from_scale < upto <= len(self):
            raise ValueError(
                f"upto must be a number of maps, {from_scale + 1} .. {len(self)}, or 0 for all; got {upto}"
            )
        return slice(self.starts[from_scale], self.ends[upto - 1])

    def progress(self, k: int) -> float:
        """Return k / (K - 1): 0 at the first scale, 1 at the last; 0 if K = 1."""
        return k / max(len(self) - 1, 1)

    def check_feature_side(self, side: int) -> None:
        """Raise ValueError unless the last map has the side of the features."""
        if self.side != side:
            raise ValueError(
                f"the last side of scales {self.sides} must be the side of the features: "
                f"got {self.side}, the features are {side} x {side}"
            )
