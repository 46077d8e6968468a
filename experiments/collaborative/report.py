"""Tables of `experiments.collaborative`."""

from benchmarks.tables import format_over_seeds, markdown_table
from experiments.next_token.report import QUALITY_COLUMNS

# Heading, key, format, factor.
TIME_COLUMNS = (
    ("batch 1, ms an image", "seconds_1", ".2f", 1e3),
    ("batch 64, ms an image", "seconds_64", ".2f", 1e3),
)
COST_COLUMNS = (
    ("TFLOP an image", "flops", ".2f", 1e-12),
    ("weights, GiB", "weights", ".2f", 2**-30),
    ("cache, MiB an image", "cache", ".0f", 2**-20),
    *TIME_COLUMNS,
)
SAMPLE_COLUMNS = (
    ("MFLOP an image", "flops", ".1f", 1e-6),
    ("cache, KiB an image", "cache", ".0f", 2**-10),
    ("held-out, bits a pixel", "bits_per_pixel", ".3f", 1),
    *QUALITY_COLUMNS[2:],
)
SAME_FOR_ALL_SEEDS = {"flops", "cache"}


def pair_name(draft_scales: int) -> str:
    """Return the name of a pair in tables."""
    return f"{draft_scales} drafted"


def format_tables(results: dict) -> str:
    """Format the markdown tables of the parts that were computed."""
    tables = {"cost": format_cost, "quality": format_quality, "speed": format_speed}
    return "\n\n".join(tables[part](result) for part, result in results.items())


def format_cost(result: dict) -> str:
    """Format the cost of the published sizes, and the speed-up over the first, the drafter alone."""
    drafter = next(iter(result.values()))
    rows = [
        [
            system,
            *(f"{cost[key] * factor:{form}}" for _, key, form, factor in COST_COLUMNS),
            *(f"{drafter[key] / cost[key]:.2f}" for _, key, *_ in TIME_COLUMNS),
        ]
        for system, cost in result.items()
    ]
    heads = ["system", *(head for head, *_ in COST_COLUMNS), "speed-up at 1", "at 64"]
    return markdown_table(heads, rows)


def format_quality(result: dict) -> str:
    """Format the figures of the trained systems, mean and deviation over the seeds."""
    rows = []
    for system, runs in result.items():
        cells = [system]
        for _, key, form, factor in SAMPLE_COLUMNS:
            values = [run[key] * factor for run in runs.values()]
            cells.append(format_over_seeds(values[:1] if key in SAME_FOR_ALL_SEEDS else values, form))
        rows.append(cells)
    return markdown_table(["system", *(head for head, *_ in SAMPLE_COLUMNS)], rows)


def format_speed(result: dict) -> str:
    """Format the measured times."""
    rows = [
        [system, *(f"{times[key] * factor:{form}}" for _, key, form, factor in TIME_COLUMNS)]
        for system, times in result.items()
    ]
    return markdown_table(["system", *(head for head, *_ in TIME_COLUMNS)], rows)
