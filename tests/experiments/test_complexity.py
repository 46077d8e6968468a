"""Test the cost of next-token and next-scale: on paper, counted by XLA, and the command."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.complexity import run
from experiments.complexity.report import KINDS, fit_exponent, fit_exponents, format_tables, plot_costs
from experiments.complexity.run import (
    CODE_DIM,
    CODES,
    SYSTEMS,
    cost_on_paper,
    count_sampling_flops,
    doubling_scales,
    make_network,
)
from tests.helpers.commands import command
from var_jax.scales import Scales
from var_jax.transformer.flops import generation_flops

MODULE = ("-m", "experiments.complexity.run")
THEORY = {name: system.theory for name, system in SYSTEMS.items()}


def test_the_exponent_of_known_powers():
    sides = [4, 8, 16, 32]
    assert fit_exponent(sides, [3 * n**6 for n in sides], 4) == pytest.approx(6)
    assert fit_exponent(sides, [9, *(0.5 * n**4 for n in sides[1:])], 3) == pytest.approx(4)  # the last alone
    noisy = [n**4 * factor for n, factor in zip(sides, (1.1, 0.9, 1.1, 0.9), strict=True)]
    assert fit_exponent(sides, noisy, 4) == pytest.approx(4, abs=0.15)
    assert fit_exponent([4], [1.0], 3) is None


def test_schedules_double_and_end_at_n():
    assert doubling_scales(64) == (1, 2, 4, 8, 16, 32, 64) and doubling_scales(2) == (1, 2)
    assert doubling_scales(48) == (1, 2, 4, 7, 13, 25, 48)
    for side in range(2, 130):
        sides = doubling_scales(side)
        assert sides == Scales(sides).sides and (sides[0], sides[-1]) == (1, side)
        assert Scales(sides).length < 1.65 * side**2


def test_exponents_on_paper_up_to_64():
    points = []
    for name, system in SYSTEMS.items():
        for side in (4, 8, 16, 32, 48, 64):
            result = cost_on_paper(make_network(name, side, width=32, depth=1).config, system.cached)
            points.append({"system": name, "side": side, "counted": None, "seconds": None, **result})
    result = fit_exponents(points, THEORY, last=3)
    assert result["next-token, no cache"]["paper"] == pytest.approx(6, abs=0.3)
    assert result["next-scale, no cache"]["paper"] == pytest.approx(4, abs=0.3)
    for name in ("next-token, KV cache", "next-scale, KV cache"):
        assert 3.5 < result[name]["paper"] < 4
    assert result["next-token, no cache"]["sides"] == {"paper": [32, 48, 64], "counted": [], "seconds": []}
    steps = {(point["system"], point["side"]): point["steps"] for point in points}
    assert steps["next-token, KV cache", 64] == 4096 and steps["next-scale, no cache", 64] == 7


@pytest.mark.parametrize(("name", "theory"), [("next-token, no cache", 6), ("next-scale, no cache", 4)])
def test_exponents_that_xla_counts_without_a_cache(name, theory):
    """A small width makes attention dominate at sizes that compile fast."""
    sides = [16, 32]
    counted = [count_sampling_flops(make_network(name, side, width=8, depth=1)) for side in sides]
    assert fit_exponent(sides, counted, 2) == pytest.approx(theory, abs=0.3)


def by_hand(name: str, width: int, depth: int, n: int) -> float:
    """Compute the matrix FLOPs of the programs: with padding, and only logits that are sampled from."""
    attention = lambda q, k: depth * (24 * q * width**2 + 4 * q * k * width)
    ends = lambda q, sampled: 2 * width * (q * CODE_DIM + sampled * CODES)
    total, maps = (12 * depth + 4) * width**2, Scales(doubling_scales(n))
    if name == "next-token, no cache":
        return total + n**2 * (attention(n**2, n**2) + ends(n**2, 1))
    if name == "next-token, KV cache":
        return total + n**2 * (attention(1, n**2) + ends(1, 1))
    for start, end in zip(maps.starts, maps.ends, strict=True):
        queries = end - start if SYSTEMS[name].cached else end
        total += attention(queries, end) + ends(queries, end - start)
    return total


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_count_of_xla_is_that_on_paper(name):
    """Two blocks would reveal a loop body counted once; elementwise operations make the count larger."""
    model, system = make_network(name, 4, width=128, depth=2), SYSTEMS[name]
    counted = count_sampling_flops(model)
    assert 1 < counted / by_hand(name, 128, 2, 4) < 1.04
    paper = generation_flops(model.config, 0, cached=system.cached)
    padding = {"next-token, no cache": 2 * 16 / 17, "next-token, KV cache": 1}.get(name, 1)
    assert counted / paper == pytest.approx(padding, rel=0.06)


@pytest.mark.parametrize("scheme", ["next-token", "next-scale"])
def test_without_a_cache_the_same_tokens_are_sampled(scheme):
    cached, uncached = (
        np.asarray(run.compile_sampler(make_network(f"{scheme}, {kind}", 4, width=32, depth=2))())
        for kind in ("KV cache", "no cache")
    )
    np.testing.assert_array_equal(uncached, cached)
    assert cached.shape == (1, 16 if scheme == "next-token" else 21) and len(np.unique(cached)) > 3


@pytest.fixture
def points(monkeypatch):
    """Measure fake programs of n^4 FLOPs at 100 FLOP/s, with a limit of 20 seconds."""
    flops = lambda model: float(model.config.scales[-1] ** 4)
    monkeypatch.setattr(run, "count_sampling_flops", flops)
    monkeypatch.setattr(run, "compile_sampler", flops)
    monkeypatch.setattr(run, "median_seconds", lambda flops: flops / 100)
    lines = []
    result = list(run.measure_systems([2, 4, 8], 8, 1, 20.0, lines.append))
    assert len(lines) == len(result) == 12
    assert lines[2].startswith("next-token, no cache, n = 8:") and "not measured, expected 41 s" in lines[2]
    return result


def test_sizes_that_would_take_too_long_are_left_out(points):
    assert [point["seconds"] for point in points[:3]] == pytest.approx([0.16, 2.56, None])
    assert [point["expected_seconds"] for point in points[:3]] == pytest.approx([None, 2.56, 40.96])
    result = fit_exponents(points, THEORY, last=2)["next-scale, KV cache"]
    assert result["seconds"] == pytest.approx(4) and result["sides"]["seconds"] == [2, 4]
    assert result["counted"] == pytest.approx(4) and result["sides"]["counted"] == [4, 8]


def test_report_and_plot_show_missing_measurements(points, tmp_path):
    result = dict(width=8, depth=1, codes=8, code_dim=4, device="cpu", jax="0", fitted_to=2, points=points)
    result["exponents"] = fit_exponents(points, THEORY, last=2)
    lines = format_tables(result).splitlines()
    assert "| 8 | 64 of 64 | 4 of 85 | not measured | not measured | not measured | not measured |" in lines
    assert "| 4 | 16 of 16 | 3 of 21 | 2.56 | 2.56 | 2.56 | 2.56 |" in lines
    (row,) = [line for line in lines if line.startswith("| next-scale, no cache |")]
    assert row.split(" | ")[1] == "4" and row.endswith("| 4.00 | 4.00 | 2, 4 |")
    plot_costs(result, tmp_path / "plot.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "plot.png")).reshape(-1, 4), axis=0)) > 50


def test_the_command_writes_tables_numbers_and_a_picture(tmp_path):
    flags = ("--sides=3,2", "--width=8", "--most_seconds=30", f"--out={tmp_path}/out")
    process = command(*MODULE, *flags)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.count("GFLOPs on paper") == 8
    assert (tmp_path / "out" / "complexity.md").read_text().strip() in process.stdout
    result = json.loads((tmp_path / "out" / "complexity.json").read_text())
    assert [(p["system"], p["side"]) for p in result["points"]] == [(s, n) for s in SYSTEMS for n in (2, 3)]
    assert all(point[kind] > 0 for point in result["points"] for kind in KINDS)
    assert result["exponents"]["next-token, no cache"]["theory"] == 6
    assert (tmp_path / "out" / "complexity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sides=1,4", "--sides=1,4: must be two sizes or more, from 2 on"),
        ("--sides=4,eight", "--sides=4,eight: invalid literal"),
        ("--width=129", "--width=129: transformer num_heads=2"),
    ],
)
def test_wrong_flags_are_named_and_nothing_is_written(flag, message, tmp_path):
    process = command(*MODULE, flag, f"--out={tmp_path}/out")
    assert process.returncode != 0 and message in process.stderr + process.stdout
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()
