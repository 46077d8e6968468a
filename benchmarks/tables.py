"""Tables in markdown, as benchmarks print and write them."""

from collections.abc import Iterable, Sequence

import numpy as np


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is what a row is of."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "| --- " * len(heads) + "|", *lines[1:]])


def over_seeds(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation of one figure over the seeds, in a number format; of one seed the figure."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"
