"""Orders in which a next-token transformer predicts the cells of a map."""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Int32


def prediction_order(name: str, side: int, seed: int = 0) -> Int32[np.ndarray, " L"]:
    """Return the cells of a map in prediction order.

    Args:
      name: one of `ORDERS`.
      side: of the map.
      seed: of the order `random`, 0 to 2^32 - 1; the other orders do not use it.

    Returns:
      Row-major cell of each token of the sequence, L = side^2; read-only.

    Raises:
      ValueError: on an unknown name, a side below 1, or an invalid seed.
    """
    if name not in _ORDER_FUNCTIONS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {name!r}")
    if side < 1:
        raise ValueError(f"the side of a map must be at least 1, got {side}")
    if seed != int(seed) or not 0 <= seed < 2**32:
        raise ValueError(f"the seed of an order must be a whole number from 0 to 2^32 - 1, got {seed}")
    return _order(name, side, int(seed) if name == "random" else 0)


def inverse_permutation(order: Int[np.ndarray, " L"]) -> Int32[np.ndarray, " L"]:
    """Invert a permutation: `inverse_permutation(order)[order[i]] == i`.

    Args:
      order: a permutation of 0 .. L - 1.

    Raises:
      ValueError: if `order` is not a permutation.
    """
    order = np.asarray(order)
    if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise ValueError(f"an order must be a permutation of 0 .. L - 1, got shape {order.shape}")
    positions = np.empty(order.size, np.int32)
    positions[order] = np.arange(order.size, dtype=np.int32)
    return positions


@functools.lru_cache(maxsize=64)
def _order(name: str, side: int, seed: int) -> np.ndarray:
    """Compute an order once; see `prediction_order`."""
    cells = np.asarray(_ORDER_FUNCTIONS[name](side, seed), np.int32).reshape(-1)
    cells.setflags(write=False)  # the cache shares it between callers
    return cells


def _cells(side: int) -> np.ndarray:
    """Return the row-major cells of a map, int [side, side]."""
    return np.arange(side * side).reshape(side, side)


def _snake(side: int) -> np.ndarray:
    """Return the boustrophedon order: every other row is reversed."""
    cells = _cells(side)
    cells[1::2] = cells[1::2, ::-1].copy()
    return cells


def _spiral_in(side: int) -> np.ndarray:
    """Return the clockwise inward spiral: take the top row off, rotate the rest, and repeat."""
    remaining, parts = _cells(side), []
    while remaining.size:
        parts.append(remaining[0])
        remaining = np.rot90(remaining[1:])
    return np.concatenate(parts)


def _z_curve(side: int) -> np.ndarray:
    """Return the Z-order (Morton) curve, of the next power of two without the cells outside the map."""
    row, column = np.divmod(_cells(side), side)
    key = np.zeros_like(row)
    for bit in range(side.bit_length()):
        key |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1
    return np.argsort(key, axis=None)


def _hilbert(side: int) -> list[int]:
    """Return the Hilbert curve; if side is not a power of two, Cerveny's generalization of it (gilbert).

    On squares every step of the generalization goes to one of the four neighbors (checked up to side 128);
    its diagonal steps occur only on other rectangles.
    """
    return [r * side + c for r, c in _gilbert((0, 0), (0, 1), side, (1, 0), side)]


def _gilbert(
    start: tuple[int, int], along: tuple[int, int], width: int, across: tuple[int, int], height: int
) -> Iterator[tuple[int, int]]:
    """Yield the cells (row, column) of a curve through a rectangle, between the ends of one of its sides.

    Args:
      start: first cell, a corner.
      along: unit step from `start` towards the last cell.
      width: number of cells in this direction.
      across: unit step in the other direction.
      height: number of cells in that direction.
    """

    def at(i: int, j: int) -> tuple[int, int]:
        return (start[0] + i * across[0] + j * along[0], start[1] + i * across[1] + j * along[1])

    if width == 1 or height == 1:
        yield from (at(i, j) for i in range(height) for j in range(width))
        return
    w, h = width // 2, height // 2
    if 2 * width > 3 * height:  # a long rectangle: two halves, one after the other
        w += w % 2 if width > 2 else 0  # a part of even width needs no diagonal step
        yield from _gilbert(start, along, w, across, height)
        yield from _gilbert(at(0, w), along, width - w, across, height)
        return
    h += h % 2 if height > 2 else 0
    back, up = (-along[0], -along[1]), (-across[0], -across[1])
    yield from _gilbert(start, across, h, along, w)  # away from the starting corner,
    yield from _gilbert(at(h, 0), along, width, across, height - h)  # over to the far side,
    yield from _gilbert(at(h - 1, width - 1), up, h, back, width - w)  # and back


def _random(side: int, seed: int) -> np.ndarray:
    """Return a random permutation; numpy guarantees that the legacy generator used here never changes."""
    return np.random.RandomState(seed).permutation(side * side)


_ORDER_FUNCTIONS = {
    "raster": lambda side, seed: _cells(side),
    "column": lambda side, seed: _cells(side).T,
    "snake": lambda side, seed: _snake(side),
    "spiral_in": lambda side, seed: _spiral_in(side),
    "spiral_out": lambda side, seed: _spiral_in(side)[::-1],
    "z_curve": lambda side, seed: _z_curve(side),
    "hilbert": lambda side, seed: _hilbert(side),
    "random": _random,
}
ORDERS = tuple(_ORDER_FUNCTIONS)
