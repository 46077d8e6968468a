"""Markdown tables of benchmarks and experiments."""

from collections.abc import Iterable, Sequence

import numpy as np


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "| --- " * len(heads) + "|", *lines[1:]])


def format_over_seeds(values: Sequence[float], form: str) -> str:
    """Format the mean ± standard deviation of a value over the seeds; of a single seed, the value.

    Args:
      values: one per seed.
      form: format specification, such as ".2f".
    """
    if len(values) == 1:
        return format(values[0], form)
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"
