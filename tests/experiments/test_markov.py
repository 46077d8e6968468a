"""Cost, speed and tables of `experiments.markov`, and the configs of its runs."""

import pytest

from configs import digits
from experiments.markov import report
from experiments.markov.run import SIZES, SYSTEMS, measure_speed, published_cost, system_stage


def test_cost_of_the_published_schedules():
    """The figures of the README."""
    costs = {size: [published_cost(scales, mask) for mask in report.MASKS] for size, scales in SIZES.items()}
    pairs = {size: [cost["pairs"] for cost in both] for size, both in costs.items()}
    assert pairs == {"256px": [286_434, 110_468], "512px": [3_269_850, 1_522_100]}
    causal, diagonal = costs["256px"]
    assert (causal["cache_bytes"], diagonal["cache_bytes"]) == (2 * 16 * 680 * 1024 * 2, 0)
    fewer = 4 * 1024 * 16 * (286_434 - 110_468)  # FLOPs of a pair in 16 blocks
    assert causal["sampling_flops"] - diagonal["sampling_flops"] == fewer


def test_runs_are_fine_tuned_from_the_block_causal_one_of_their_seed(tmp_path):
    stages = {system: system_stage(digits.next_scale(), system, 3, 400, tmp_path) for system in SYSTEMS}
    masks = ["block_causal", "block_diagonal"] * 2
    assert [stage.model.mask for stage in stages.values()] == masks
    assert [stage.train.steps for stage in stages.values()] == [400, 400, 200, 200]
    assert [stage.init_from for stage in stages.values()] == ["", "", *[f"{tmp_path}/block_causal/3"] * 2]
    assert stages["block_diagonal-tuned"].train.base_learning_rate == pytest.approx(1.6e-2 / 8)


def test_tables_of_what_was_measured():
    speed = {"tiny": measure_speed((1, 2, 3), 2)}
    for times in speed["tiny"].values():
        assert set(times) == {*report.MASKS, "ratio"} and min(times.values()) > 0
    run = {key: 0.5 for _, key, *_ in report.LOSS_COLUMNS}
    loss = {system: {"1": run, "2": run} for system in SYSTEMS}
    cost = {"256px": {mask: {key: 2**20 for _, key, *_ in report.COST_COLUMNS} for mask in report.MASKS}}
    tables = report.format_tables({"cost": cost, "speed": speed, "loss": loss})
    assert "| 256px | block_diagonal | 1,048,576 | 0.0 | 0.0 | 1.0 | 1 |" in tables
    assert "| block_causal-tuned | 0 ± 0 | 0.500 ± 0.000 |" in tables
    assert tables.count("| tiny | ") == 2
