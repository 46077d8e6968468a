"""How a position knows where it stands: one option, `positions`, for both transformers.

At most one of the absolute kinds, which are added to the input, and one of the relative kinds, which act in
attention, joined by "+" (`learned_1d+relative_2d`), or `none`:

| kind | what it is |
| --- | --- |
| `learned_1d` | a learned vector for each position of the sequence (published VAR) |
| `learned_2d` | a learned vector for each row, and one for each column |
| `sinusoidal_2d` | sines and cosines of row and column (Vaswani et al. 2017), not learned |
| `relative_2d` | a learned bias of each head on scores, by row and column distance (T5: Raffel et al. 2020) |
| `rotary_1d` | queries and keys turned by their place in the line (RoPE: Su et al. 2021) |
| `rotary_2d` | half of the channels turned by the row, half by the column (axial RoPE) |

Rows and columns are those of the finest map: a cell of a coarser one stands at its middle, so that scales
line up.  In a next-token sequence a query stands at the cell that it predicts, and a key at the cell whose
code it holds, which is the one before in the order; the start is put off the map's corner, at (-1, -1).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from var_jax.scales import Scales

ABSOLUTE = ("learned_1d", "learned_2d", "sinusoidal_2d")
RELATIVE = ("relative_2d", "rotary_1d", "rotary_2d")
LONGEST = 10_000  # of the wavelengths of sines and rotations, over 2 pi
HALF = 8  # buckets of distances 0, 1, ... along an axis; negative ones have HALF - 1 of their own
EXACT = 4  # distances below this have each a bucket; from there on buckets grow as the logarithm does
BUCKETS = (2 * HALF - 1) ** 2  # of `relative_2d`


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the positions of a sequence lie.

    Attributes:
      query: float32 [L, 2], row and column that a query stands at, in cells of the finest map.
      key: float32 [L, 2], where what a key holds lies.
      query_line, key_line: float32 [L], the same in one dimension.
      side: of the finest map.
    """

    query: np.ndarray
    key: np.ndarray
    query_line: np.ndarray
    key_line: np.ndarray
    side: int


def scale_places(scales: Scales) -> Places:
    """Of the positions of all token maps, each cell at its middle in the finest map; lines run row by row."""
    parts = []
    for side in scales.sides:
        middle = (np.arange(side) + 0.5) * (scales.side / side) - 0.5
        parts.append(np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2))
    cells = np.concatenate(parts).astype(np.float32)
    line = cells @ np.array([scales.side, 1], np.float32)
    return Places(cells, cells, line, line, scales.side)


def order_places(cells: np.ndarray, side: int) -> Places:
    """Of a next-token sequence: cells int [L], row by row, in the order in which they are predicted."""
    places = np.stack(np.divmod(cells, side), -1).astype(np.float32)
    line = np.arange(len(cells), dtype=np.float32)
    held = np.concatenate([np.full((1, 2), -1, np.float32), places[:-1]])
    return Places(places, held, line, line - 1, side)


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
            f"{', '.join(RELATIVE)}, or one of each joined by '+'; found {positions!r}"
        )
    for name, what, size, factor in (
        ("sinusoidal_2d", "width", width, 4),
        ("rotary_1d", "the size of a head", head_dim, 2),
        ("rotary_2d", "the size of a head", head_dim, 4),
    ):
        if name in names and size % factor:
            raise ValueError(f"positions={name} needs {what} to be a multiple of {factor}, found {size}")
    return next(iter(absolute), None), next(iter(relative), None)


def interpolation(places: np.ndarray, side: int) -> np.ndarray:
    """Places float [L] along an axis -> weights float32 [L, side] of the whole cells to both sides."""
    return np.maximum(1 - np.abs(places[:, None] - np.arange(side)), 0).astype(np.float32)


def _angles(places: np.ndarray, count: int) -> np.ndarray:
    """Places [L] -> float32 [L, count], at wavelengths from 2 pi to nearly 2 pi LONGEST."""
    return (places[:, None] * LONGEST ** (-np.arange(count) / count)).astype(np.float32)


def sinusoids(places: Places, width: int) -> np.ndarray:
    """float32 [L, D]: sines and cosines of the row, then of the column, as large as learned ones at first."""
    angles = [_angles(places.query[:, axis], width // 4) for axis in (0, 1)]
    table = np.concatenate([wave(a) for a in angles for wave in (np.sin, np.cos)], axis=1)
    return table * np.float32(math.sqrt(2 / (3 * width)))


def rotary_angles(places: Places, kind: str, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Angles float32 [L, H / 2] that queries and keys are turned by; `kind` is rotary_1d or rotary_2d."""
    if kind == "rotary_1d":
        return _angles(places.query_line, head_dim // 2), _angles(places.key_line, head_dim // 2)
    both = lambda cells: np.concatenate([_angles(cells[:, axis], head_dim // 4) for axis in (0, 1)], axis=1)  # noqa: E731
    return both(places.query), both(places.key)


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


def buckets(places: Places) -> np.ndarray:
    """int32 [L, L] in 0 .. BUCKETS - 1: of the row and column distance of each query and key together."""
    rows, columns = np.moveaxis(_bucket(places.query[:, None] - places.key[None], places.side), -1, 0)
    return rows * (2 * HALF - 1) + columns
