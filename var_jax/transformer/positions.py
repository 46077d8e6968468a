"""Positions of tokens: coordinates, position encodings and attention masks."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Shaped

from var_jax.scales import Scales


def slice_rows(
    table: Shaped[np.ndarray | Array, "..."], start: int | Int[Array, ""], size: int, axis: int = 0
) -> Shaped[np.ndarray | Array, "..."]:
    """Slice rows start .. start + size of a table; a traced `start` gives a dynamic slice."""
    if isinstance(start, int):
        return table[(slice(None),) * axis + (slice(start, start + size),)]
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start, size, axis)


ABSOLUTE = ("learned_1d", "learned_2d", "sinusoidal_2d")
RELATIVE = ("relative_2d", "rotary_1d", "rotary_2d")
MAX_WAVELENGTH = 10_000  # of sinusoidal and rotary positions, in units of 2 pi
HALF_BUCKETS = 8  # distance buckets of 0, 1, ... along an axis; negative distances have HALF_BUCKETS - 1 more
EXACT_BUCKETS = 4  # smaller distances have a bucket each; buckets of larger ones grow logarithmically
BUCKETS = (2 * HALF_BUCKETS - 1) ** 2  # distance buckets of `relative_2d`


@dataclasses.dataclass(frozen=True)
class TokenCoords:
    """Coordinates of the positions of a sequence, in cells of the finest map.

    A cell of a coarser map is at its center, so scales align.  For next-token models, a query has the
    coordinates of the token it predicts, and a key those of the token it holds, the previous one.

    Attributes:
      query: row and column of each query.
      key: row and column of each key.
      query_index: one-dimensional coordinate of each query.
      key_index: one-dimensional coordinate of each key.
      side: of the finest map.
    """

    query: Float32[np.ndarray, "L 2"]
    key: Float32[np.ndarray, "L 2"]
    query_index: Float32[np.ndarray, " L"]
    key_index: Float32[np.ndarray, " L"]
    side: int


def scale_coords(scales: Scales) -> TokenCoords:
    """Compute the coordinates of all token maps; the one-dimensional ones are row-major in the finest map."""
    parts = []
    for side in scales.sides:
        centers = (np.arange(side) + 0.5) * (scales.side / side) - 0.5
        parts.append(np.stack(np.meshgrid(centers, centers, indexing="ij"), -1).reshape(-1, 2))
    coords = np.concatenate(parts).astype(np.float32)
    index = coords @ np.array([scales.side, 1], np.float32)
    return TokenCoords(coords, coords, index, index, scales.side)


def order_coords(cells: Int[np.ndarray, " L"], side: int) -> TokenCoords:
    """Compute the coordinates of a next-token sequence; the start token, the first key, is at (-1, -1).

    Args:
      cells: row-major cells in prediction order.
      side: of the map.
    """
    coords = np.stack(np.divmod(cells, side), -1).astype(np.float32)
    index = np.arange(len(cells), dtype=np.float32)
    key_coords = np.concatenate([np.full((1, 2), -1, np.float32), coords[:-1]])
    return TokenCoords(coords, key_coords, index, index - 1, side)


def parse_positions(positions: str, width: int, head_dim: int) -> tuple[str | None, str | None]:
    """Parse a `positions` option to its absolute and its relative kind; None for none.

    Raises:
      ValueError: on an unknown kind, two absolute or two relative kinds, or a width that a kind does not
        support.
    """
    names = [] if positions == "none" else positions.split("+")
    absolute, relative = ([name for name in names if name in kinds] for kinds in (ABSOLUTE, RELATIVE))
    if len(absolute) > 1 or len(relative) > 1 or len(absolute) + len(relative) != len(names):
        raise ValueError(
            f"transformer positions must be none, one of {', '.join(ABSOLUTE)}, one of "
            f"{', '.join(RELATIVE)}, or one of each joined by '+'; got {positions!r}"
        )
    for name, size_name, size, factor in (
        ("sinusoidal_2d", "width", width, 4),
        ("rotary_1d", "the size of a head", head_dim, 2),
        ("rotary_2d", "the size of a head", head_dim, 4),
    ):
        if name in names and size % factor:
            raise ValueError(f"positions={name} needs {size_name} to be a multiple of {factor}, got {size}")
    return next(iter(absolute), None), next(iter(relative), None)


def interpolation(coords: Float32[np.ndarray, " L"], side: int) -> Float32[np.ndarray, "L side"]:
    """Compute the weights of linear interpolation between cells along an axis."""
    return np.maximum(1 - np.abs(coords[:, None] - np.arange(side)), 0).astype(np.float32)


def _angles(coords: np.ndarray, count: int) -> np.ndarray:
    """Compute angles float32 [L, count] at wavelengths from 2 pi to nearly 2 pi MAX_WAVELENGTH."""
    return (coords[:, None] * MAX_WAVELENGTH ** (-np.arange(count) / count)).astype(np.float32)


def sinusoids(coords: TokenCoords, width: int) -> Float32[np.ndarray, "L D"]:
    """Compute sinusoidal embeddings of the row and the column, with the scale of learned ones at init."""
    angles = [_angles(coords.query[:, axis], width // 4) for axis in (0, 1)]
    table = np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=1)
    return table * np.float32(math.sqrt(2 / (3 * width)))


def rotary_angles(
    coords: TokenCoords, kind: str, head_dim: int
) -> tuple[Float32[np.ndarray, "L angles"], Float32[np.ndarray, "L angles"]]:
    """Compute the H / 2 rotary angles of queries and of keys; `kind` is rotary_1d or rotary_2d."""
    if kind == "rotary_1d":
        return _angles(coords.query_index, head_dim // 2), _angles(coords.key_index, head_dim // 2)
    both = lambda cells: np.concatenate([_angles(cells[:, axis], head_dim // 4) for axis in (0, 1)], axis=1)
    return both(coords.query), both(coords.key)


def rotate(
    x: Shaped[Array, "B n N H"], angles: Float32[np.ndarray | Array, "n angles"]
) -> Float32[Array, "B n N H"]:
    """Rotate queries or keys: channels i and H / 2 + i by angle i of their position."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _bucket(distance: np.ndarray, max_distance: int) -> np.ndarray:
    """Map signed distances to buckets, int32 in 0 .. 2 HALF_BUCKETS - 2.

    Distances are rounded to integers; they have a bucket each below EXACT_BUCKETS, then logarithmic ones.
    """
    half, exact = HALF_BUCKETS, EXACT_BUCKETS
    size = np.floor(np.abs(distance) + 0.5)
    log_ratio = np.log(np.maximum(size, exact) / exact) / np.log(max(max_distance, exact + 1) / exact)
    bucket = np.where(size < exact, size, np.minimum(exact + (half - exact) * log_ratio, half - 1))
    return (half - 1 + np.sign(distance) * np.floor(bucket)).astype(np.int32)


def distance_buckets(coords: TokenCoords) -> Int32[np.ndarray, "L L"]:
    """Compute the bucket, 0 .. BUCKETS - 1, of the row and column distance of each query and key."""
    rows, columns = np.moveaxis(_bucket(coords.query[:, None] - coords.key[None], coords.side), -1, 0)
    return rows * (2 * HALF_BUCKETS - 1) + columns


MASKS = ("causal", "row", "column", "axial", "local")


def sequence_masks(name: str, coords: TokenCoords, mask_radius: int) -> tuple[Bool[np.ndarray, "L L"], ...]:
    """Build the causal masks that the blocks use in turn, True where a query sees a key; two for `axial`.

    Every query sees the first position and its own.

    Args:
      name: one of `MASKS`: `causal` shows all earlier tokens; `row` and `column` those at a distance of at
        most `mask_radius` rows or columns; `axial` alternates between these; `local` is their intersection.
      coords: of the sequence.
      mask_radius: in cells.

    Raises:
      ValueError: on an unknown name, or a mask_radius that is not a non-negative integer.
    """
    if name not in MASKS:
        raise ValueError(f"transformer mask must be one of {', '.join(MASKS)}; got {name!r}")
    if mask_radius < 0 or mask_radius != int(mask_radius):
        raise ValueError(f"transformer mask_radius must be a whole number from 0 up, got {mask_radius}")
    length = len(coords.query)
    causal = np.tri(length, dtype=bool)
    always = np.eye(length, dtype=bool)
    always[:, 0] = True
    rows, columns = np.moveaxis(np.abs(coords.query[:, None] - coords.key[None]) <= mask_radius, -1, 0)
    near = {
        "causal": (causal,),
        "row": (rows,),
        "column": (columns,),
        "axial": (rows, columns),
        "local": (rows & columns,),
    }
    return tuple(causal & (always | mask) for mask in near[name])


class PositionTables(NamedTuple):
    """Constant tables of the positions of a sequence; None for those that its kinds of positions do not use.

    Attributes:
      levels: scale of each position.
      added: added to the residual stream.
      row_weights: weights of the learned row embeddings.
      column_weights: weights of the learned column embeddings.
      distance_buckets: bucket of each query and key.
      rope_angles: rotary angles of queries and of keys.
      masks: M masks, True where a query sees a key; block i uses number i modulo M.
    """

    levels: Int32[np.ndarray | Array, " n"] | None
    added: Float32[np.ndarray | Array, "n D"] | None
    row_weights: Float32[np.ndarray | Array, "n side"] | None
    column_weights: Float32[np.ndarray | Array, "n side"] | None
    distance_buckets: Int32[np.ndarray | Array, "n keys"] | None
    rope_angles: (
        tuple[Float32[np.ndarray | Array, "n angles"], Float32[np.ndarray | Array, "n angles"]] | None
    )
    masks: Bool[np.ndarray | Array, "M n keys"]

    def at(
        self, start: int | Int[Array, ""], size: int, num_keys: int, first_key: int = 0
    ) -> "PositionTables":
        """Slice the rows start .. start + size, and `num_keys` columns of tables over keys.

        Args:
          start: first position, possibly traced.
          size: number of positions.
          num_keys: number of keys that these positions attend to.
          first_key: position of the first of these keys.
        """
        keys = slice(first_key, first_key + num_keys)

        def take(table):
            return None if table is None else slice_rows(table, start, size)

        return PositionTables(
            levels=take(self.levels),
            added=take(self.added),
            row_weights=take(self.row_weights),
            column_weights=take(self.column_weights),
            distance_buckets=None if self.distance_buckets is None else take(self.distance_buckets)[:, keys],
            rope_angles=None if self.rope_angles is None else tuple(map(take, self.rope_angles)),
            masks=slice_rows(self.masks, start, size, axis=1)[..., keys],
        )


def position_tables(
    positions: str,
    coords: TokenCoords,
    levels: Int32[np.ndarray, " L"] | None,
    masks: tuple[Bool[np.ndarray, "L L"], ...],
    width: int,
    head_dim: int,
) -> PositionTables:
    """Build the position tables of a sequence.

    Args:
      positions: kinds of positions (see `parse_positions`).
      coords: coordinates of the positions.
      levels: scale of each position; None without level embeddings.
      masks: masks that the blocks use in turn.
      width: D.
      head_dim: H.
    """
    absolute, relative = parse_positions(positions, width, head_dim)
    weights = (None, None)
    if absolute == "learned_2d":
        weights = tuple(interpolation(axis, coords.side) for axis in coords.query.T)
    return PositionTables(
        levels,
        sinusoids(coords, width) if absolute == "sinusoidal_2d" else None,
        *weights,
        distance_buckets(coords) if relative == "relative_2d" else None,
        rotary_angles(coords, relative, head_dim) if relative in ("rotary_1d", "rotary_2d") else None,
        np.stack(masks),
    )
