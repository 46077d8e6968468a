"""Tables of `experiments.markov`."""

from benchmarks.tables import format_over_seeds, markdown_table
from experiments.next_token.report import QUALITY_COLUMNS
from var_jax.transformer.config import MAP_MASKS as MASKS

# Heading, key, format, factor.
COST_COLUMNS = (
    ("query-key pairs", "pairs", ",.0f", 1),
    ("training, GFLOP", "training_flops", ".1f", 1e-9),
    ("sampling, GFLOP", "sampling_flops", ".1f", 1e-9),
    ("cache in bfloat16, MiB", "cache_bytes", ".1f", 2**-20),
    ("loss and gradient of a block, MiB", "step_bytes", ".0f", 2**-20),
)
LOSS_COLUMNS = (("steps", "steps", ".0f", 1), *QUALITY_COLUMNS)


def format_tables(results: dict) -> str:
    """Format the markdown tables of the parts that were computed."""
    tables = {"cost": format_cost, "speed": format_speed, "loss": format_loss}
    return "\n\n".join(tables[part](result) for part, result in results.items())


def format_cost(result: dict) -> str:
    """Format the cost of an image, a row for each size and mask."""
    rows = [
        [size, mask, *(f"{cost[key] * factor:{form}}" for _, key, form, factor in COST_COLUMNS)]
        for size, masks in result.items()
        for mask, cost in masks.items()
    ]
    return markdown_table(["size", "mask", *(head for head, *_ in COST_COLUMNS)], rows)


def format_speed(result: dict) -> str:
    """Format milliseconds under each mask, and their ratio."""
    rows = [
        [
            size,
            name,
            *(f"{times[mask] * 1e3:.1f}" for mask in MASKS),
            f"{times['ratio']:.2f}",
        ]
        for size, programs in result.items()
        for name, times in programs.items()
    ]
    return markdown_table(["size", "", *(f"{mask}, ms" for mask in MASKS), "ratio"], rows)


def format_loss(result: dict) -> str:
    """Format the figures of the trained systems, mean and deviation over the seeds."""
    rows = [
        [
            system,
            *(
                format_over_seeds([run[key] * factor for run in runs.values()], form)
                for _, key, form, factor in LOSS_COLUMNS
            ),
        ]
        for system, runs in result.items()
    ]
    return markdown_table(["system", *(head for head, *_ in LOSS_COLUMNS)], rows)
