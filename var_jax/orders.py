"""Orders: ways through the cells of a square map, one after another, as next-token systems need one.

Next-scale prediction draws a whole map at once; a system that draws token by token must say which cell
comes first.  An order of a map of side n is the sequence of its cells, and a cell is its number in the
row-major map, as tokens are laid out everywhere here: cell r * n + c is in row r and column c.

`raster` (row by row) and `column` (column by column) jump back at the end of each line; `snake` turns
round instead.  `spiral_in` runs clockwise from the corner inwards, `spiral_out` is its reverse.  `z_curve`
(Morton 1966) and `hilbert` fill quarter after quarter, so that what is near in the sequence is near in the
image.  `random` is drawn from a seed.
"""

import functools
from collections.abc import Iterator

import numpy as np


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
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; found {name!r}")
    if side < 1:
        raise ValueError(f"the side of a map must be at least 1, found {side}")
    if seed != int(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"the seed of an order must be a whole number from 0 to 2^32 - 1, found {seed}")
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
        raise ValueError(f"an order must be a permutation of 0 .. L - 1, found shape {order.shape}")
    found = np.empty(order.size, np.int32)
    found[order] = np.arange(order.size, dtype=np.int32)
    return found


@functools.lru_cache(maxsize=64)
def _order(name: str, side: int, seed: int) -> np.ndarray:
    found = np.asarray(_MAKE[name](side, seed), np.int32).reshape(-1)
    found.setflags(write=False)  # shared by all who ask
    return found


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
