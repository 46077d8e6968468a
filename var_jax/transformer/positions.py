"""Positions of tokens: orders of prediction, coordinates and embeddings, attention masks."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.scales import Scales


def order(name: str, side: int, seed: int = 0) -> np.ndarray:
    """The cells of a side x side map as they follow each other.

    Args:
      name: one of `ORDERS`.
      side: n, of the map.
      seed: of `random`, from 0 up to 2^32 - 1; the other orders do not depend on it.

    Returns:
      int32 [n * n], read-only: the row-major cell that the i-th token of the sequence is.

    Raises:
      ValueError: on an unknown name, a side below 1, or no such seed.
    """
    if name not in _MAKE:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {name!r}")
    if side < 1:
        raise ValueError(f"the side of a map must be at least 1, got {side}")
    if seed != int(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"the seed of an order must be a whole number from 0 to 2^32 - 1, got {seed}")
    return _order(name, side, int(seed) if name == "random" else 0)


def inverse(order: np.ndarray) -> np.ndarray:
    """Where in the sequence each cell stands: `inverse(order)[order[i]] == i`.

    Args:
      order: int [L], a permutation of 0 .. L - 1.

    Returns:
      int32 [L].

    Raises:
      ValueError: on what is no permutation.
    """
    order = np.asarray(order)
    if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise ValueError(f"an order must be a permutation of 0 .. L - 1, got shape {order.shape}")
    result = np.empty(order.size, np.int32)
    result[order] = np.arange(order.size, dtype=np.int32)
    return result


@functools.lru_cache(maxsize=64)
def _order(name: str, side: int, seed: int) -> np.ndarray:
    result = np.asarray(_MAKE[name](side, seed), np.int32).reshape(-1)
    result.setflags(write=False)  # shared by all who ask
    return result


def _cells(side: int) -> np.ndarray:
    """int [n, n]: the number of each cell."""
    return np.arange(side * side).reshape(side, side)


def _snake(side: int) -> np.ndarray:
    cells = _cells(side)
    cells[1::2] = cells[1::2, ::-1].copy()
    return cells


def _spiral_in(side: int) -> np.ndarray:
    """Takes the top row off, turns what is left so that its right column is on top, and so on."""
    left, taken = _cells(side), []
    while left.size:
        taken.append(left[0])
        left = np.rot90(left[1:])
    return np.concatenate(taken)


def _z_curve(side: int) -> np.ndarray:
    """By the bits of row and column in turn: the curve of the next power of two, less the cells outside."""
    row, column = np.divmod(_cells(side), side)
    key = np.zeros_like(row)
    for bit in range(side.bit_length()):
        key |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1
    return np.argsort(key, axis=None)


def _hilbert(side: int) -> list[int]:
    """Hilbert's curve where side is a power of two, else Cerveny's generalisation (gilbert) of it.

    On a square of any side each step of the generalisation goes to one of the four neighbours (checked up to
    128); the diagonal steps that it is known for come on oblong maps.
    """
    return [r * side + c for r, c in _gilbert((0, 0), (0, 1), side, (1, 0), side)]


def _gilbert(
    start: tuple[int, int], along: tuple[int, int], width: int, across: tuple[int, int], height: int
) -> Iterator[tuple[int, int]]:
    """Cells (row, column) of a curve through a rectangle, from `start` to the other end of its width.

    Args:
      start: a corner.
      along: unit step in the direction of the width, away from `start`.
      width: cells that way.
      across: unit step in the direction of the height.
      height: cells that way.
    """

    def at(i: int, j: int) -> tuple[int, int]:
        return (start[0] + i * across[0] + j * along[0], start[1] + i * across[1] + j * along[1])

    if width == 1 or height == 1:
        yield from (at(i, j) for i in range(height) for j in range(width))
        return
    w, h = width // 2, height // 2
    if 2 * width > 3 * height:  # too long for three parts: one after another
        w += w % 2 if width > 2 else 0  # a part of even width can be crossed without a diagonal step
        yield from _gilbert(start, along, w, across, height)
        yield from _gilbert(at(0, w), along, width - w, across, height)
        return
    h += h % 2 if height > 2 else 0
    back, up = (-along[0], -along[1]), (-across[0], -across[1])
    yield from _gilbert(start, across, h, along, w)  # away from the starting corner,
    yield from _gilbert(at(h, 0), along, width, across, height - h)  # over to the far side,
    yield from _gilbert(at(h - 1, width - 1), up, h, back, width - w)  # and back


def _random(side: int, seed: int) -> np.ndarray:
    """By the old generator: a trained model relies on its order, and numpy promises this one for good."""
    return np.random.RandomState(seed).permutation(side * side)


_MAKE = {
    "raster": lambda side, seed: _cells(side),
    "column": lambda side, seed: _cells(side).T,
    "snake": lambda side, seed: _snake(side),
    "spiral_in": lambda side, seed: _spiral_in(side),
    "spiral_out": lambda side, seed: _spiral_in(side)[::-1],
    "z_curve": lambda side, seed: _z_curve(side),
    "hilbert": lambda side, seed: _hilbert(side),
    "random": _random,
}
ORDERS = tuple(_MAKE)


def rows(table: np.ndarray | jax.Array, start: int | jax.Array, size: int, axis: int = 0):
    """Slice rows start .. start + size of a table; a `start` that is traced gives a dynamic slice."""
    if isinstance(start, int):
        return table[(slice(None),) * axis + (slice(start, start + size),)]
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start, size, axis)


ABSOLUTE = ("learned_1d", "learned_2d", "sinusoidal_2d")
RELATIVE = ("relative_2d", "rotary_1d", "rotary_2d")
LONGEST = 10_000  # of the wavelengths of sines and rotations, over 2 pi
HALF = 8  # buckets of distances 0, 1, ... along an axis; negative ones have HALF - 1 of their own
EXACT = 4  # distances below this have each a bucket; from there on buckets grow as the logarithm does
BUCKETS = (2 * HALF - 1) ** 2  # of `relative_2d`


@dataclasses.dataclass(frozen=True)
class TokenCoords:
    """Where the positions of a sequence lie.

    Attributes:
      query: float32 [L, 2], row and column that a query stands at, in cells of the finest map.
      key: float32 [L, 2], where what a key holds lies.
      query_index, key_index: float32 [L], the same in one dimension.
      side: of the finest map.
    """

    query: np.ndarray
    key: np.ndarray
    query_index: np.ndarray
    key_index: np.ndarray
    side: int


def scale_coords(scales: Scales) -> TokenCoords:
    """Of the positions of all token maps, each cell at its middle in the finest map; lines run row by row."""
    parts = []
    for side in scales.sides:
        middle = (np.arange(side) + 0.5) * (scales.side / side) - 0.5
        parts.append(np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2))
    cells = np.concatenate(parts).astype(np.float32)
    line = cells @ np.array([scales.side, 1], np.float32)
    return TokenCoords(cells, cells, line, line, scales.side)


def order_coords(cells: np.ndarray, side: int) -> TokenCoords:
    """Of a next-token sequence: cells int [L], row by row, in the order in which they are predicted."""
    coords = np.stack(np.divmod(cells, side), -1).astype(np.float32)
    line = np.arange(len(cells), dtype=np.float32)
    key_coords = np.concatenate([np.full((1, 2), -1, np.float32), coords[:-1]])
    return TokenCoords(coords, key_coords, line, line - 1, side)


def parse(positions: str, width: int, head_dim: int) -> tuple[str | None, str | None]:
    """The absolute and the relative kind that an option names; None for none.

    Raises:
      ValueError: on a kind that there is not, two of a sort, or a width that it cannot have.
    """
    names = [] if positions == "none" else positions.split("+")
    absolute, relative = ([name for name in names if name in kinds] for kinds in (ABSOLUTE, RELATIVE))
    if len(absolute) > 1 or len(relative) > 1 or len(absolute) + len(relative) != len(names):
        raise ValueError(
            f"transformer positions must be none, one of {', '.join(ABSOLUTE)}, one of "
            f"{', '.join(RELATIVE)}, or one of each joined by '+'; got {positions!r}"
        )
    for name, what, size, factor in (
        ("sinusoidal_2d", "width", width, 4),
        ("rotary_1d", "the size of a head", head_dim, 2),
        ("rotary_2d", "the size of a head", head_dim, 4),
    ):
        if name in names and size % factor:
            raise ValueError(f"positions={name} needs {what} to be a multiple of {factor}, got {size}")
    return next(iter(absolute), None), next(iter(relative), None)


def interpolation(coords: np.ndarray, side: int) -> np.ndarray:
    """Places float [L] along an axis -> weights float32 [L, side] of the whole cells to both sides."""
    return np.maximum(1 - np.abs(coords[:, None] - np.arange(side)), 0).astype(np.float32)


def _angles(coords: np.ndarray, count: int) -> np.ndarray:
    """Places [L] -> float32 [L, count], at wavelengths from 2 pi to nearly 2 pi LONGEST."""
    return (coords[:, None] * LONGEST ** (-np.arange(count) / count)).astype(np.float32)


def sinusoids(coords: TokenCoords, width: int) -> np.ndarray:
    """float32 [L, D]: sines and cosines of the row, then of the column, as large as learned ones at first."""
    angles = [_angles(coords.query[:, axis], width // 4) for axis in (0, 1)]
    table = np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=1)
    return table * np.float32(math.sqrt(2 / (3 * width)))


def rotary_angles(coords: TokenCoords, kind: str, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles float32 [L, H / 2] that queries and keys are turned by; `kind` is rotary_1d or rotary_2d."""
    if kind == "rotary_1d":
        return _angles(coords.query_index, head_dim // 2), _angles(coords.key_index, head_dim // 2)
    both = lambda cells: np.concatenate([_angles(cells[:, axis], head_dim // 4) for axis in (0, 1)], axis=1)  # noqa: E731
    return both(coords.query), both(coords.key)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """x [B, n, N, H] with channel i and channel H / 2 + i turned by angles [n, H / 2]; float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _bucket(distance: np.ndarray, longest: int) -> np.ndarray:
    """Signed distances -> int32 in 0 .. 2 HALF - 2: to the nearest whole one below EXACT, then ever wider."""
    size = np.floor(np.abs(distance) + 0.5)
    wide = np.log(np.maximum(size, EXACT) / EXACT) / np.log(max(longest, EXACT + 1) / EXACT)
    bucket = np.where(size < EXACT, size, np.minimum(EXACT + (HALF - EXACT) * wide, HALF - 1))
    return (HALF - 1 + np.sign(distance) * np.floor(bucket)).astype(np.int32)


def buckets(coords: TokenCoords) -> np.ndarray:
    """int32 [L, L] in 0 .. BUCKETS - 1: of the row and column distance of each query and key together."""
    rows, columns = np.moveaxis(_bucket(coords.query[:, None] - coords.key[None], coords.side), -1, 0)
    return rows * (2 * HALF - 1) + columns


MASKS = ("causal", "row", "column", "axial", "local")


def sequence_masks(name: str, coords: TokenCoords, mask_radius: int) -> tuple[np.ndarray, ...]:
    """The masks of the blocks, in turn: one, or two of `axial`; bool [L, L], True where a query sees a key.

    Raises:
      ValueError: on a name that is none, or a mask_radius that is no whole number from 0 up.
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
    return tuple(causal & (always | seen) for seen in near[name])


class PositionTables(NamedTuple):
    """Constants of the positions of a sequence, a row each; None for what its kinds of positions do not use.

    Attributes:
      levels: int32 [L], the scale of each position.
      added: float32 [L, D], added to the residual stream.
      row_weights, column_weights: float32 [L, side], weights of the learned row and column embeddings.
      distance_buckets: int32 [L, L], the bucket of each query and key.
      rope_angles: float32 [L, H / 2] each, of queries and keys.
      masks: bool [M, L, L], True where a query sees a key; block i has number i modulo M.
    """

    levels: np.ndarray | jax.Array | None
    added: np.ndarray | jax.Array | None
    row_weights: np.ndarray | jax.Array | None
    column_weights: np.ndarray | jax.Array | None
    distance_buckets: np.ndarray | jax.Array | None
    rope_angles: tuple[np.ndarray | jax.Array, np.ndarray | jax.Array] | None
    masks: np.ndarray | jax.Array

    def at(self, start: int | jax.Array, size: int, num_keys: int) -> "PositionTables":
        """Take the rows start .. start + size, and of tables over pairs the first `num_keys` keys.

        Args:
          start: an int, or an int32 scalar that is known only when the program runs.
          size: number of positions.
          num_keys: number of keys that these positions attend to.
        """
        take = lambda table: rows(table, start, size)  # noqa: E731
        optional = lambda table: None if table is None else take(table)  # noqa: E731
        return PositionTables(
            *map(optional, self[:4]),
            None if self.distance_buckets is None else take(self.distance_buckets)[:, :num_keys],
            None if self.rope_angles is None else (take(self.rope_angles[0]), take(self.rope_angles[1])),
            rows(self.masks, start, size, axis=1)[..., :num_keys],
        )


def position_tables(
    positions: str,
    coords: TokenCoords,
    levels: np.ndarray | None,
    masks: tuple[np.ndarray, ...],
    width: int,
    head_dim: int,
) -> PositionTables:
    """Build the tables of a whole sequence.

    Args:
      positions: kinds of positions, as `parse` takes them.
      coords: coordinates of the L positions.
      levels: int [L], the scale of each position; None without scales.
      masks: bool [L, L] each.
      width, head_dim: D and H.
    """
    absolute, relative = parse(positions, width, head_dim)
    weights = (None, None)
    if absolute == "learned_2d":
        weights = tuple(interpolation(axis, coords.side) for axis in coords.query.T)
    return PositionTables(
        levels,
        sinusoids(coords, width) if absolute == "sinusoidal_2d" else None,
        *weights,
        buckets(coords) if relative == "relative_2d" else None,
        rotary_angles(coords, relative, head_dim) if relative in ("rotary_1d", "rotary_2d") else None,
        np.stack(masks),
    )
