"""Which earlier tokens a token of a next-token sequence sees.

| mask | a token sees, of the tokens before it in the order |
| --- | --- |
| `causal` | all |
| `row` | those at most `reach` rows from its own cell |
| `column` | those at most `reach` columns from it |
| `axial` | as `row` in every other block, from the first on, and as `column` in the others |
| `local` | those at most `reach` rows and `reach` columns from it |

Row and column attention (Child et al. 2019, sparse transformers; Ho et al. 2019, axial attention) make up
for flattening: what is above a cell is as near as what is left of it.  With a reach of 1 and a raster, column
or snake order, two blocks of `axial` carry every earlier token to every later one; with a reach of 0 they do
not, since what lies above and to the right of a cell is in no row that its column has seen by then.  Along
the other orders some detours would lead through later tokens: on a 16x16 map two blocks then leave out 14%
(spiral_in) to 27% (hilbert) of the pairs, four blocks 1% for z_curve, 4% for random and none for the rest.

The start (the label) and the position's own input are always seen.
"""

import numpy as np

from var_jax.transformer.positions import Places

MASKS = ("causal", "row", "column", "axial", "local")


def sequence_masks(name: str, places: Places, reach: int) -> tuple[np.ndarray, ...]:
    """The masks of the blocks, in turn: one, or two of `axial`; bool [L, L], True where a query sees a key.

    Raises:
      ValueError: on a name that is none, or a reach that is no whole number from 0 up.
    """
    if name not in MASKS:
        raise ValueError(f"transformer mask must be one of {', '.join(MASKS)}; found {name!r}")
    if reach < 0 or reach != int(reach):
        raise ValueError(f"transformer reach must be a whole number from 0 up, found {reach}")
    length = len(places.query)
    causal = np.tri(length, dtype=bool)
    always = np.eye(length, dtype=bool)
    always[:, 0] = True
    rows, columns = np.moveaxis(np.abs(places.query[:, None] - places.key[None]) <= reach, -1, 0)
    near = {
        "causal": (causal,),
        "row": (rows,),
        "column": (columns,),
        "axial": (rows, columns),
        "local": (rows & columns,),
    }
    return tuple(causal & (always | seen) for seen in near[name])
