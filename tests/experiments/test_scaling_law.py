"""Test the scaling-law experiment: fits of synthetic curves, and the whole command at tiny size."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import tokenizer, var
from experiments.scaling_law.power_law import PowerLaw
from experiments.scaling_law.report import (
    QUANTITIES,
    best_so_far,
    fit_points,
    fit_runs,
    format_fits,
    plot_laws,
    training_compute,
)
from experiments.scaling_law.run import (
    count_block_parameters,
    next_scale_stage,
    parse_depths,
    prepare_stage,
    size_config,
)
from tests.helpers.commands import command
from tests.helpers.tiny import tiny_config
from var_jax import stages
from var_jax.transformer.config import NextScaleConfig

CONFIG = """
from tests.helpers.tiny import tiny_config
def get_config():
    config = tiny_config({data!r})
    config.stages = ("next_scale",)
    config.next_scale.data.shift = 1
    return config
"""
LAW = PowerLaw(a=1e5, b=-0.4, c=2.0, pearson=-1.0)


def synthetic_run(depth: int, seed: int = 0) -> dict:
    """Make a synthetic run that reaches LAW at step 70 and overfits from then on."""
    n, step = 18 * depth * (16 * depth) ** 2, np.arange(10, 101, 10)
    run = {
        "depth": depth,
        "width": 16 * depth,
        "seed": seed,
        "N": n,
        "batch": 8,
        "flops_per_image": 6 * 30 * n,
    }
    run["step"] = step.tolist()
    for i, name in enumerate(QUANTITIES):
        end, scale = LAW(n / 1e9) + 0.001 * seed, 0.2 if name.startswith("error") else 1 + i
        run[name] = (scale * (end + 0.01 * np.maximum(70 - step, (step - 70) / 2))).tolist()
    return run


@pytest.fixture(scope="module")
def result() -> dict:
    return fit_runs([synthetic_run(depth, seed) for seed in (0, 1) for depth in (1, 2, 3, 4, 6)], draws=60)


def test_the_law_of_the_best_losses_is_recovered_against_size(result):
    assert best_so_far(result["runs"][0], "loss")[-4:].tolist() == [min(result["runs"][0]["loss"])] * 4
    for name in QUANTITIES:
        fit = result["fits"]["N"][name]
        assert fit["points"] == 10 and fit["b"] == pytest.approx(LAW.b, abs=0.005)
        assert fit["pearson"] < -0.9999 and fit["b"] < fit["b_alone"] < 0
        low, high = fit["interval"]["b"]
        assert low <= fit["b"] <= high and high - low < 0.02


def test_the_frontier_is_below_every_run_after_its_first_tenth(result):
    x, y = fit_points(result["runs"], "C", "loss")
    assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()
    assert x[0] >= training_compute(synthetic_run(1))[0] / 1e15
    for run in result["runs"]:
        cost, reached = training_compute(run) / 1e15, best_so_far(run, "loss")
        cheaper = cost <= x[:, None]
        assert all(
            lowest <= reached[points].min() for lowest, points in zip(y, cheaper, strict=True) if points.any()
        )
    fit = result["fits"]["C"]["loss"]
    assert fit["points"] == len(x) > 5 and fit["interval"]["b"][0] <= fit["b"] < 0


def test_a_frontier_of_too_few_points_has_no_law(tmp_path):
    runs = [synthetic_run(depth) for depth in (1, 2, 3, 4)]
    for run in runs[1:]:
        run["loss"] = [9.0] * 9 + [8.0]  # nothing gained by size
    runs[0]["loss"] = [4.0] * 9 + [3.0]
    result = fit_runs(runs, draws=20)
    assert result["fits"]["C"]["loss"] is None and "| loss, all maps | C | too few |" in format_fits(result)
    plot_laws(result, tmp_path / "plot.png")


def test_tables_and_plot(result, tmp_path):
    text = format_fits(result)
    assert "| 6 | 96 | 1 | 995,328 |" in text and "| 100 | 70 |" in text
    assert "(2 N)^-0.23" in text and "(1.5e-05 C)^-0.16" in text and "unknown" not in text
    plot_laws(result, tmp_path / "plot.png")
    assert min(Image.open(tmp_path / "plot.png").size) > 400
    json.dumps(result, allow_nan=False)


def test_three_sizes_have_no_intervals_and_two_no_fit():
    result = fit_runs([synthetic_run(depth) for depth in (1, 2, 4)])
    assert result["fits"]["N"]["loss"]["interval"] is None and "| unknown | unknown |" in format_fits(result)
    with pytest.raises(ValueError, match="too few sizes: .* 3 or more, got 2"):
        fit_runs([synthetic_run(1), synthetic_run(2), synthetic_run(1, seed=1)])


def test_parameters_are_counted_as_published():
    assert count_block_parameters(NextScaleConfig(depth=16)) == 73728 * 16**3
    assert count_block_parameters(NextScaleConfig(depth=36, shared_adaln=True)) == 49152 * 36**3


def test_a_size_of_the_published_config_is_the_published_one(tiny_run, token_cache):
    stage = var.get_config("d16")
    stage.tokenizer, stage.data.tokens, stage.scales = str(tiny_run), str(token_cache), ()
    stage.train.batch = 16
    d20, published = size_config(stage, 20, 64, False, 3, 40), var.get_config("d20")
    assert {**d20.model} == pytest.approx({**published.model})
    assert (d20.seed, d20.train.lr_schedule, d20.train.base_learning_rate) == (3, "constant", 1e-4)
    assert d20.train.steps == 200 * 1442 // 16 and d20.train.eval_every == d20.train.steps // 40
    assert size_config(stage, 8, 64, True, 3, 40).train.base_learning_rate == pytest.approx(2e-4)
    assert stage.model.depth == 16 and stage.train.lr_schedule == "lin0"  # as it was


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["1", "2.5", "3"], "--depths=1,2.5,3: a depth must be a positive integer, got 2.5"),
        (["0", "1", "2"], "must be a positive integer, got 0"),
        (["-1", "1", "2"], "must be a positive integer, got -1"),
        (["1", "2", "2"], "--depths=1,2,2: too few sizes, .* needs 3 or more"),
    ],
)
def test_depths_that_give_no_law_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_depths(words)


def test_configs_that_give_no_law_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--config must have a stage next_scale; this one has tokenizer"):
        next_scale_stage(tokenizer.get_config())
    config = tiny_config(tmp_path)
    config.stages = ("next_scale",)
    with pytest.raises(
        ValueError, match="config.tokenizer is empty, and no stage of the config trains a tokenizer"
    ):
        prepare_stage(config, tmp_path, 1)


def test_tokenizer_and_tokens_are_made_first(tiny_run, digits_dir, tmp_path, monkeypatch):
    config, trained = tiny_config(digits_dir), []

    def train(stage, workdir):  # tested elsewhere
        trained.append(stage.task)
        workdir.parent.mkdir(exist_ok=True)
        workdir.symlink_to(tiny_run)

    monkeypatch.setattr(stages, "run", train)
    stage = prepare_stage(config, tmp_path / "out", 3)
    assert trained == ["tokenizer"] and stage.tokenizer == str(tmp_path / "out" / "tokenizer")
    source, held_out = stages.open_sources(stage)
    assert (source.num_records, source.num_images, held_out.num_images) == (3 * 1442, 1442, 355)
    assert stage.data.shift == config.tokenizer.data.shift == source.description.shift == 1
    assert stages.build_task(size_config(stage, 2, 8, True, 0, 3), tmp_path, source)[1] == 6  # fits the cache
    assert (
        prepare_stage(config, tmp_path / "other", 3) is stage and len(trained) == 1
    )  # the stage names both now


def test_the_command_trains_fits_and_does_not_repeat_its_work(tiny_run, digits_dir, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(data=str(digits_dir)))
    out = tmp_path / "out"
    flags = ["-m", "experiments.scaling_law.run", f"--config={tmp_path}/config.py", f"--out={out}"]
    flags += ["--depths=3,1,2", "--width_per_depth=8", "--evaluations=3", "--crops=2"]
    flags += [f"--config.next_scale.tokenizer={tiny_run}"]
    process = command(*flags)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "--- run 3 of 3: depth 3, seed 0" in process.stdout
    result = json.loads((out / "scaling_law.json").read_text())
    sizes = [(run["depth"], run["width"], run["step"]) for run in result["runs"]]
    assert sizes == [(depth, 8 * depth, [2, 4, 6]) for depth in (1, 2, 3)]
    for run in result["runs"]:
        assert all(0 < loss < 10 for loss in run["loss"]) and all(0 < error <= 1 for error in run["error"])
    assert Image.open(out / "scaling_law.png").size[0] > 800
    assert (out / "scaling_law.md").read_text() in process.stdout
    assert not list(out.rglob("previews"))  # previews are off
    files = [*out.rglob("*.array_record"), *out.rglob("metrics.jsonl")]
    written = {path: path.stat().st_mtime_ns for path in files}
    (out / "scaling_law.json").unlink()
    repeated = command(*flags)
    assert repeated.returncode == 0, repeated.stderr[-2000:]
    assert repeated.stdout.count("already trained") == 3 and len(written) == 5
    assert json.loads((out / "scaling_law.json").read_text()) == result
    assert {path: path.stat().st_mtime_ns for path in files} == written
